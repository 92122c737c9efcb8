"""Which part of the service a process is.

Decides nothing: it says what ``app.App`` leaves out or takes from elsewhere where the service is several processes
(``frontends``). Must never know which processes there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from embedserve.wiring import EngineMaker

__all__ = ["WHOLE", "Part", "Render"]

Render = Callable[[str], tuple[str, bytes]] | None
"""``(accept_header) -> (content_type, body)``, in any thread; ``None`` where metrics are off."""


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


WHOLE = Part()
"""One process does everything."""
