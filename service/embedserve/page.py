"""What a process does for ``/statusz``: shows it, tells the one that does what it remembers, or neither.

Decides which of them, from the settings and the part of the service that the process is. Must never know how a snapshot
is put together or how memories cross. A part of the composition root, as ``wiring.py`` is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from embedserve.api.observer import CallObserver
from embedserve.config import Config
from embedserve.engine.engine import Engine
from embedserve.engine.observer import EngineObserver
from embedserve.engine.surface import EngineSurface
from embedserve.lifecycle import Lifecycle
from embedserve.model.checkpoint import Checkpoint
from embedserve.model.cores import core_count
from embedserve.part import Part
from embedserve.snapshot import Snapshot
from embedserve.status import Status
from embedserve.telemetry.memory import pack_memory
from embedserve.telemetry.recent import Recent
from embedserve.telemetry.watching import RecentCalls, RecentEngine

__all__ = ["Page"]


class Page:
    """The page's part of one process."""

    def __init__(
        self,
        config: Config,
        checkpoint: Checkpoint,
        lifecycle: Lifecycle,
        part: Part,
        addresses: Callable[[], tuple[str, ...]],
    ) -> None:
        """Begin to remember; ``addresses`` says where this process listens."""
        self._part = part
        self._status: Status | None = None
        self._recent: Recent | None = None
        if not (config.operations.enabled and config.operations.statusz):
            return
        if part.has_device:
            shown = addresses if part.listens else lambda: config.server.addresses
            self._status = Status(config, checkpoint, lifecycle, shown, part.recall)
        elif part.remember is not None:
            self._recent = Recent(config.tokenizer.thread_count(core_count()))

    def watch(self, calls: CallObserver, engine: EngineObserver) -> tuple[CallObserver, EngineObserver]:
        """Observers that note what happens and pass all of it on to these; these where nobody asks."""
        if self._status is not None:
            return self._status.watch(calls, engine)
        if self._recent is not None:
            return RecentCalls(self._recent, calls), RecentEngine(self._recent, engine)
        return calls, engine

    def attach(self, engine: EngineSurface) -> None:
        """Ask ``engine`` from now on."""
        recent = self._recent
        if self._status is not None and isinstance(engine, Engine):
            self._status.attach(engine)
        elif recent is not None and self._part.remember is not None:
            self._part.remember(lambda: pack_memory(recent, engine.tokenizer_use.pending))

    @property
    def snapshot(self) -> Callable[[], Awaitable[Snapshot]] | None:
        """What the operations port shows; ``None`` where there is no page."""
        return None if self._status is None else self._status.take
