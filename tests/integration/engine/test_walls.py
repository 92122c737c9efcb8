"""Whatever breaks inside the engine, nobody is left waiting and the process is asked to end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from embedserve.engine.canary import CanarySettings
from embedserve.engine.tokenization import TokenizerSettings
from embedserve.engine.watchdog import StallLimits
from embedserve.errors import DeadlineExpired, EngineFailed, InvariantBroken, NotServing
from embedserve.model.tokenizer import TextTokenizer, TokenizedTexts
from embedserve.testing import FaultPlan, FaultyBackend
from embedserve.testing.tokenizer import tiny_tokenizer_json
from tests.integration.engine.conftest import Bench, RecordingObserver, call, running
from tests.integration.engine.test_canary import GatedTokenizer
from tests.integration.engine.test_engine import until

MS = 1_000_000
OFF = CanarySettings(interval_ns=0)
SOON_S = 1.0
"""Those in flight are told within a second."""


def break_(owner: object, name: str) -> Callable[[], None]:
    """Make a method raise, as a broken invariant would; returns what mends it."""
    whole = getattr(owner, name)

    def broken(*_args: object, **_options: object) -> None:
        raise AssertionError(f"{name} is broken")

    setattr(owner, name, broken)
    return lambda: setattr(owner, name, whole)


class TestCallbacks:
    """asyncio logs an exception of a callback and goes on; here it ends the process."""

    @pytest.mark.parametrize("method", ["complete", "next_batch", "expire", "wake_at", "overdue"])
    async def test_a_scheduler_that_breaks(self, method: str) -> None:
        plan = FaultPlan()
        async with running(FaultyBackend(plan), canary=OFF) as bench:
            plan.gate.clear()
            first = asyncio.ensure_future(bench.engine.embed(call("hello")))
            await until(lambda: bench.engine.load().running_items == 1)
            break_(bench.engine.scheduler, method)
            second = asyncio.ensure_future(bench.engine.embed(call("world")))
            await until(lambda: bench.engine.requests == 2)
            plan.gate.set()
            answers = await asyncio.wait_for(asyncio.gather(first, second, return_exceptions=True), SOON_S)

            assert {type(answer) for answer in answers} == {EngineFailed}
            assert len(bench.fatal) == 1
            assert f"{method} is broken (test_walls.py" in bench.fatal[0]

    async def test_a_scheduler_that_breaks_also_when_it_gives_up(self) -> None:
        plan = FaultPlan()
        async with running(FaultyBackend(plan), canary=OFF) as bench:
            plan.gate.clear()
            first = asyncio.ensure_future(bench.engine.embed(call("hello")))
            await until(lambda: bench.engine.load().running_items == 1)
            mend = [break_(bench.engine.scheduler, name) for name in ("complete", "fail")]
            plan.gate.set()
            (answer,) = await asyncio.wait_for(asyncio.gather(first, return_exceptions=True), SOON_S)
            for whole in mend:
                whole()

            assert isinstance(answer, EngineFailed)
            assert len(bench.fatal) == 1

    async def test_a_timer_of_the_crank_that_breaks(self) -> None:
        """Only the timer is left to fire: the device hangs and nobody comes."""
        plan = FaultPlan()
        async with running(FaultyBackend(plan), canary=OFF) as bench:
            plan.gate.clear()
            loop = asyncio.get_running_loop()
            late = asyncio.ensure_future(
                bench.engine.embed(call("hello", deadline_ns=int(loop.time() * 1e9) + 80 * MS))
            )
            other = asyncio.ensure_future(bench.engine.embed(call("world")))
            await until(lambda: bench.engine.load().running_items + bench.engine.load().queue_depth == 2)
            break_(bench.engine.scheduler, "expire")
            answers = await asyncio.wait_for(asyncio.gather(late, other, return_exceptions=True), SOON_S)
            plan.gate.set()

            assert {type(answer) for answer in answers} == {EngineFailed}
            assert len(bench.fatal) == 1

    @pytest.mark.parametrize("event", ["batch_finished", "request_finished", "settled"])
    async def test_an_observer_that_raises(self, event: str) -> None:
        observer = RecordingObserver()
        async with running(canary=OFF, observer=observer) as bench:
            break_(observer, event)
            await asyncio.gather(bench.engine.embed(call("hello")), return_exceptions=True)
            await until(lambda: bench.fatal)

        assert len(bench.fatal) == 1

    async def test_a_watchdog_whose_listener_raises(self) -> None:
        observer = RecordingObserver()
        plan = FaultPlan()
        limits = StallLimits(stall_ns=20 * MS, hang_ns=60_000 * MS)
        async with running(FaultyBackend(plan), canary=OFF, observer=observer, stall=limits) as bench:
            break_(observer, "stalled")
            plan.gate.clear()
            (answer,) = await asyncio.wait_for(
                asyncio.gather(bench.engine.embed(call("hello")), return_exceptions=True), SOON_S
            )
            plan.gate.set()

            assert isinstance(answer, EngineFailed)
            assert len(bench.fatal) == 1

    async def test_a_canary_that_breaks(self) -> None:
        observer = RecordingObserver()
        canary = CanarySettings(interval_ns=20 * MS)
        async with running(canary=canary, observer=observer) as bench:
            break_(bench.engine.scheduler, "submit")
            await until(lambda: bench.fatal)

        assert len(bench.fatal) == 1

    async def test_a_submission_that_breaks_the_scheduler_ends_it_too(self) -> None:
        plan = FaultPlan()
        async with running(FaultyBackend(plan), canary=OFF) as bench:
            plan.gate.clear()
            first = asyncio.ensure_future(bench.engine.embed(call("hello")))
            await until(lambda: bench.engine.load().running_items == 1)
            break_(bench.engine.scheduler, "submit")
            with pytest.raises(InvariantBroken):
                await bench.engine.embed(call("world"))
            (answer,) = await asyncio.wait_for(asyncio.gather(first, return_exceptions=True), SOON_S)
            plan.gate.set()

            assert isinstance(answer, EngineFailed)
            assert len(bench.fatal) == 1

    async def test_a_cancellation_that_breaks_the_scheduler_ends_it_too(self) -> None:
        plan = FaultPlan()
        async with running(FaultyBackend(plan), canary=OFF) as bench:
            plan.gate.clear()
            first, second = (asyncio.ensure_future(bench.engine.embed(call("hello"))) for _ in range(2))
            await until(lambda: bench.engine.requests == 2 and bench.engine.load().running_items >= 1)
            break_(bench.engine.scheduler, "cancel")
            second.cancel()
            answers = await asyncio.wait_for(asyncio.gather(first, second, return_exceptions=True), SOON_S)
            plan.gate.set()

            assert [type(answer) for answer in answers] == [EngineFailed, asyncio.CancelledError]
            assert len(bench.fatal) == 1


class DyingTokenizer(TextTokenizer):
    """Its clones end their thread on ``#``."""

    def __init__(self, death: type[BaseException]) -> None:
        super().__init__(tiny_tokenizer_json(), 128)
        self.death = death

    def clone(self) -> DyingTokenizer:
        return DyingTokenizer(self.death)

    def encode(self, texts: list[str], **options: object) -> TokenizedTexts:  # type: ignore[override]
        if any("#" in text for text in texts):
            raise self.death("the text says so")
        return super().encode(texts, **options)  # type: ignore[arg-type]


THREADED = TokenizerSettings(threads=1, max_pending=64, inline_chars=0, chunk_texts=64)


class TestDeath:
    """Everybody in flight is told within a second, wherever they are, and health knows first."""

    async def test_those_who_wait_for_a_tokenizer_are_told_when_the_worker_dies(self) -> None:
        gate = threading.Event()
        gate.set()
        plan = FaultPlan()
        async with running(
            FaultyBackend(plan), canary=OFF, tokenizer=GatedTokenizer(gate), tokenizing=THREADED
        ) as bench:
            plan.gate.clear()
            inside = asyncio.ensure_future(bench.engine.embed(call("hello")))
            await until(lambda: bench.engine.load().running_items == 1)
            gate.clear()
            tokenizing = asyncio.ensure_future(bench.engine.embed(call("world")))
            queued = asyncio.ensure_future(bench.engine.embed(call("a text")))
            stream = asyncio.ensure_future(anext(bench.engine.embed_stream(call("the text"))))
            await until(lambda: bench.engine.tokenizer_use.pending == 3)
            plan.die = SystemExit
            plan.gate.set()
            answers = await asyncio.wait_for(
                asyncio.gather(inside, tokenizing, queued, stream, return_exceptions=True), SOON_S
            )
            with pytest.raises(NotServing):
                await bench.engine.embed(call("late"))
            gate.set()

            assert [type(answer) for answer in answers] == [EngineFailed] * 4
            assert len(bench.fatal) == 1

    async def test_a_stream_whose_reader_is_slow_is_told_when_the_worker_dies(self) -> None:
        plan = FaultPlan()
        async with running(FaultyBackend(plan), canary=OFF, stream_window_items=8) as bench:
            stream = bench.engine.embed_stream(call(*["hello"] * 100))
            await anext(stream)
            await until(lambda: bench.engine.load().running_items == 0)
            plan.die = SystemExit
            with pytest.raises(EngineFailed):
                async for _portion in stream:
                    pass

    @pytest.mark.parametrize("death", [SystemExit, KeyboardInterrupt, GeneratorExit])
    async def test_a_tokenizer_thread_that_dies_is_as_loud_as_the_worker(self, death: type[BaseException]) -> None:
        plan = FaultPlan()
        async with running(
            FaultyBackend(plan), canary=OFF, tokenizer=DyingTokenizer(death), tokenizing=THREADED
        ) as bench:
            plan.gate.clear()
            inside = asyncio.ensure_future(bench.engine.embed(call("hello")))
            await until(lambda: bench.engine.load().running_items == 1)
            tasks = [asyncio.ensure_future(bench.engine.embed(call(text))) for text in ("#", "world")]
            answers = await asyncio.wait_for(asyncio.gather(inside, *tasks, return_exceptions=True), SOON_S)
            plan.gate.set()

            assert [type(answer) for answer in answers] == [EngineFailed] * 3
            assert len(bench.fatal) == 1
            assert "tokenizer thread died" in bench.fatal[0]

    async def test_an_exception_of_the_tokenizer_is_that_calls_alone(self) -> None:
        async with running(canary=OFF, tokenizer=DyingTokenizer(MemoryError), tokenizing=THREADED) as bench:
            with pytest.raises(MemoryError):
                await bench.engine.embed(call("#"))
            answer = await bench.engine.embed(call("hello"))

            assert answer.tokens == 3
            assert bench.fatal == []

    async def test_the_process_is_told_before_those_in_flight(self) -> None:
        plan = FaultPlan()
        order: list[str] = []
        async with running(FaultyBackend(plan), canary=OFF) as bench:
            told = bench.fatal.append
            bench.engine._on_fatal = lambda why: (order.append("health"), told(why))  # type: ignore[assignment,func-returns-value]
            plan.gate.clear()
            inside = asyncio.ensure_future(bench.engine.embed(call("hello")))
            inside.add_done_callback(lambda _task: order.append("caller"))
            await until(lambda: bench.engine.load().running_items == 1)
            plan.lose_device = True
            plan.gate.set()
            await asyncio.gather(inside, return_exceptions=True)

        assert order == ["health", "caller"]


class TestTokenizing:
    """Work that nobody wants is not tokenised."""

    @staticmethod
    async def _begin(bench: Bench, gate: threading.Event, **options: object) -> asyncio.Future[object]:
        gate.clear()
        task = asyncio.ensure_future(bench.engine.embed(call(*["hello world"] * 16384, **options)))
        await until(lambda: bench.engine.tokenizer_use.pending == 1)
        return task

    async def test_a_large_request_that_is_cancelled_between_pieces_is_left_alone(self) -> None:
        gate = threading.Event()
        gate.set()
        tokenizer = CountingTokenizer(gate)
        async with running(canary=OFF, tokenizer=tokenizer, tokenizing=THREADED) as bench:
            tokenizer.encoded.clear()
            task = await self._begin(bench, gate)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            gate.set()
            await bench.engine.embed(call("the next one"))

            assert len(tokenizer.encoded) <= 2

    async def test_a_large_request_whose_deadline_passes_is_left_alone(self) -> None:
        gate = threading.Event()
        gate.set()
        tokenizer = CountingTokenizer(gate)
        async with running(canary=OFF, tokenizer=tokenizer, tokenizing=THREADED) as bench:
            tokenizer.encoded.clear()
            first = await self._begin(bench, gate)
            late = asyncio.ensure_future(bench.engine.embed(call("world", deadline_ns=time.monotonic_ns() + 20 * MS)))
            await asyncio.sleep(0.04)
            first.cancel()
            gate.set()
            _, answer = await asyncio.gather(first, late, return_exceptions=True)

            assert isinstance(answer, DeadlineExpired)
            assert len(tokenizer.encoded) <= 1


class CountingTokenizer(GatedTokenizer):
    """Counts what its clones encode."""

    def __init__(self, gate: threading.Event, encoded: list[int] | None = None) -> None:
        super().__init__(gate)
        self.encoded = encoded if encoded is not None else []

    def clone(self) -> CountingTokenizer:
        return CountingTokenizer(self.gate, self.encoded)

    def encode(self, texts: list[str], **options: object) -> TokenizedTexts:  # type: ignore[override]
        self.gate.wait()
        self.encoded.append(len(texts))
        return super().encode(texts, **options)
