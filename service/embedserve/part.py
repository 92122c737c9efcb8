"""Which part of the service a process is.

Decides nothing: it says what ``app.App`` leaves out or takes from elsewhere where the service is several processes
(``frontends``). Must never know which processes there are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from embedserve.snapshot import Snapshot
from embedserve.wiring import EngineMaker

__all__ = ["WHOLE", "Memories", "Part", "Render"]

Render = Callable[[str], tuple[str, bytes]] | None
"""``(accept_header) -> (content_type, body)``, in any thread; ``None`` where metrics are off."""


class Memories(NamedTuple):
    """What front ends remember of their calls."""

    given: Sequence[tuple[str, bytes]]
    """Name, and what ``telemetry.memory.pack_memory`` made."""
    silent: Sequence[str]
    """Who did not answer in time."""


@dataclass(frozen=True)
class Part:
    """Which part of the service a process is; the defaults are all of it."""

    role: str = ""
    make_engine: EngineMaker | None = None
    """``None``: the engine is here."""
    listens: bool = True
    """Whether it takes calls."""
    has_device: bool = True
    """Whether the queue and the device are here, and with them the operations port."""
    metrics: Callable[[Render], Render] = lambda render: render
    """What the operations port shows, of what this process would."""
    show: Callable[[Render, Callable[[], Awaitable[Snapshot]] | None], None] | None = None
    """Is given metrics and page where another process opens the operations port; ``None``: it is here."""
    silent: Callable[[], Mapping[str, bool]] = dict
    """Each process on the other side, and whether it is silent: front ends that did not answer when they were last
    asked, or engine processes that are sent nothing."""
    recall: Callable[[], Awaitable[Memories]] | None = None
    """Asks the front ends what they remember, for the page; ``None`` where calls come here."""
    remember: Callable[[Callable[[], bytes]], None] | None = None
    """Is given what answers such a question here; ``None`` where nobody asks."""


WHOLE = Part()
"""One process does everything."""
