"""The engine processes as one front end has them: which takes a call, and which cannot.

Decides what each engine is told to do and when none of them can do anything. Must never know texts, tokenizers or
gRPC. Each engine has its own memory here, its own calls, and its own scheduler there: what one refuses is refused, and
what one has lost is lost. No other is asked, since that would cost the most when all are at their limit, and a call
that ends an engine would end the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from embedserve.engine.load import LoadReport, add_loads
from embedserve.engine.watchdog import StallLimits
from embedserve.errors import EngineFailed, StartupError
from embedserve.frontends import frames
from embedserve.frontends.calls import RemoteCalls
from embedserve.frontends.host import Ends
from embedserve.frontends.marks import Traces
from embedserve.frontends.memory import SharedMemory
from embedserve.frontends.routing import Standing, choose
from embedserve.frontends.slots import SlotAllocator
from embedserve.frontends.watch import EngineWatch
from embedserve.model.backend import ModelIdentity

__all__ = ["ALONE", "EnginePeer", "EngineSide", "Engines", "Place"]

OVERDUE_NS: Final = 250_000_000
"""An engine process that has work tells its load every 50 ms: after five times of silence others are asked first."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which of several front ends this is."""

    number: int = 0
    front_ends: int = 1


ALONE: Final = Place()
"""One front end, or a test."""


class EngineSide(Protocol):
    """Who is told what engines as a whole do. No method may raise."""

    def ask(self, engine: EnginePeer, kind: int, question: int, body: bytes) -> None:
        """An engine process wants to know something of this process."""

    def silent(self, engine: EnginePeer, age_ns: int) -> None:
        """It gets nothing new until it is heard again; ``none_left`` says whether any does."""

    def back(self, engine: EnginePeer, lasted_ns: int) -> None:
        """It is heard again."""

    def lost(self, engine: EnginePeer, why: str) -> None:
        """Nothing more will come of it; its calls have been told."""


class EnginePeer:
    """One of them: its process, the memory that is shared with it, and the calls that are there."""

    def __init__(self, ends: Ends, watch: EngineWatch, memory_bytes: int, traces: Traces) -> None:
        """``ends`` are this process's own."""
        self.name = ends.name
        self.watch = watch
        assert ends.memory is not None
        self.memory = SharedMemory(ends.memory)
        self.slots = SlotAllocator(memory_bytes)
        self.calls = RemoteCalls(self.send, self.memory, self.slots, traces)
        self.ours = 0
        """Tokens of this front end that are with it, or on their way."""
        self.stalled_since = 0
        self._ours_told = 0
        self._unanswered_since = 0
        """When it was sent something after which it has said nothing; 0 where it has."""

    def send(self, kind: int, call_id: int, body: bytes = b"") -> None:
        """Send a frame; nothing once it has gone."""
        if self._unanswered_since <= self.watch.heard_ns:
            self._unanswered_since = time.monotonic_ns()
        self.watch.send(kind, call_id, body)

    def told(self) -> None:
        """Its load is what it says, with what was sent until now."""
        self._ours_told = self.ours

    @property
    def standing(self) -> Standing:
        """As ``routing`` wants it."""
        load, heard = self.watch.told, self.watch.heard_ns
        waits = self._unanswered_since > heard
        return Standing(
            usable=self.watch.usable,
            late=waits and time.monotonic_ns() - self._unanswered_since > OVERDUE_NS,
            reported_tokens=load.queued_tokens + load.running_tokens,
            tokens_per_second=load.service_rate_tokens_per_second,
            ours=self.ours,
            ours_reported=self._ours_told,
        )


class Engines:
    """All of them. Lives on one event loop."""

    def __init__(
        self,
        ends: Sequence[Ends],
        *,
        memory_bytes: int,
        stall: StallLimits,
        traces: Traces,
        side: EngineSide,
        place: Place,
    ) -> None:
        """``memory_bytes`` is the memory of each."""
        self._side = side
        self._place = place
        # Of several the supervisor ends the one that hangs: who is gone and why is then one process's word.
        alone = len(ends) == 1
        watches = [EngineWatch(one.name, one.link, stall, self, gives_up=alone) for one in ends]
        self.all = tuple(EnginePeer(one, watch, memory_bytes, traces) for one, watch in zip(ends, watches, strict=True))
        self._by_watch = {id(one.watch): one for one in self.all}

    async def start(self) -> ModelIdentity:
        """Wait until all are ready: what they serve, on all their devices. Raises ``StartupError``."""
        identities = await asyncio.gather(*(one.watch.start() for one in self.all))
        first = identities[0]
        for one, identity in zip(self.all, identities, strict=True):
            if (wrong := _difference(first, identity)) is not None:
                raise StartupError(f"engines must serve the same: {wrong} of {self.all[0].name} and {one.name} differ")
        return replace(first, device=",".join(identity.device for identity in identities))

    def stop(self) -> None:
        """Leave all of them."""
        for one in self.all:
            one.watch.stop()

    def choose(self, tokens: int) -> EnginePeer | None:
        """Who takes a call of so many tokens; ``None`` where nobody can."""
        if len(self.all) == 1:
            return self.all[0] if self.all[0].watch.usable else None
        place = self._place
        at = choose([one.standing for one in self.all], tokens, front_ends=place.front_ends, home=place.number)
        return None if at is None else self.all[at]

    @property
    def usable(self) -> bool:
        """Whether any takes calls."""
        return any(one.watch.usable for one in self.all)

    @property
    def stalled(self) -> bool:
        """Whether none takes calls, and one of them may again."""
        return not self.usable and any(one.watch.stalled_ns and one.watch.failure is None for one in self.all)

    @property
    def failure(self) -> str | None:
        """Why nothing will run any more; ``None`` while one of them is left."""
        if any(one.watch.failure is None for one in self.all):
            return None
        return self.all[0].watch.failure

    @property
    def silent(self) -> dict[str, bool]:
        """Each engine, and whether it gets nothing new although it was ready once."""
        return {one.name: one.watch.identity is not None and not one.watch.usable for one in self.all}

    @property
    def memory_used(self) -> int:
        """Bytes that calls hold."""
        return sum(one.slots.used for one in self.all)

    def load(self) -> LoadReport:
        """Of all together."""
        return add_loads([one.watch.load for one in self.all])

    # ------------------------------------------------------------------------------------------- as their ``Watcher``

    def take(self, watch: EngineWatch, kind: int, call_id: int, body: bytes) -> None:
        """A frame of one of them."""
        engine = self._by_watch[id(watch)]
        if kind in (frames.SCRAPE, frames.RECALL):
            self._side.ask(engine, kind, call_id, body)
        else:
            engine.calls.take(kind, call_id, body)

    def see(self, watch: EngineWatch) -> None:
        """One of them has told its load, or has not."""
        engine = self._by_watch[id(watch)]
        engine.told()
        now = time.monotonic_ns()
        if watch.stalled_ns and not engine.stalled_since:
            engine.stalled_since = now - watch.stalled_ns
            self._side.silent(engine, watch.stalled_ns)
        elif engine.stalled_since and not watch.stalled_ns:
            lasted_ns, engine.stalled_since = now - engine.stalled_since, 0
            self._side.back(engine, lasted_ns)

    def lose(self, watch: EngineWatch) -> None:
        """One of them has gone: who waits for it is told, and nobody else."""
        engine, why = self._by_watch[id(watch)], watch.failure or ""
        self._side.lost(engine, why)
        engine.calls.fail(EngineFailed(why))


def _difference(one: ModelIdentity, other: ModelIdentity) -> str | None:
    """The first fact in which they differ, but for the device."""
    for name in ModelIdentity.__dataclass_fields__:
        if name != "device" and getattr(one, name) != getattr(other, name):
            return name
    return None
