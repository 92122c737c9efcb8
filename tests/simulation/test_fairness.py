"""Who waits for whom: a bulk job beside one caller, a greedy tenant beside modest ones, a crowd of made-up names."""

from dataclasses import replace

import pytest

from embedserve.scheduling.settings import SchedulerSettings
from tests.simulation.simulator import Simulator
from tests.simulation.workloads import MS, SCENARIOS, SMALL, Request, S, bucketed, length, poisson

SETTINGS = pytest.mark.parametrize("settings", [SCENARIOS["steady"].settings, bucketed()], ids=["packed", "bucketed"])


def run(requests, settings, seed=5, slots=1):
    scenario = replace(SCENARIOS["steady"], requests=requests, settings=settings)
    return Simulator(seed, scenario, slots=slots, checked=False, trace=False).run()


class TestBulk:
    @SETTINGS
    def test_ten_thousand_texts_move_the_p99_of_a_caller_by_one_batch(self, settings):
        """Against the same caller alone."""

        def ones(rng):
            for at in poisson(rng, 100, 2 * S):
                yield Request(at + 5 * MS, (length(rng, 10, 16),), name="one")

        def beside(rng):
            yield Request(0, tuple(30 for _ in range(10_000)), name="bulk")
            yield from ones(rng)

        p99 = {}
        for requests in (ones, beside):
            waits = sorted(s.sojourn_ns for s in run(requests, settings).named("one"))
            p99[requests] = waits[int(0.99 * len(waits))]
        device = SCENARIOS["steady"].device
        batch_ns = (device.batch_ns + device.token_ns * settings.max_batch_tokens) * (1 + device.jitter)

        # It waits for a pass of the job, seven tenths of a batch, and rides in one that the job fills by a fifth.
        assert p99[beside] - p99[ones] <= batch_ns


class TestTenants:
    @SETTINGS
    def test_a_hundred_flows_have_no_more_than_one(self, settings):
        """Two tenants ask for all: one by 100 requests, one by a single one. Each gets half."""

        def requests(rng):
            for k in range(100):
                yield Request(k, tuple(length(rng) for _ in range(100)), tenant="many", name=f"many{k}")
            yield Request(200, tuple(length(rng) for _ in range(10_000)), tenant="one", name="one")

        simulator = run(requests, settings)
        done = {"many": 0, "one": 0}
        for story in simulator.stories.values():
            done[story.request.tenant] += sum(b <= simulator.batches // 2 for b in story.batch_of.values())

        assert 0.9 <= done["many"] / done["one"] <= 1.1

    def test_names_past_the_limit_share_one_place(self):
        """Four hundred made-up names have no more than the one honest tenant beside their crowd."""
        settings = SchedulerSettings(**(SMALL | {"max_tenants": 2}))

        def requests(rng):
            yield Request(0, tuple(30 for _ in range(2_000)), tenant="honest", name="honest")
            yield Request(0, tuple(30 for _ in range(2_000)), tenant="second", name="second")
            for k in range(400):
                yield Request(1, (30,) * 10, tenant=f"made-up{k}", name="crowd")

        simulator = run(requests, settings)
        third = simulator.batches // 3
        early = {
            name: sum(b <= third for s in simulator.named(name) for b in s.batch_of.values())
            for name in ("honest", "crowd")
        }

        assert early["crowd"] <= 1.15 * early["honest"]


class TestClockJump:
    """SIGSTOP for 20 s, then SIGCONT, in the middle of a pass."""

    @pytest.mark.parametrize("slots", [1, 2])
    def test_what_expired_is_dropped_and_nobody_is_refused_after_it(self, slots):
        """I5 is checked at each dispatch: nothing stale runs. A worker's clock goes on while it is stopped, too."""
        simulator = Simulator(17, "clock_jump", slots=slots).run()
        after = [s for s in simulator.stories.values() if s.request.at_ns > 300 * MS]
        stopped = [s for s in simulator.stories.values() if s.ended_ns - s.arrived_ns >= 10 * S]

        assert simulator.scheduler.checks["I5"] > 100
        assert len(after) > 100
        assert {s.outcome for s in after} <= {"done", "timed_out"}
        assert stopped
        assert all(s.request.at_ns < 700 * MS for s in stopped)

    def test_the_cost_model_does_not_learn_it(self):
        """One pass counts as ten times its prediction at most, and is forgotten with the next twenty."""
        simulator = Simulator(17, "clock_jump", checked=False).run()

        assert simulator.scheduler.cost.predict_ns(1_024) <= 1.2 * 12.24 * MS
