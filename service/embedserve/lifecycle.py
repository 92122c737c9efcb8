"""The states of the process, as a table.

Decides which state may follow which, whether calls are accepted and what the exit code is. Must never know gRPC, HTTP,
signals or the engine: they listen. Pure: no clock, no IO.

                             STALLED
                              ▲   │
                              │   ▼
    STARTING ──▶ WARMING ──▶ SERVING ──▶ DRAINING ──▶ STOPPED
        │           │           │            │
        └───────────┴───────────┴────────────┴──────▶ FAILED

A stop that arrives before SERVING goes straight to DRAINING: there is nothing to drain, and the exit is clean. STALLED
may go wherever SERVING may, and back.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

from embedserve.errors import InvariantBroken

__all__ = ["ExitCode", "Lifecycle", "State"]


class State(Enum):
    """Where the process is in its life."""

    STARTING = "starting"
    """Settings are read; the port is bound or about to be."""
    WARMING = "warming"
    """The model is loading and its first passes are run."""
    SERVING = "serving"
    STALLED = "stalled"
    """The device is silent for longer than a pass may take: nothing new is accepted until it answers."""
    DRAINING = "draining"
    """Nothing new is accepted; what was accepted goes on."""
    STOPPED = "stopped"
    FAILED = "failed"


class ExitCode:
    """What the process tells its supervisor."""

    OK: Final = 0
    START_FAILED: Final = 1
    BAD_CONFIG: Final = 2
    GRACE_EXCEEDED: Final = 3
    """Drained, but calls were cut off because the grace was too short."""
    BROKEN: Final = 70
    """A broken invariant or a dead worker (EX_SOFTWARE of sysexits.h)."""


_NEXT: Final[dict[State, frozenset[State]]] = {
    State.STARTING: frozenset({State.WARMING, State.DRAINING, State.FAILED}),
    State.WARMING: frozenset({State.SERVING, State.DRAINING, State.FAILED}),
    State.SERVING: frozenset({State.STALLED, State.DRAINING, State.FAILED}),
    State.STALLED: frozenset({State.SERVING, State.DRAINING, State.FAILED}),
    State.DRAINING: frozenset({State.STOPPED, State.FAILED}),
    State.STOPPED: frozenset(),
    State.FAILED: frozenset(),
}


class Lifecycle:
    """One life. Listeners are called in the order in which they were added, with the new state."""

    def __init__(self) -> None:
        """Begin in STARTING."""
        self._state = State.STARTING
        self._listeners: list[Callable[[State], None]] = []
        self._was_serving = False

    @property
    def state(self) -> State:
        """Where the process is."""
        return self._state

    @property
    def accepting(self) -> bool:
        """Whether a call that arrives now may enter."""
        return self._state is State.SERVING

    @property
    def alive(self) -> bool:
        """Whether a restart would *not* help: false only once the process has failed."""
        return self._state is not State.FAILED

    @property
    def exit_code(self) -> int:
        """What a process that ends in this state returns: a failure before SERVING is a failed start."""
        if self._state is State.FAILED:
            return ExitCode.BROKEN if self._was_serving else ExitCode.START_FAILED
        return ExitCode.OK

    def listen(self, listener: Callable[[State], None]) -> None:
        """Call ``listener`` after each change."""
        self._listeners.append(listener)

    def to(self, state: State) -> None:
        """Change the state. Raises ``InvariantBroken`` on a step that the table does not have, and changes nothing."""
        if state not in _NEXT[self._state]:
            raise InvariantBroken(f"the lifecycle has no step from {self._state.value} to {state.value}")
        self._state = state
        self._was_serving = self._was_serving or state is State.SERVING
        for listener in self._listeners:
            listener(state)
