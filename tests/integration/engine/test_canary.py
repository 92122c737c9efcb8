"""A known text through the whole path: the start is checked, an idle device is watched, and nobody sees it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from embedserve.engine.canary import CanarySettings
from embedserve.engine.watchdog import StallLimits
from embedserve.errors import EngineFailed, ItemFailed, StartupError
from embedserve.model.tokenizer import TextTokenizer, TokenizedTexts
from embedserve.scheduling.admission.latency_p95 import LatencyP95Policy
from embedserve.scheduling.settings import LatencyP95Settings, SchedulerSettings
from embedserve.testing import FakeBackend, FaultPlan, FaultyBackend
from embedserve.testing.tokenizer import tiny_tokenizer_json
from tests.integration.engine.conftest import call, running
from tests.integration.engine.test_engine import poison_id, until

MS = 1_000_000
OFTEN = CanarySettings(interval_ns=20 * MS, timeout_ns=5000 * MS)


class GatedTokenizer(TextTokenizer):
    """Its clones wait for a gate."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__(tiny_tokenizer_json(), 128)
        self.gate = gate

    def clone(self) -> GatedTokenizer:
        return GatedTokenizer(self.gate)

    def encode(self, *args: object, **options: object) -> TokenizedTexts:
        self.gate.wait()
        return super().encode(*args, **options)  # type: ignore[arg-type]


class TestStart:
    """The engine has started once one text has come back rightly."""

    @pytest.mark.parametrize(
        "plan",
        [
            FaultPlan(fail_check=True, lose_device=True),
            FaultPlan(fail_check=True, fail_every=True),
            FaultPlan(fail_check=True, wrong_rows=True),
            FaultPlan(fail_check=True, die=SystemExit),
            FaultPlan(fail_check=True, memory_tokens=1),
        ],
        ids=["device lost", "every pass fails", "wrong rows", "thread dies", "no memory"],
    )
    async def test_a_start_whose_first_text_fails_fails(self, plan: FaultPlan) -> None:
        with pytest.raises(StartupError, match="first text"):
            async with running(FaultyBackend(plan)):
                pass

    async def test_a_start_whose_first_text_never_comes_back_fails(self) -> None:
        plan = FaultPlan(fail_check=True)
        plan.gate.clear()
        try:
            with pytest.raises(StartupError, match=r"first text"):
                async with running(FaultyBackend(plan), stall=StallLimits(20 * MS, 80 * MS)):
                    pass
        finally:
            plan.gate.set()

    async def test_a_vector_that_is_not_finite_is_no_start(self) -> None:
        class Nan(FakeBackend):
            def embed(self, batch):  # type: ignore[no-untyped-def]
                result = super().embed(batch)
                result.vectors[:] = float("nan")
                return result

        with pytest.raises(StartupError, match="first text"):
            async with running(Nan()):
                pass


class TestIdle:
    """An idle device is asked now and then."""

    async def test_a_lost_device_is_found_without_a_caller(self) -> None:
        plan = FaultPlan()
        async with running(FaultyBackend(plan), canary=OFTEN) as bench:
            plan.lose_device = True
            await until(lambda: bench.fatal)

            assert "device lost" in bench.fatal[0]
            assert bench.engine.load().state == "not_serving"

    @pytest.mark.parametrize(
        "change", [{"corrupt": True}, {"fail_every": True}, {"wrong_rows": True}], ids=["corrupt", "raises", "rows"]
    )
    async def test_a_device_that_computes_something_else_is_found(self, change: dict[str, bool]) -> None:
        plan = FaultPlan()
        async with running(FaultyBackend(plan), canary=OFTEN) as bench:
            await until(lambda: bench.observer.canaries.count("ok") >= 2)
            for name, value in change.items():
                setattr(plan, name, value)
            await until(lambda: bench.fatal)

        assert len(bench.fatal) == 1

    async def test_a_tokenizer_thread_that_hangs_is_a_stall_until_one_answers(self) -> None:
        gate = threading.Event()
        gate.set()
        canary = CanarySettings(interval_ns=20 * MS, timeout_ns=60 * MS)
        async with running(tokenizer=GatedTokenizer(gate), canary=canary) as bench:
            gate.clear()
            await until(lambda: bench.engine.stalled)
            gate.set()
            await until(lambda: not bench.engine.stalled)

            assert bench.health[:2] == ["stall", "recovery"]
            assert bench.observer.canaries.count("timed_out") >= 1
            assert bench.fatal == []

    async def test_none_is_sent_where_the_interval_is_0(self) -> None:
        backend = FakeBackend()
        async with running(backend, canary=CanarySettings(interval_ns=0)):
            await asyncio.sleep(0.1)

        assert backend.passes == []

    async def test_none_is_sent_while_passes_end_well(self) -> None:
        canary = CanarySettings(interval_ns=200 * MS)
        async with running(canary=canary) as bench:
            for _ in range(40):
                await bench.engine.embed(call("hello"))
                await asyncio.sleep(0.01)

            assert bench.observer.canaries == []


class TestUnseen:
    """It moves no figure, and holds up nothing."""

    async def test_no_event_no_policy_and_no_quantile_tells_of_it(self) -> None:
        policy = LatencyP95Policy(LatencyP95Settings(min_samples=1))
        backend = FakeBackend()
        async with running(backend, canary=OFTEN, policies=(policy,)) as bench:
            theta = bench.engine.scheduler.theta
            await until(lambda: bench.observer.canaries.count("ok") >= 5)
            seen = bench.observer

            assert len(backend.passes) >= 5
            assert (seen.batches, seen.verdicts, seen.finished, seen.admissions) == ([], {}, [], [])
            assert (seen.tokenizations, bench.engine.requests) == (0, 0)
            assert bench.engine.scheduler.theta == theta
            assert bench.engine.load().p95_latency_ms == 0

    async def test_a_drain_does_not_wait_for_it(self) -> None:
        plan = FaultPlan()
        async with running(FaultyBackend(plan), canary=OFTEN) as bench:
            plan.gate.clear()
            await until(lambda: bench.engine.load().running_items == 1)
            bench.engine.drain()
            await asyncio.wait_for(bench.engine.idle(), 1)
            plan.gate.set()


class TestSuspect:
    """Passes that fail alike again and again: the known text tells a broken device from callers with poison."""

    async def test_a_caller_with_nothing_but_poison_never_ends_the_process(self) -> None:
        plan = FaultPlan(raise_on_id=poison_id())
        async with running(FaultyBackend(plan), canary=CanarySettings(interval_ns=0)) as bench:
            answers = [
                await asyncio.gather(bench.engine.embed(call("poison")), return_exceptions=True) for _ in range(50)
            ]
            healthy = await bench.engine.embed(call("hello"))

            assert {type(answer) for (answer,) in answers} == {ItemFailed}
            assert bench.fatal == []
            assert healthy.tokens == 3

    async def test_a_device_on_which_every_pass_fails_ends_it_soon(self) -> None:
        plan = FaultPlan()
        settings = SchedulerSettings(bucket_edges=(16, 32, 64, 128), failures_alike_max=4)
        async with running(FaultyBackend(plan), scheduler=settings, canary=CanarySettings(interval_ns=0)) as bench:
            plan.fail_every = True
            answers = await asyncio.gather(
                *(bench.engine.embed(call("hello", "world")) for _ in range(8)), return_exceptions=True
            )

            assert len(bench.fatal) == 1
            assert "known to be good" in bench.fatal[0]
            assert {type(answer) for answer in answers} <= {ItemFailed, EngineFailed}
            assert EngineFailed in {type(answer) for answer in answers}
