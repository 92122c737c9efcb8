"""One front end before two engines, each over a socket pair and a memory of its own, on one event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from embedserve.config import load_config
from embedserve.engine.engine import Engine
from embedserve.engine.observer import SilentObserver
from embedserve.engine.stream import piece_items
from embedserve.errors import EngineFailed, EngineStalled, Overloaded, StartupError
from embedserve.frontends import routing
from embedserve.frontends.calls import RemoteCalls
from embedserve.frontends.engines import Place
from embedserve.frontends.host import Ends, EngineHost
from embedserve.frontends.marks import NoTraces
from embedserve.frontends.memory import create_memory
from embedserve.frontends.remote import RemoteEngine, RemoteSettings
from embedserve.testing import FaultPlan, FaultyBackend, fake_checkpoint
from embedserve.testing.server import TEST_SETTINGS
from embedserve.wiring import build_engine, stall_limits, tokenizer_settings
from tests.integration.frontends.test_remote import MEMORY, POISON, Told, ask, drain, until


@dataclass
class Side:
    """One engine process."""

    engine: Engine
    host: EngineHost
    backend: FaultyBackend
    silent_ns: int = 0


@dataclass
class Several:
    """The front end and what is behind it."""

    remote: RemoteEngine
    sides: list[Side]
    told: Told
    events: list[tuple[str, object]] = field(default_factory=list)
    """What the callbacks were told, in order: fatal, stalled, recovered, and each engine's."""

    @property
    def requests(self) -> list[int]:
        return [side.engine.requests for side in self.sides]

    def gate(self, *, shut: bool) -> None:
        for side in self.sides:
            (side.backend.plan.gate.clear if shut else side.backend.plan.gate.set)()

    def tell_silent(self, number: int, ns: int) -> None:
        self.sides[number].silent_ns = ns
        self.sides[number].host.tell_load()

    async def settled(self) -> None:
        await until(lambda: not any(self.requests) and not self.remote.memory_used)
        assert [engine.ours for engine in self.remote.engines.all] == [0, 0]


@asynccontextmanager
async def several(
    monkeypatch: pytest.MonkeyPatch, *, change: Callable[[FaultyBackend], None] = lambda _last: None, **settings: str
) -> AsyncIterator[Several]:
    """``change`` is done to the backend of the last engine."""
    config = load_config({**TEST_SETTINGS, **settings}, {}, on_this_machine=False).config
    backends = [FaultyBackend(FaultPlan(raise_on_id=POISON)) for _ in range(2)]
    change(backends[-1])
    checkpoint = fake_checkpoint(backends[0].identity)
    sides: list[Side] = []
    ends: list[Ends] = []
    for number, backend in enumerate(backends):
        ours, theirs = socket.socketpair()
        memory = create_memory(MEMORY)
        engine = build_engine(
            config, checkpoint, SilentObserver(), lambda _why: None, make_backend=lambda _c, b=backend: lambda: b
        )
        far = [Ends("frontend-0", theirs.detach(), os.dup(memory))]
        host = EngineHost(engine, NoTraces(), far, on_fatal=lambda _why: None, stall_ns=stall_limits(config).stall_ns)
        sides.append(Side(engine, host, backend))
        ends.append(Ends(f"engine-{number}", ours.detach(), memory))
    monkeypatch.setattr(routing, "ALIKE_S", 0.0)  # so that each call counts, however small
    by_host = {id(side.host): side for side in sides}
    monkeypatch.setattr(EngineHost, "_stalled_ns", property(lambda host: by_host[id(host)].silent_ns))
    told, events = Told(), []
    remote = RemoteEngine(
        ends,
        tokenizer=checkpoint.tokenizer(),
        settings=RemoteSettings(
            tokenizer_settings(config), 100, piece_items(config.server.stream_window_items), MEMORY,
            stall_limits(config), Place(0, 2),
        ),
        observer=told,
        traces=NoTraces(),
        on_fatal=lambda why: events.append(("fatal", why)),
        on_stall=lambda _ns: events.append(("stalled", None)),
        on_recovery=lambda _ns: events.append(("recovered", None)),
        on_engine=lambda event, facts: events.append((event, facts["engine"])),
    )  # fmt: skip
    for side in sides:
        await side.engine.start()
        side.host.open()
    try:
        await remote.start()
        yield Several(remote, sides, told, events)
    finally:
        for backend in backends:
            backend.plan.gate.set()
        await remote.stop(1)
        for side in sides:
            await side.engine.stop(5)


class TestSharing:
    async def test_calls_are_dealt_over_the_engines_and_are_answered_alike(self, monkeypatch):
        async with several(monkeypatch) as both:
            both.gate(shut=True)
            calls = [asyncio.ensure_future(both.remote.embed(ask("hello"))) for _ in range(8)]
            await until(lambda: both.requests == [4, 4])
            both.gate(shut=False)
            answers = [await call for call in calls]
            assert len({answer.vectors.tobytes() for answer in answers}) == 1
            await both.settled()

    async def test_a_call_goes_where_less_is_to_be_done(self, monkeypatch):
        """One engine has a large call: the next small ones go to the other until it has as much."""
        async with several(monkeypatch) as both:
            both.gate(shut=True)
            large = asyncio.ensure_future(both.remote.embed(ask(*["hello world"] * 40)))
            await until(lambda: sum(both.requests) == 1)
            loaded = both.requests.index(1)
            small = [asyncio.ensure_future(both.remote.embed(ask("hello"))) for _ in range(6)]
            await until(lambda: sum(both.requests) == 7)
            assert both.requests[loaded] == 1
            both.gate(shut=False)
            await asyncio.gather(large, *small)

    async def test_a_long_text_goes_to_the_engine_that_has_judged_it(self, monkeypatch):
        """It is asked before tokenising, and the call is not dealt out a second time."""
        asked: list[tuple[str, object]] = []
        for name in ("ask", "embed"):
            real = getattr(RemoteCalls, name)
            monkeypatch.setattr(
                RemoteCalls, name, lambda self, *a, name=name, real=real: asked.append((name, self)) or real(self, *a)
            )
        async with several(monkeypatch, **{"tokenizer.inline_chars": "10"}) as both:
            both.gate(shut=True)
            calls = [asyncio.ensure_future(both.remote.embed(ask("hello " * 40))) for _ in range(6)]
            await until(lambda: both.requests == [3, 3])
            both.gate(shut=False)
            await asyncio.gather(*calls)
            ours = [{who: [n for n, by in asked if by is who]} for who in {who for _, who in asked}]
            assert [sorted(next(iter(one.values()))) for one in ours] == [["ask"] * 3 + ["embed"] * 3] * 2
            await both.settled()

    async def test_a_refusal_is_the_answer_and_no_other_engine_is_asked(self, monkeypatch):
        """One that is full refuses, and the other is not asked: with all at their limit that would double the cost."""
        small = {"scheduling.max_queue_items": "2", "limits.max_texts": "2", "tokenizer.inline_chars": "10"}
        async with several(monkeypatch, **small) as both:
            both.gate(shut=True)
            calls = [asyncio.ensure_future(both.remote.embed(ask("hello", "hello"))) for _ in range(2)]
            await until(lambda: both.requests == [1, 1])
            judged = []
            for number, side in enumerate(both.sides):
                admit = side.engine.admit
                monkeypatch.setattr(
                    side.engine, "admit", lambda call, number=number, admit=admit: judged.append(number) or admit(call)
                )
            with pytest.raises(Overloaded) as full:
                await both.remote.embed(ask("hello " * 20))
            assert full.value.reason == "QUEUE_FULL"
            assert len(judged) == 1
            both.gate(shut=False)
            await asyncio.gather(*calls)
            await both.settled()

    async def test_a_stream_is_one_engines_from_its_first_piece_to_its_last(self, monkeypatch):
        async with several(monkeypatch, **{"server.stream_window_items": "8"}) as both:
            seen: list[tuple[bool, ...]] = []

            async def read() -> int:
                rows = 0
                async for portion in both.remote.embed_stream(ask(*["hello"] * 50)):
                    rows += len(portion.indexes)
                    seen.append(tuple(count > 0 for count in both.requests))
                return rows

            assert await read() == 50
            assert len({one for one in seen if any(one)}) == 1
            vectors, refused = await drain(both.remote, ask("hello", "poison", "hello"))
            assert (sorted(vectors), sorted(refused)) == ([0, 2], [1])
            await both.settled()

    async def test_every_call_settles_once_whoever_leaves(self, monkeypatch):
        """Calls and streams of all sizes, a third of them cancelled, over both: no slot and no token stays behind."""
        chance = random.Random(7)
        async with several(monkeypatch, **{"server.stream_window_items": "8"}) as both:

            async def one() -> str:
                texts = [chance.choice(["hello", "hello world", "poison"]) for _ in range(chance.randint(1, 20))]
                work = both.remote.embed(ask(*texts)) if chance.random() < 0.5 else drain(both.remote, ask(*texts))
                task = asyncio.ensure_future(work)
                if chance.random() < 0.33:
                    await asyncio.sleep(chance.random() * 0.003)
                    task.cancel()
                (outcome,) = await asyncio.gather(task, return_exceptions=True)
                return type(outcome).__name__

            outcomes = await asyncio.gather(*(one() for _ in range(80)))
            assert set(outcomes) <= {"Embedded", "tuple", "ItemFailed", "CancelledError"}
            await both.settled()

    async def test_the_load_is_that_of_both(self, monkeypatch):
        async with several(monkeypatch) as both:
            assert both.remote.identity.device == "cpu,cpu"
            both.gate(shut=True)
            calls = [asyncio.ensure_future(both.remote.embed(ask("hello"))) for _ in range(6)]
            await until(lambda: both.requests == [3, 3])
            for side in both.sides:
                side.host.tell_load()
            await until(lambda: both.remote.load().queue_depth + both.remote.load().running_items == 6)
            assert both.remote.load().state == "healthy"
            both.gate(shut=False)
            await asyncio.gather(*calls)

    async def test_engines_that_serve_something_else_fail_the_start(self, monkeypatch):
        def other(backend: FaultyBackend) -> None:
            backend._identity = dataclasses.replace(backend.identity, weights_digest="sha256:other")

        with pytest.raises(StartupError, match=r"weights_digest of engine-0 and engine-1 differ"):
            async with several(monkeypatch, change=other):
                raise AssertionError("it has started")


class TestLosses:
    async def test_one_that_is_silent_gets_nothing_new_until_it_is_heard_again(self, monkeypatch):
        """Health is only told when none is left, and when one is back."""
        async with several(monkeypatch) as both:
            both.gate(shut=True)
            both.tell_silent(1, 5)
            await until(lambda: both.events)
            calls = [asyncio.ensure_future(both.remote.embed(ask("hello"))) for _ in range(4)]
            await until(lambda: both.requests == [4, 0])
            assert both.remote.load().state == "degraded"
            assert not both.remote.stalled
            assert both.remote.engines.silent == {"engine-0": False, "engine-1": True}
            both.tell_silent(0, 7)
            await until(lambda: both.remote.stalled)
            with pytest.raises(EngineStalled):
                await both.remote.embed(ask("hello"))
            both.tell_silent(1, 0)
            await until(lambda: not both.remote.stalled)
            calls.append(asyncio.ensure_future(both.remote.embed(ask("hello"))))
            await until(lambda: both.requests == [4, 1])
            both.tell_silent(0, 0)
            await until(lambda: len(both.events) == 6)
            assert both.events == [
                ("engine_silent", "engine-1"), ("engine_silent", "engine-0"), ("stalled", None),
                ("engine_back", "engine-1"), ("recovered", None), ("engine_back", "engine-0"),
            ]  # fmt: skip
            both.gate(shut=False)
            await asyncio.gather(*calls)
            await both.settled()

    async def test_one_that_does_not_answer_is_asked_last_before_it_counts_as_silent(self, monkeypatch):
        """An engine process that has said nothing for a quarter of a second after it was sent something."""
        async with several(monkeypatch) as both:
            peer = both.remote.engines.all[0]
            peer._unanswered_since = time.monotonic_ns() - 300_000_000
            peer.watch.heard_ns = peer._unanswered_since - 1
            assert peer.standing.late
            both.gate(shut=True)
            calls = [asyncio.ensure_future(both.remote.embed(ask("hello"))) for _ in range(3)]
            await until(lambda: sum(both.requests) == 3)
            assert both.requests == [0, 3]
            both.sides[0].host.tell_load()
            await until(lambda: not peer.standing.late)
            both.gate(shut=False)
            await asyncio.gather(*calls)

    async def test_when_one_breaks_its_callers_are_told_and_the_others_are_answered(self, monkeypatch):
        """And once none is left, the process hears why."""
        async with several(monkeypatch) as both:
            both.gate(shut=True)
            calls = [asyncio.ensure_future(both.remote.embed(ask("hello"))) for _ in range(6)]
            stream = asyncio.ensure_future(drain(both.remote, ask(*["hello"] * 9)))
            await until(lambda: sum(both.requests) == 7)
            both.sides[1].host.tell_broken("the device is gone")
            await until(lambda: both.events)
            assert both.events == [("engine_lost", "engine-1")]
            calls += [asyncio.ensure_future(both.remote.embed(ask("hello"))) for _ in range(3)]
            both.sides[0].backend.plan.gate.set()
            outcomes = await asyncio.gather(*calls, stream, return_exceptions=True)
            kinds = [type(outcome).__name__ for outcome in outcomes]
            assert kinds.count("EngineFailed") in (3, 4)
            assert kinds[6:9] == ["Embedded"] * 3
            both.sides[0].host.tell_broken("and so is this one")
            await until(lambda: len(both.events) == 2)
            assert both.events[1] == ("fatal", "and so is this one")
            with pytest.raises(EngineFailed):
                await both.remote.embed(ask("hello"))
