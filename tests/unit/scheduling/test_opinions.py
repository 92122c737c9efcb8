"""What each policy would say, for people who look at all of them."""

from __future__ import annotations

from embedserve.scheduling.admission.latency_p95 import LatencyP95Policy
from embedserve.scheduling.admission.throughput import ThroughputPolicy
from embedserve.scheduling.scheduler import Scheduler
from embedserve.scheduling.settings import LatencyP95Settings, ThroughputSettings
from tests.unit.scheduling.making import MS, small_scheduler, submission


def scheduler() -> Scheduler:
    policies = [
        ThroughputPolicy(ThroughputSettings(max_drain_ns=1)),
        LatencyP95Policy(LatencyP95Settings(slo_ns=1000 * MS)),
    ]
    return small_scheduler(policies, max_queue_items=4)


class TestOpinions:
    """Every policy is asked, also after one has refused, and nothing is taken or learned."""

    def test_an_idle_server_is_refused_nothing(self) -> None:
        load, said = scheduler().opinions(10, 0)

        assert load.idle
        assert said == {"queue": None, "deadline": None, "throughput": None, "latency_p95": None}

    def test_each_policy_speaks_for_itself(self) -> None:
        busy = scheduler()
        busy.submit(submission(1, 10, 10, 10, 10), 0)
        before = busy.depth
        load, said = busy.opinions(10, 0)

        refusals = {name: refusal.reason for name, refusal in said.items() if refusal is not None}
        assert refusals == {"queue": "QUEUE_FULL", "throughput": "DRAIN_TIME_EXCEEDED"}
        assert load.waiting_items == 4
        assert busy.depth == before
