"""One engine process as others see it: what it says of itself, and whether it says anything.

Decides when an engine process counts as silent, as hung and as lost. Must never know calls, policies or what is done
about it. Front ends have one of these for each engine, and so has the supervisor where there are several.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Final, Protocol

import orjson

from embedserve.engine.load import NO_LOAD, LoadReport
from embedserve.engine.watchdog import StallLimits
from embedserve.errors import StartupError
from embedserve.frontends import frames
from embedserve.frontends.link import Link, connect_link
from embedserve.model.backend import ModelIdentity

__all__ = ["EngineWatch", "Watcher"]

LOOKS: Final = 4
"""Times in ``stall_ns`` that the engine process's silence is looked at."""
LATE_NS: Final = 100_000_000
"""A look that comes later than this says that this process was stopped, or its loop was: it proves nothing."""


class Watcher(Protocol):
    """Whoever watches. No method may raise."""

    def take(self, watch: EngineWatch, kind: int, call_id: int, body: bytes) -> None:
        """A frame that is not about the engine as a whole."""

    def see(self, watch: EngineWatch) -> None:
        """Its load is another, or its ``stalled``."""

    def lose(self, watch: EngineWatch) -> None:
        """It has failed, for the reason in ``failure``: nothing more will come. Once, also before it was ready."""


class EngineWatch:
    """One engine process. Lives on one event loop."""

    def __init__(
        self, name: str, descriptor: int, stall: StallLimits, watcher: Watcher, *, gives_up: bool = True
    ) -> None:
        """``descriptor`` is this process's end of the socket pair.

        ``gives_up``: whether one that says nothing for ``hang_ns`` is lost; otherwise somebody else ends it.
        """
        self.name = name
        self.failure: str | None = None
        """Why nothing more will come of it."""
        self.hung = False
        """Whether it has failed because it said nothing for too long: its process may be there still."""
        self.stalled_ns = 0
        """How long the device, or the process, has been silent, as was noticed or said last; 0 where it is not."""
        self.heard_ns = 0
        self._descriptor = descriptor
        self._stall = stall
        self._watcher = watcher
        self._gives_up = gives_up
        self._link: Link | None = None
        self._identity: ModelIdentity | None = None
        self._welcome: asyncio.Future[ModelIdentity] | None = None
        self._load: LoadReport | None = None
        self._started_ns = 0
        self._look: asyncio.TimerHandle | None = None

    async def start(self) -> ModelIdentity:
        """Wait until the engine process is ready. Raises ``StartupError`` when it ends before that."""
        self._welcome = asyncio.get_running_loop().create_future()
        self._link = await connect_link(self._descriptor, self._take, self._gone)
        return await self._welcome

    def stop(self) -> None:
        """Look no more, and leave it."""
        if self._look is not None:
            self._look.cancel()
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def send(self, kind: int, call_id: int, body: bytes = b"") -> None:
        """Send a frame; nothing once the engine process has gone."""
        if self._link is not None:
            self._link.send(kind, call_id, body)

    @property
    def identity(self) -> ModelIdentity | None:
        """The model that it serves; ``None`` until it is ready."""
        return self._identity

    @property
    def usable(self) -> bool:
        """Whether it is ready, there, and not silent."""
        return self._identity is not None and self.failure is None and not self.stalled_ns

    @property
    def told(self) -> LoadReport:
        """The load, word for word as it was told last."""
        return self._load or NO_LOAD

    @property
    def load(self) -> LoadReport:
        """The load as it was told last, which is at most some 50 ms ago while there is work."""
        if self._load is None:
            return NO_LOAD
        uptime = (time.monotonic_ns() - self._started_ns) // 1_000_000_000
        if not self.usable:
            return replace(self._load, state="not_serving", accepting_requests=False, uptime_seconds=uptime)
        return replace(self._load, uptime_seconds=uptime)

    def fail(self, why: str) -> None:
        """Expect nothing more of it."""
        if self.failure is not None:
            return
        self.failure = why
        if self._welcome is not None and not self._welcome.done():
            self._welcome.set_exception(StartupError(f"{why} before its model was ready"))
        self._watcher.lose(self)

    def _gone(self) -> None:
        """The engine process has gone, or we have."""
        if self._link is not None:
            self.fail("the engine process has gone")

    def _take(self, kind: int, call_id: int, body: bytes) -> None:
        self.heard_ns = time.monotonic_ns()
        if kind == frames.LOAD:
            facts = orjson.loads(body)
            self._load = LoadReport(**facts["load"])
            self.stalled_ns = facts["stalled_ns"]
            self._watcher.see(self)
        elif kind == frames.WELCOME:
            self._be_welcome(orjson.loads(body))
        elif kind == frames.BROKEN:
            self.fail(body.decode())
        else:
            self._watcher.take(self, kind, call_id, body)

    def _be_welcome(self, facts: dict[str, dict[str, object]]) -> None:
        told = facts["identity"]
        prompts = tuple(tuple(prompt) for prompt in told["prompts"])  # type: ignore[attr-defined]
        self._identity = ModelIdentity(**{**told, "prompts": prompts})  # type: ignore[arg-type]
        self._load = LoadReport(**facts["load"])  # type: ignore[arg-type]
        self._started_ns = time.monotonic_ns()
        self._arm()
        assert self._welcome is not None
        if not self._welcome.done():
            self._welcome.set_result(self._identity)

    def _arm(self) -> None:
        """The engine process tells its load again and again, or it is stopped or stuck."""
        pause_ns = self._stall.stall_ns // LOOKS
        due_ns = time.monotonic_ns() + pause_ns
        self._look = asyncio.get_running_loop().call_later(pause_ns / 1e9, self._look_now, due_ns)

    def _look_now(self, due_ns: int) -> None:
        self._look = None
        if self.failure is not None:
            return
        now = time.monotonic_ns()
        silent_ns = now - self.heard_ns
        if now - due_ns < LATE_NS:
            if silent_ns >= self._stall.hang_ns and self._gives_up:
                self.hung = True
                self.fail(f"the engine process has said nothing for {silent_ns / 1e9:.1f} s (health.hang_ms)")
                return
            if silent_ns >= self._stall.stall_ns and not self.stalled_ns:
                self.stalled_ns = silent_ns  # what it says of its load next ends it
                self._watcher.see(self)
        self._arm()
