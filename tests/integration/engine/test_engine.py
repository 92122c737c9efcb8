"""The engine, end to end, over fake backends: order, identity, isolation, cancellation, death, drain."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
import time

import numpy as np
import pytest

from embedserve.engine.call import Call, Embedded
from embedserve.engine.stages import Stages
from embedserve.engine.tokenization import TokenizerSettings
from embedserve.errors import (
    DeadlineExpired,
    EngineFailed,
    InvalidRequest,
    ItemFailed,
    NonFiniteOutput,
    NotServing,
    Overloaded,
    StartupError,
)
from embedserve.model.backend import DeviceReport
from embedserve.model.tokenizer import TokenizedTexts, Truncation
from embedserve.scheduling.item import Shape
from embedserve.scheduling.settings import SchedulerSettings
from embedserve.testing import FakeBackend, FaultPlan, FaultyBackend, tiny_tokenizer
from embedserve.testing.backends import fake_vector
from tests.integration.engine.conftest import Bench, call, running

WORDS = ("the", "world", "says", "hello", "to", "a", "text", "that", "nobody", "has", "read", "before", "today")


def expected(text: str, dimension: int = 16, *, normalize: bool = True) -> np.ndarray:
    ids = tiny_tokenizer().encode([text], truncation=Truncation.NONE).ids
    return fake_vector(ids, dimension, normalize=normalize)


def sentence(rng: random.Random, most: int = 20) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def poison_id() -> int:
    return int(tiny_tokenizer().encode(["poison"], truncation=Truncation.NONE).ids[1])


async def until(condition, limit_s: float = 5.0) -> None:
    """Let the loop run until ``condition`` holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        await asyncio.sleep(0)


class TestAnswers:
    """What comes back is the vector of the text that was sent."""

    async def test_one_text_gets_its_vector(self, bench: Bench) -> None:
        answer = await bench.engine.embed(call("hello world"))

        assert np.array_equal(answer.vectors, expected("hello world")[None])
        assert list(answer.token_counts) == [4]
        assert list(answer.truncated) == [False]
        assert list(answer.batch_sizes) == [1]

    async def test_order_and_identity_hold_under_64_concurrent_mixed_callers(self) -> None:
        rng = random.Random(11)
        texts = [[sentence(rng) for _ in range(rng.randint(1, 9))] for _ in range(256)]
        pace = FakeBackend(pass_ns=lambda b: 200_000 + 500 * len(b.ids))
        async with running(pace) as bench:
            gate = asyncio.Semaphore(64)

            async def one(mine: list[str]) -> Embedded:
                async with gate:
                    return await bench.engine.embed(call(*mine))

            answers = await asyncio.gather(*(one(mine) for mine in texts))

        assert max(rows for rows, _ in pace.passes) > 9, "requests never shared a batch, so this test shows nothing"
        for mine, answer in zip(texts, answers, strict=True):
            assert np.array_equal(answer.vectors, np.stack([expected(t) for t in mine]))

    @pytest.mark.parametrize("shape", list(Shape))
    async def test_a_large_request_is_split_and_put_together_again(self, shape: Shape) -> None:
        rng = random.Random(5)
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 24))) for _ in range(500)]
        settings = SchedulerSettings(
            shape=shape, bucket_edges=(16, 32, 64, 128), max_batch_tokens=512, max_batch_items=32
        )
        async with running(scheduler=settings) as bench:
            answer = await bench.engine.embed(call(*texts))

        assert answer.batches > 10
        assert max(answer.batch_sizes) <= 32
        assert np.array_equal(answer.vectors, np.stack([expected(t) for t in texts]))

    async def test_dimensions_are_cut_before_scaling_to_unit_length(self, bench: Bench) -> None:
        answer = await bench.engine.embed(call("hello world", "a text", dimensions=4))

        cut = np.stack([expected(t, normalize=False)[:4] for t in ("hello world", "a text")])
        assert answer.vectors == pytest.approx(cut / np.linalg.norm(cut, axis=1, keepdims=True), abs=1e-6)

    async def test_callers_with_and_without_normalising_share_a_batch(self) -> None:
        plan = FaultPlan()
        async with running(FaultyBackend(plan)) as bench:
            plan.gate.clear()
            first = asyncio.ensure_future(bench.engine.embed(call("a")))
            await until(lambda: bench.engine.load().running_items == 1)
            both = [asyncio.ensure_future(bench.engine.embed(call("hello", normalize=flag))) for flag in (True, False)]
            await until(lambda: bench.engine.load().queue_depth + bench.engine.load().running_items == 3)
            plan.gate.set()
            await first
            unit, raw = await asyncio.gather(*both)

        assert np.array_equal(unit.vectors[0], expected("hello"))
        assert np.array_equal(raw.vectors[0], expected("hello", normalize=False))

    async def test_token_ids_are_used_as_they_are(self, bench: Bench) -> None:
        ids = [np.array([2, 7, 3], dtype=np.int32), np.array([2, 8, 9, 3], dtype=np.int32)]
        tokens = TokenizedTexts(np.concatenate(ids), np.array([3, 4], dtype=np.int32), np.zeros(2, dtype=np.bool_))
        answer = await bench.engine.embed(Call(stages=Stages(time.monotonic_ns()), tokens=tokens))

        assert np.array_equal(answer.vectors, np.stack([fake_vector(i, 16) for i in ids]))
        assert list(answer.token_counts) == [3, 4]

    async def test_the_stages_of_an_answer_are_in_order(self, bench: Bench) -> None:
        asked = call("hello world", "the text " * 30, trace="sampled")
        await bench.engine.embed(asked)

        s = asked.stages
        marks = [s.arrived_ns, s.admitted_ns, s.tokenized_ns, s.queued_ns, s.dequeued_ns, s.assembled_ns, s.computed_ns]
        assert all(marks)
        assert marks == sorted(marks)
        (boarding,) = s.boardings
        assert boarding.trace == boarding.batch_id == bench.observer.batches[0].batch.id
        assert (boarding.batch_rows, boarding.rows) == (2, 2)
        assert s.queued_ns <= boarding.dispatched_ns <= s.dequeued_ns

    async def test_a_request_that_is_not_sampled_notes_no_batch(self, bench: Bench) -> None:
        asked = call("hello world")
        await bench.engine.embed(asked)

        assert asked.stages.boardings == []


class TestBadTexts:
    """A bad text harms only itself."""

    async def test_an_over_long_text_is_refused_with_its_index_and_both_lengths(self, bench: Bench) -> None:
        with pytest.raises(InvalidRequest) as caught:
            await bench.engine.embed(call("hello", "a " * 200, "b " * 300))

        assert [v.field for v in caught.value.violations] == ["texts[1]", "texts[2]"]
        assert caught.value.violations[0].reason == "TEXT_TOO_LONG"
        assert "128" in caught.value.violations[0].description

    @pytest.mark.parametrize("truncation", [Truncation.END, Truncation.START])
    async def test_an_over_long_text_is_cut_where_asked_and_says_so(self, bench: Bench, truncation: Truncation) -> None:
        answer = await bench.engine.embed(call("hello", "a " * 200, truncation=truncation))

        assert list(answer.token_counts) == [3, 128]
        assert list(answer.truncated) == [False, True]

    async def test_a_poison_text_fails_alone_and_its_neighbours_get_their_vectors(self) -> None:
        plan = FaultPlan(raise_on_id=poison_id())
        async with running(FaultyBackend(plan)) as bench:
            plan.gate.clear()
            texts = ["hello", "poison", "world", "a", "text", "the", "hello world", "a text"]
            tasks = [asyncio.ensure_future(bench.engine.embed(call(t))) for t in ["warm", *texts]]
            await until(lambda: bench.engine.load().queue_depth + bench.engine.load().running_items == len(tasks))
            plan.gate.set()
            _, *answers = await asyncio.gather(*tasks, return_exceptions=True)

        for text, answer in zip(texts, answers, strict=True):
            if text == "poison":
                assert isinstance(answer, ItemFailed)
            else:
                assert isinstance(answer, Embedded)
                assert np.array_equal(answer.vectors[0], expected(text))

    async def test_a_row_that_is_never_finite_is_never_sent(self) -> None:
        async with running(FaultyBackend(FaultPlan(nan_on_id=poison_id()))) as bench:
            answers = await asyncio.gather(
                bench.engine.embed(call("poison")), bench.engine.embed(call("hello")), return_exceptions=True
            )

        assert isinstance(answers[0], NonFiniteOutput)
        assert isinstance(answers[1], Embedded)

    async def test_a_row_that_is_finite_alone_heals(self) -> None:
        async with running(FaultyBackend(FaultPlan(nan_once_on_id=poison_id()))) as bench:
            answer = await bench.engine.embed(call("hello", "poison", "world"))

        assert np.array_equal(answer.vectors, np.stack([expected(t) for t in ("hello", "poison", "world")]))

    async def test_out_of_memory_halves_the_batch_and_everybody_is_answered(self) -> None:
        backend = FaultyBackend(FaultPlan(memory_tokens=40))
        texts = ["hello world the text"] * 40
        async with running(backend) as bench:
            answer = await bench.engine.embed(call(*texts))

        assert np.array_equal(answer.vectors, np.stack([expected(texts[0])] * 40))
        assert backend.released >= 1


class TestLeaving:
    """A caller that goes frees its place at once."""

    async def test_a_cancelled_request_leaves_the_queue_and_is_never_run(self) -> None:
        plan = FaultPlan()
        backend = FaultyBackend(plan)
        async with running(backend, batches_in_flight=1) as bench:
            plan.gate.clear()
            first = asyncio.ensure_future(bench.engine.embed(call("hello")))
            await until(lambda: bench.engine.load().running_items == 1)
            second = asyncio.ensure_future(bench.engine.embed(call("world", "text")))
            await until(lambda: bench.engine.load().queue_depth == 2)
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
            depth = bench.engine.load().queue_depth
            plan.gate.set()
            await first

        assert depth == 0
        assert backend.passes == [(1, 3)]
        assert bench.observer.verdicts == {"cancelled": 2, "done": 1}

    async def test_a_request_whose_deadline_passes_while_it_waits_is_not_run(self) -> None:
        plan = FaultPlan()
        backend = FaultyBackend(plan)
        async with running(backend, batches_in_flight=1) as bench:
            plan.gate.clear()
            first = asyncio.ensure_future(bench.engine.embed(call("hello")))
            await until(lambda: bench.engine.load().running_items == 1)
            late = call("world", deadline_ns=time.monotonic_ns() + 60_000_000)
            with pytest.raises((DeadlineExpired, Overloaded)) as caught:
                await bench.engine.embed(late)
            plan.gate.set()
            await first

        assert caught.type is DeadlineExpired
        assert backend.passes == [(1, 3)]

    async def test_an_expired_deadline_is_told_before_any_work(self, bench: Bench) -> None:
        with pytest.raises(DeadlineExpired):
            await bench.engine.embed(call("hello", deadline_ns=time.monotonic_ns() - 1))

        assert bench.observer.batches == []


class TestStreams:
    """Portions as their batches finish, bounded by a window."""

    async def test_every_index_comes_exactly_once_with_its_vector(self) -> None:
        rng = random.Random(3)
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 24))) for _ in range(700)]
        settings = SchedulerSettings(bucket_edges=(16, 32, 64, 128), max_batch_items=16)
        seen: dict[int, np.ndarray] = {}
        async with running(scheduler=settings) as bench:
            async for portion in bench.engine.embed_stream(call(*texts)):
                assert portion.vectors is not None
                for row, index in enumerate(portion.indexes):
                    assert index not in seen
                    seen[index] = portion.vectors[row]

        assert sorted(seen) == list(range(700))
        assert all(np.array_equal(seen[i], expected(t)) for i, t in enumerate(texts))

    async def test_a_bad_text_is_refused_alone_and_the_stream_goes_on(self, bench: Bench) -> None:
        texts = ["hello", "a " * 200, "world"]
        refused, good = {}, set()
        async for portion in bench.engine.embed_stream(call(*texts)):
            good.update(portion.indexes)
            refused.update({r.index: r.error for r in portion.refused})

        assert good == {0, 2}
        assert list(refused) == [1]
        assert isinstance(refused[1], InvalidRequest)

    async def test_a_reader_that_stalls_holds_a_window_and_no_more(self) -> None:
        backend = FakeBackend()
        async with running(backend, stream_window_items=32) as bench:
            stream = bench.engine.embed_stream(call(*["hello"] * 400))
            taken = len((await anext(stream)).indexes)
            await until(lambda: sum(rows for rows, _ in backend.passes) >= 32)
            for _ in range(200):
                await asyncio.sleep(0)
            computed = sum(rows for rows, _ in backend.passes)
            rest = [len(p.indexes) async for p in stream]

        assert computed <= 32 + taken
        assert taken + sum(rest) == 400

    async def test_closing_a_stream_frees_what_it_had_waiting(self) -> None:
        plan = FaultPlan()
        small = SchedulerSettings(bucket_edges=(128,), max_batch_items=4)
        async with running(FaultyBackend(plan), scheduler=small) as bench:
            stream = bench.engine.embed_stream(call(*["hello"] * 60))
            await anext(stream)
            plan.gate.clear()
            await stream.aclose()
            waiting = bench.engine.load().queue_depth
            plan.gate.set()
            await until(lambda: bench.engine.load().running_items == 0)

        assert waiting == 0, "freed when the call is over, not when the collector comes by"


class TestDeath:
    """A worker that dies is loud: everybody who waits is told, and the process is asked to end."""

    @pytest.mark.parametrize(
        "plan",
        [FaultPlan(die=SystemExit), FaultPlan(lose_device=True), FaultPlan(wrong_rows=True)],
        ids=["thread dies", "device lost", "wrong rows"],
    )
    async def test_those_in_flight_and_those_who_wait_are_told(self, plan: FaultPlan) -> None:
        plan.gate.clear()
        backend = FaultyBackend(plan)
        async with running(backend, batches_in_flight=1) as bench:
            tasks = [asyncio.ensure_future(bench.engine.embed(call("hello"))) for _ in range(2)]
            await until(lambda: bench.engine.load().running_items >= 1)
            tasks += [asyncio.ensure_future(bench.engine.embed(call("world"))) for _ in range(3)]
            await until(lambda: bench.engine.load().queue_depth >= 3)
            plan.gate.set()
            answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)

            assert all(isinstance(a, EngineFailed) for a in answers)
            assert len(bench.fatal) == 1

    async def test_what_fitted_at_warm_up_is_what_batches_hold(self) -> None:
        class Small(FakeBackend):
            def report(self) -> DeviceReport:
                return DeviceReport("cuda:0", 0, 0, compiled=False, packed=True, batch_tokens_max=1024)

        async with running(Small()) as bench:
            assert bench.engine.scheduler.max_batch_tokens == 1024

    @pytest.mark.filterwarnings("default")
    async def test_a_warm_up_that_fails_stops_the_start(self) -> None:
        with pytest.raises(StartupError, match="no kernel image"):
            async with running(FaultyBackend(FaultPlan(fail_warm_up="no kernel image"))):
                pass


class TestDrain:
    """What was admitted is answered; nothing new is taken."""

    async def test_a_drain_answers_what_was_admitted_and_refuses_what_comes(self) -> None:
        plan = FaultPlan()
        small = SchedulerSettings(bucket_edges=(128,), max_batch_items=8)
        async with running(FaultyBackend(plan), scheduler=small) as bench:
            plan.gate.clear()
            admitted = [asyncio.ensure_future(bench.engine.embed(call("hello"))) for _ in range(5)]
            portions: list[int] = []

            async def read() -> None:
                async for portion in bench.engine.embed_stream(call(*["world"] * 300)):
                    portions.extend(portion.indexes)

            stream = asyncio.ensure_future(read())
            await until(lambda: bench.engine.load().queue_depth > 5)
            bench.engine.drain()
            with pytest.raises(NotServing):
                await bench.engine.embed(call("late"))
            plan.gate.set()
            await asyncio.wait_for(bench.engine.idle(), 5)
            answers = await asyncio.gather(*admitted)
            await stream

        assert len(answers) == 5
        assert sorted(portions) == list(range(300))


class TestIdle:
    """Nothing polls."""

    async def test_an_idle_engine_uses_no_cpu(self, bench: Bench) -> None:
        await bench.engine.embed(call("hello"))
        threads = {t.name for t in threading.enumerate()}
        begun = time.process_time()
        await asyncio.sleep(0.5)
        used = time.process_time() - begun

        assert "embedserve-worker" in threads
        assert used < 0.01


class TestRoom:
    """Requests in the engine are bounded, and every refusal is told to whoever watches."""

    async def test_one_request_more_than_the_limit_is_refused_and_counted(self) -> None:
        plan = FaultPlan()
        async with running(FaultyBackend(plan), max_requests_in_flight=2) as bench:
            plan.gate.clear()
            inside = [asyncio.ensure_future(bench.engine.embed(call("hello"))) for _ in range(2)]
            await until(lambda: bench.engine.requests == 2)
            with pytest.raises(Overloaded) as caught:
                await bench.engine.embed(call("world"))
            plan.gate.set()
            await asyncio.gather(*inside)

        assert caught.value.reason == "TOO_MANY_REQUESTS_IN_FLIGHT"
        assert [(stage, r.policy) for stage, r in bench.observer.rejections] == [("estimate", "in_flight")]

    async def test_a_full_tokenizer_queue_is_counted(self) -> None:
        settings = TokenizerSettings(threads=1, max_pending=0, inline_chars=0, chunk_texts=8)
        async with running(tokenizing=settings) as bench:
            with pytest.raises(Overloaded):
                await bench.engine.embed(call("hello"))

        assert [(stage, r.reason) for stage, r in bench.observer.rejections] == [("estimate", "TOKENIZER_QUEUE_FULL")]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
class TestPriority:
    @pytest.mark.parametrize(("compiled", "lower"), [(True, 3), (False, 0)])
    async def test_tokenizer_threads_go_with_the_compiled_pass(self, compiled: bool, lower: int) -> None:
        """Its threads are lower than the event loop's; passes that were not compiled run at the loop's own priority."""
        settings = TokenizerSettings(threads=2, max_pending=64, inline_chars=0, chunk_texts=8, nice=3)
        async with running(tokenizing=settings) as bench:
            own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            bench.engine._take_compilation(DeviceReport("cpu", 1, 1, compiled=compiled, packed=True, compile_s=1.0))
            threads = [t.native_id for t in threading.enumerate() if t.name.startswith("embedserve-tokenizer")]
            found = [os.getpriority(os.PRIO_PROCESS, thread) - own for thread in threads if thread is not None]

        assert found == [lower, lower]
