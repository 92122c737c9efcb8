"""What one client is to send, and when: all of a run, known before it begins.

Decides nothing; it is what ``client.py`` knows at its start and hands to a target that can send a whole run by itself.
Must never know a protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from loadtest.target import Reply

__all__ = ["Crowd", "Note", "Plan", "Played", "Player", "Tell"]

Note = Callable[[float, float, float, int, int, Reply], None]
"""``note(meant, sent, ended, phase, texts, reply)`` for each call, as ``Scribe.note``; the instants are the plan's."""
Tell = Callable[[int, int], None]
"""``tell(calls, failed)``: how many have ended so far."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """Callers of a closed loop: each begins its next call when its last one has ended."""

    begins: float
    """Seconds since the start of the run."""
    ends: float
    """No call is begun then or later."""
    callers: int
    phase: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One client's part of a run."""

    calls: Sequence[Any]
    """What is sent: call ``n`` of the run is ``calls[(turn + n * step) % len(calls)]``."""
    turn: int = 0
    step: int = 1
    arrivals: npt.NDArray[np.float64]
    """When each call of the open phases is meant to be sent, ascending, in seconds since the start of the run."""
    phases: npt.NDArray[np.uint16]
    """Of each arrival."""
    crowds: Sequence[Crowd] = ()
    start: float
    """The instant of ``time.monotonic`` at which the run begins."""
    ends: float
    """Seconds since the start after which no call is waited for."""
    in_flight_max: int
    """A call that is due while so many are open is not sent, and counted as such."""


@dataclass(frozen=True, slots=True)
class Played:
    """What a plan cost; its calls were noted."""

    cpu_s: float
    """CPU seconds of the process while calls were sent and answered; to read the answers afterwards is not in it."""
    took_s: float
    unsent: int
    """Calls that were not sent, because too many were open."""


@runtime_checkable
class Player(Protocol):
    """A target that can send a whole plan, for less than a call at a time costs."""

    async def play(self, plan: Plan, note: Note, tell: Tell, *, timeout_s: float) -> Played:
        """Send it all, and note each call. Ends early when cancelled. Raises ``ConnectionError`` with a sentence."""
        ...
