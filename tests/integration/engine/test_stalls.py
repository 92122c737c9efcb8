"""A device that is silent: it is told, waiting calls end on time, new ones are refused, and it may come back."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from embedserve.engine.canary import CanarySettings
from embedserve.engine.watchdog import StallLimits
from embedserve.errors import DeadlineExpired, EngineFailed, EngineStalled
from embedserve.model.backend import BatchResult, TokenBatch
from embedserve.testing import FakeBackend, FaultPlan, FaultyBackend
from tests.integration.engine.conftest import call, running
from tests.integration.engine.test_engine import expected, until

MS = 1_000_000
QUICK = StallLimits(stall_ns=50 * MS, hang_ns=60_000 * MS)
OFF = CanarySettings(interval_ns=0, timeout_ns=5000 * MS)


class TestStall:
    """A pass that runs too long."""

    async def test_it_is_told_refused_and_over_when_the_pass_ends(self) -> None:
        plan = FaultPlan()
        async with running(FaultyBackend(plan), stall=QUICK, canary=OFF) as bench:
            plan.gate.clear()
            first = asyncio.ensure_future(bench.engine.embed(call("hello")))
            await until(lambda: bench.engine.stalled)
            load = bench.engine.load()
            with pytest.raises(EngineStalled) as refused:
                await bench.engine.embed(call("world"))
            with pytest.raises(EngineStalled):
                await anext(bench.engine.embed_stream(call("world")))
            age_ns = bench.engine.pass_age_ns
            plan.gate.set()
            answer = await first
            after = await bench.engine.embed(call("world"))

            assert (load.state, load.accepting_requests) == ("not_serving", False)
            assert (refused.value.reason, refused.value.retry_after_ms) == ("ENGINE_STALLED", 1000)
            assert age_ns >= QUICK.stall_ns
            assert np.array_equal(answer.vectors[0], expected("hello"))
            assert np.array_equal(after.vectors[0], expected("world"))
            assert (bench.health, bench.observer.stalls, bench.fatal) == (["stall", "recovery"], 1, [])
            assert bench.engine.load().state == "healthy"

    @pytest.mark.parametrize("in_flight", [1, 2])
    async def test_calls_end_at_their_own_deadlines_whether_they_wait_or_run(self, in_flight: int) -> None:
        """Within tens of milliseconds, on a timer of their own: no sweep."""
        plan = FaultPlan()
        async with running(FaultyBackend(plan), canary=OFF, batches_in_flight=in_flight) as bench:
            plan.gate.clear()

            async def late(after_ms: int) -> float:
                deadline_ns = time.monotonic_ns() + after_ms * MS
                with pytest.raises(DeadlineExpired):
                    await bench.engine.embed(call("hello", deadline_ns=deadline_ns))
                return (time.monotonic_ns() - deadline_ns) / MS

            late_ms = await asyncio.gather(*(late(after_ms) for after_ms in (60, 120, 180, 240)))
            load = bench.engine.load()
            plan.gate.set()

            assert all(0 <= ms < 50 for ms in late_ms), late_ms
            assert load.queue_depth == 0

    async def test_a_pass_that_never_ends_is_a_broken_device(self) -> None:
        plan = FaultPlan()
        limits = StallLimits(stall_ns=30 * MS, hang_ns=150 * MS)
        async with running(FaultyBackend(plan), stall=limits, canary=OFF) as bench:
            plan.gate.clear()
            told = await asyncio.gather(*(bench.engine.embed(call("hello")) for _ in range(3)), return_exceptions=True)
            plan.gate.set()

            assert [type(answer) for answer in told] == [EngineFailed] * 3
            assert len(bench.fatal) == 1
            assert "health.hang_ms" in bench.fatal[0]
            assert bench.health == ["stall"]


class TestTwoPassesAtOnce:
    """A pass that hangs is seen though others overtake it."""

    async def test_passes_that_end_beside_it_do_not_hide_it(self) -> None:
        class Overtaken(FaultyBackend):
            """The first pass waits for the gate, the others pass it by."""

            held = threading.Event()

            @property
            def passes_at_once(self) -> int:
                return 2

            def embed(self, batch: TokenBatch) -> BatchResult:
                if not plan.gate.is_set() and not self.held.is_set():
                    self.held.set()
                    plan.gate.wait(10)
                return FakeBackend.embed(self, batch)

        plan = FaultPlan()
        limits = StallLimits(stall_ns=60 * MS, hang_ns=250 * MS)
        async with running(Overtaken(plan), stall=limits, canary=OFF, overlap_ahead_ns=10**12) as bench:
            plan.gate.clear()
            stuck = asyncio.ensure_future(bench.engine.embed(call("hello")))
            await until(Overtaken.held.is_set)
            others = 0
            while not bench.engine.stalled and not bench.fatal:
                with suppress(EngineStalled):
                    await bench.engine.embed(call("world"))
                    others += 1
            told = await asyncio.gather(stuck, return_exceptions=True)
            plan.gate.set()

            assert others > 2, "passes ended beside it all the while"
            assert bench.health == ["stall"]
            assert "health.hang_ms" in bench.fatal[0]
            assert [type(answer) for answer in told] == [EngineFailed]


class TestUnwanted:
    """A prepared pass that nobody wants any more is not run."""

    async def test_one_whose_riders_have_all_gone_is_skipped(self) -> None:
        plan = FaultPlan()
        backend = FaultyBackend(plan)
        async with running(backend, canary=OFF, prepare_ahead_ns=10**12) as bench:
            plan.gate.clear()
            first = asyncio.ensure_future(bench.engine.embed(call("hello")))
            await until(lambda: bench.engine.load().running_items == 1)
            others = [asyncio.ensure_future(bench.engine.embed(call("world", "text"))) for _ in range(2)]
            await until(lambda: bench.engine.load().running_items == 5)
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            plan.gate.set()
            await first
            await until(lambda: bench.engine.load().running_items == 0)
            await bench.engine.embed(call("the end"))

        assert backend.passes == [(1, 3), (1, 6)]
        assert [record.outcome for record in bench.observer.batches] == ["ok", "skipped", "ok"]
        assert bench.observer.verdicts == {"done": 2, "cancelled": 4}

    async def test_one_whose_riders_are_all_too_late_is_skipped_and_they_are_told(self) -> None:
        plan = FaultPlan()
        backend = FaultyBackend(plan)
        async with running(backend, canary=OFF, prepare_ahead_ns=10**12) as bench:
            plan.gate.clear()
            first = asyncio.ensure_future(bench.engine.embed(call("hello")))
            await until(lambda: bench.engine.load().running_items == 1)
            with pytest.raises(DeadlineExpired):
                await bench.engine.embed(call("world", deadline_ns=time.monotonic_ns() + 40 * MS))
            plan.gate.set()
            await first
            await until(lambda: bench.engine.load().running_items == 0)

        assert backend.passes == [(1, 3)]

    async def test_one_that_somebody_wants_runs_whole(self) -> None:
        plan = FaultPlan()
        backend = FaultyBackend(plan)
        async with running(backend, canary=OFF, prepare_ahead_ns=10**12) as bench:
            plan.gate.clear()
            first = asyncio.ensure_future(bench.engine.embed(call("hello")))
            await until(lambda: bench.engine.load().running_items == 1)
            gone, stays = (asyncio.ensure_future(bench.engine.embed(call(text))) for text in ("world", "text"))
            await until(lambda: bench.engine.load().running_items == 3)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            plan.gate.set()
            answer = await stays
            await first

        assert backend.passes == [(1, 3), (2, 6)]
        assert np.array_equal(answer.vectors[0], expected("text"))

    async def test_a_cancelled_call_frees_its_places_at_once_and_its_running_rows_are_dropped(self) -> None:
        plan = FaultPlan()
        async with running(FaultyBackend(plan), canary=OFF, batches_in_flight=1) as bench:
            plan.gate.clear()
            running_one = asyncio.ensure_future(bench.engine.embed(call("hello", "world")))
            await until(lambda: bench.engine.load().running_items == 2)
            waiting = asyncio.ensure_future(bench.engine.embed(call("a", "text", "the")))
            await until(lambda: bench.engine.load().queue_depth == 3)
            for task in (running_one, waiting):
                task.cancel()
            await asyncio.gather(running_one, waiting, return_exceptions=True)
            load = bench.engine.load()
            plan.gate.set()
            await until(lambda: bench.engine.load().running_items == 0)

            assert (load.queue_depth, load.queued_tokens, load.running_items) == (0, 0, 2)
            assert bench.observer.verdicts == {"cancelled": 5}
