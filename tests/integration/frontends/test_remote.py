"""A front end's engine and the engine's host over one socket pair, on one event loop, around a fake model."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from opentelemetry.trace import SpanContext, TraceFlags

from embedserve.config import load_config
from embedserve.engine.call import Call
from embedserve.engine.engine import Engine
from embedserve.engine.observer import SilentObserver
from embedserve.engine.stages import Stages
from embedserve.engine.stream import piece_items
from embedserve.errors import DeadlineExpired, EngineFailed, InvalidRequest, ItemFailed, NotServing, Overloaded
from embedserve.frontends import frames
from embedserve.frontends.host import Ends, EngineHost
from embedserve.frontends.marks import NoTraces
from embedserve.frontends.memory import create_memory
from embedserve.frontends.remote import RemoteEngine, RemoteSettings
from embedserve.model.tokenizer import Truncation
from embedserve.scheduling.item import Rejection
from embedserve.telemetry.handles import SpanHandles
from embedserve.testing import FaultPlan, FaultyBackend, fake_checkpoint, tiny_tokenizer
from embedserve.testing.server import TEST_SETTINGS
from embedserve.wiring import build_engine, stall_limits, tokenizer_settings

MEMORY = 1 << 20
POISON = int(tiny_tokenizer().encode(["poison"], truncation=Truncation.NONE).ids[1])


@dataclass
class Told(SilentObserver):
    """What a front end counts itself."""

    rejections: list[Rejection] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    tokenised_texts: int = 0

    def tokenized(self, texts, tokens, waited_ns, elapsed_ns):
        self.tokenised_texts += texts

    def rejected(self, rejection, *, stage):
        self.rejections.append(rejection)

    def request_finished(self, stages, *, verdict):
        self.finished.append(verdict)


@dataclass
class Pair:
    """Both ends."""

    remote: RemoteEngine
    engine: Engine
    backend: FaultyBackend
    told: Told
    fatal: list[str]
    host: EngineHost

    @property
    def slots_used(self) -> int:
        return self.remote.memory_used

    async def settled(self) -> None:
        """Until nothing is on its way any more."""
        await until(lambda: not self.engine.requests and not self.slots_used)


async def until(condition) -> None:
    """Turn after turn of the loop."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nobody would set an event
            await asyncio.sleep(0)


@asynccontextmanager
async def pair(memory: int = MEMORY, observer=None, traces=None, **settings: str) -> AsyncIterator[Pair]:
    backend = FaultyBackend(FaultPlan(raise_on_id=POISON))
    config = load_config({**TEST_SETTINGS, **settings}, {}, on_this_machine=False).config
    checkpoint = fake_checkpoint(backend.identity)
    fatal: list[str] = []
    engine = build_engine(
        config, checkpoint, observer or SilentObserver(), fatal.append, make_backend=lambda _checkpoint: lambda: backend
    )
    shared = create_memory(memory)
    ours, theirs = socket.socketpair()
    told = Told()
    remote = RemoteEngine(
        [Ends("engine", ours.detach(), os.dup(shared))],
        tokenizer=checkpoint.tokenizer(),
        settings=RemoteSettings(
            tokenizer_settings(config),
            100,
            piece_items(config.server.stream_window_items),
            memory,
            stall_limits(config),
        ),
        observer=told,
        traces=traces or NoTraces(),
        on_fatal=fatal.append,
    )
    host = EngineHost(
        engine,
        traces or NoTraces(),
        [Ends("frontend-0", theirs.detach(), shared)],
        on_fatal=fatal.append,
        stall_ns=stall_limits(config).stall_ns,
    )
    await engine.start()
    host.open()
    await remote.start()
    try:
        yield Pair(remote, engine, backend, told, fatal, host)
    finally:
        backend.plan.gate.set()
        await remote.stop(1)
        await engine.stop(5)


def ask(*texts: str, **options) -> Call:
    return Call(Stages(time.monotonic_ns()), texts=texts, **options)


async def drain(remote: RemoteEngine, call: Call) -> tuple[dict[int, np.ndarray], dict[int, Exception]]:
    vectors, refused = {}, {}
    async for portion in remote.embed_stream(call):
        vectors |= dict(zip(portion.indexes, portion.vectors, strict=True)) if portion.indexes else {}
        refused |= {one.index: one.error for one in portion.refused}
    return vectors, refused


class TestEmbed:
    async def test_the_answer_is_what_the_engine_would_give_in_this_process(self):
        """Vectors to the bit, counts, options and marks; and no slot is held afterwards."""
        async with pair() as both:
            for options in ({}, {"dimensions": 4}, {"normalize": False}, {"truncation": Truncation.END}):
                remote, here = ask("hello world", "hello", **options), ask("hello world", "hello", **options)
                got, expected = await both.remote.embed(remote), await both.engine.embed(here)
                assert got.vectors.tobytes() == expected.vectors.tobytes()
                assert got._replace(vectors=None) == expected._replace(vectors=None)
                marks = remote.stages
                order = [
                    marks.arrived_ns, marks.admitted_ns, marks.tokenized_ns, marks.queued_ns, marks.dequeued_ns,
                    marks.assembled_ns, marks.computed_ns,
                ]  # fmt: skip
                assert order == sorted(order)
                assert order[0] > 0
                assert (marks.texts, marks.tokens, len(marks.rides)) == (2, here.stages.tokens, 1)
            assert both.slots_used == 0

    async def test_token_ids_cross_as_they_are(self):
        async with pair() as both:
            tokens = tiny_tokenizer().encode(["hello world", "hello"], truncation=Truncation.NONE)
            got = await both.remote.embed(Call(Stages(time.monotonic_ns()), tokens=tokens))
            expected = await both.engine.embed(ask("hello world", "hello"))
            assert got.vectors.tobytes() == expected.vectors.tobytes()

    async def test_failures_are_the_engines(self):
        async with pair() as both:
            with pytest.raises(InvalidRequest) as wrong:
                await both.remote.embed(ask("hello", "hello " * 500))
            assert wrong.value.violations[0].field == "texts[1]"
            with pytest.raises(ItemFailed):
                await both.remote.embed(ask("poison"))
            with pytest.raises(DeadlineExpired):
                await both.remote.embed(ask("hello", deadline_ns=time.monotonic_ns() - 1))
            both.engine.drain()
            with pytest.raises(NotServing):
                await both.remote.embed(ask("hello"))
            await both.settled()
            assert both.told.finished == []  # the engine's observer was told of each

    async def test_a_memory_that_is_full_refuses_with_a_hint_and_one_that_is_too_small_without(self):
        async with pair(memory=8192) as both:
            both.backend.plan.gate.clear()
            first = asyncio.ensure_future(both.remote.embed(ask("hello")))
            second = asyncio.ensure_future(both.remote.embed(ask("hello")))
            await asyncio.sleep(0)
            assert both.slots_used == 8192
            with pytest.raises(Overloaded) as full:
                await both.remote.embed(ask("hello"))
            assert (full.value.reason, full.value.retry_after_ms) == ("FRONTEND_MEMORY_FULL", 100)
            with pytest.raises(Overloaded) as large:
                await both.remote.embed(ask(*["hello"] * 300))
            assert large.value.retry_after_ms is None
            assert [r.reason for r in both.told.rejections] == ["FRONTEND_MEMORY_FULL"] * 2
            assert both.told.finished == ["rejected"] * 2
            both.backend.plan.gate.set()
            await asyncio.gather(first, second)
            assert both.slots_used == 0

    async def test_a_slot_is_not_given_to_another_before_the_engine_has_let_go(self):
        """The vectors of a call that was cancelled during its pass must not land in another call's slot."""
        async with pair(memory=4096) as both:
            both.backend.plan.gate.clear()
            left = asyncio.ensure_future(both.remote.embed(ask("hello")))
            await until(lambda: both.engine.requests)
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
            assert both.slots_used == 4096
            both.backend.plan.gate.set()
            await both.settled()


class TestStreams:
    async def test_every_index_comes_once_with_the_vector_of_a_whole_request(self):
        async with pair(**{"server.stream_window_items": "8"}) as both:
            texts = ["hello world", "hello", "world hello world"] * 20
            vectors, refused = await drain(both.remote, ask(*texts))
            whole = await both.engine.embed(ask(*texts))
            assert sorted(vectors) == list(range(60))
            assert not refused
            assert all((vectors[i] == whole.vectors[i]).all() for i in vectors)
            await both.settled()

    async def test_bad_texts_fail_alone(self):
        async with pair(**{"server.stream_window_items": "8"}) as both:
            texts = ["hello"] * 30
            texts[3], texts[20] = "poison", "hello " * 500
            vectors, refused = await drain(both.remote, ask(*texts))
            assert sorted([*vectors, *refused]) == list(range(30))
            assert {i: type(error) for i, error in refused.items()} == {3: ItemFailed, 20: InvalidRequest}

    async def test_a_reader_that_stops_stops_its_own_work(self):
        """No more texts are embedded than one window beyond what was read."""
        async with pair(**{"server.stream_window_items": "8"}) as both:
            portions = both.remote.embed_stream(ask(*["hello"] * 100))
            first = await anext(portions)
            before = -1
            while before != both.told.tokenised_texts:
                before = both.told.tokenised_texts
                for _ in range(50):
                    await both.engine.count_tokens(["hello"])  # a turn of a thread and of the loop
            assert both.told.tokenised_texts <= len(first.indexes) + 8 + 2
            await portions.aclose()
            await both.settled()


class TestLeaving:
    @pytest.mark.parametrize("seed", range(3))
    async def test_whoever_leaves_whenever_no_slot_is_lost(self, seed):
        chance = random.Random(seed)
        async with pair(**{"server.stream_window_items": "8"}) as both:

            async def one() -> None:
                texts = ["hello"] * chance.randrange(1, 30)
                work = both.remote.embed(ask(*texts)) if chance.random() < 0.5 else drain(both.remote, ask(*texts))
                task = asyncio.ensure_future(work)
                for _ in range(chance.randrange(40)):
                    await asyncio.sleep(0)
                if chance.random() < 0.6:
                    task.cancel()
                await asyncio.wait({task})
                assert task.cancelled() or task.exception() is None

            await asyncio.gather(*(one() for _ in range(60)))
            await both.settled()

    async def test_when_the_engine_breaks_everybody_is_told_and_the_process_hears_why(self):
        async with pair() as both:
            both.backend.plan.gate.clear()
            calls = [asyncio.ensure_future(both.remote.embed(ask("hello"))) for _ in range(3)]
            stream = asyncio.ensure_future(drain(both.remote, ask(*["hello"] * 9)))
            await until(lambda: both.engine.requests == 4)
            both.host.tell_broken("the device is gone")
            outcomes = await asyncio.gather(*calls, stream, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [EngineFailed] * 4
            assert both.fatal == ["the device is gone"]
            assert both.remote.load().state == "not_serving"
            with pytest.raises(EngineFailed):
                await both.remote.embed(ask("hello"))

    async def test_when_the_engines_event_loop_ends_under_its_calls_each_is_answered(self):
        """Their tasks are cancelled, one of them before its first step: a FAILED that says nothing is an answer."""
        async with pair() as both:
            both.backend.plan.gate.clear()
            calls = [asyncio.ensure_future(both.remote.embed(ask("hello"))) for _ in range(3)]
            calls.append(asyncio.ensure_future(drain(both.remote, ask(*["hello"] * 9))))
            await until(lambda: both.engine.requests == 4)
            (there,) = both.host._front_ends
            for task in there._tasks.values():
                task.cancel()
            async with asyncio.timeout(5):
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [EngineFailed] * 4
            both.backend.plan.gate.set()
            await both.settled()

    @pytest.mark.parametrize("body", [b"", b"\x01", bytes(200), b'{"type":"Unheard"}'])
    @pytest.mark.parametrize("kind", ["whole", "stream", "question"])
    async def test_a_failure_that_cannot_be_read_is_an_answer(self, body, kind):
        """And the front end serves on."""
        async with pair() as both:
            both.backend.plan.gate.clear()
            (there,) = both.host._front_ends
            there._judge = lambda *_: None  # a question stays unanswered
            call = ask("hello" if kind == "whole" else "hello " * 3000)
            work = drain(both.remote, ask(*["hello"] * 9)) if kind == "stream" else both.remote.embed(call)
            asked = asyncio.ensure_future(work)
            calls = both.remote.engines.all[0].calls
            known = {"whole": calls._waiting, "stream": calls._streams, "question": calls._asked}[kind]
            await until(lambda: known)
            await until(lambda: kind == "question" or both.engine.requests)
            (call_id,) = known
            there.send(frames.FAILED, call_id, body)
            async with asyncio.timeout(5):
                with pytest.raises(EngineFailed):
                    await asked
            assert both.fatal == []

    async def test_an_answer_that_cannot_be_read_ends_the_link_and_every_call_with_it(self):
        async with pair() as both:
            both.backend.plan.gate.clear()
            calls = [asyncio.ensure_future(both.remote.embed(ask("hello"))) for _ in range(3)]
            await until(lambda: both.engine.requests == 3)
            (there,) = both.host._front_ends
            there.send(frames.DONE, next(iter(both.remote.engines.all[0].calls._waiting)), b"\x01")
            async with asyncio.timeout(5):
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [EngineFailed] * 3
            assert both.fatal == ["the engine process has gone"]

    async def test_an_engine_that_is_deserted_takes_nothing_new_and_waits_for_its_front_ends(self):
        """What it has goes on until they are gone, and no longer than it is told."""
        async with pair() as both:
            both.backend.plan.gate.clear()
            call = asyncio.ensure_future(both.remote.embed(ask("hello")))
            await until(lambda: both.engine.requests == 1)
            await both.host.desert(0.01)
            deserted = asyncio.ensure_future(both.host.desert(10))
            with pytest.raises(NotServing):
                await both.remote.embed(ask("hello"))
            assert not deserted.done()
            both.backend.plan.gate.set()
            assert (await call).tokens > 0
            await both.remote.stop(1)
            async with asyncio.timeout(5):
                await deserted

    async def test_a_front_end_that_goes_takes_its_work_along(self):
        """What it had in the queue is cancelled, streams too; the engine serves on."""
        async with pair() as both:
            both.backend.plan.gate.clear()
            calls = [asyncio.ensure_future(both.remote.embed(ask("hello"))) for _ in range(3)]
            calls.append(asyncio.ensure_future(drain(both.remote, ask(*["hello"] * 9))))
            await until(lambda: both.engine.requests == 4)
            await both.remote.stop(1)
            await until(lambda: both.engine.requests == 0)
            both.backend.plan.gate.set()
            assert (await both.engine.embed(ask("hello"))).tokens > 0
            assert both.fatal == []
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)


class TestTraces:
    async def test_a_batch_that_a_sampled_call_rode_in_can_be_linked_to(self):
        """Its handle is the engine process's, and the engine's observer saw the call's."""

        seen: list[object] = []

        class Tracing(SilentObserver):
            def batch_dispatched(self, batch_id):
                return batch_trace

            def batch_finished(self, record):
                seen.extend(member.trace for member in record.members)

        call_trace, batch_trace = (SpanContext(n, n + 1, is_remote=False, trace_flags=TraceFlags(1)) for n in (5, 7))
        async with pair(observer=Tracing(), traces=SpanHandles()) as both:
            call = ask("hello", trace=call_trace)
            await both.remote.embed(call)
            assert [boarding.trace for boarding in call.stages.boardings] == [batch_trace]
            await until(lambda: call_trace in seen)
