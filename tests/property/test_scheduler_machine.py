"""The scheduler against a plain model, under any order of calls.

Goal: no sequence of submissions, cancellations, outcomes and clock steps breaks an invariant. Method: hypothesis
draws the calls; ``CheckedScheduler`` holds the model, checks I1 to I12 at each call by name, and replays the log at
the end (I10).
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from embedserve.scheduling.admission.gradient import GradientPolicy
from embedserve.scheduling.admission.latency_p95 import LatencyP95Policy
from embedserve.scheduling.admission.throughput import ThroughputPolicy
from embedserve.scheduling.item import Failed, Fatal, OutOfMemory, Priority, Shape, Submission, Succeeded
from embedserve.scheduling.settings import GradientSettings, LatencyP95Settings, SchedulerSettings, ThroughputSettings
from tests.simulation.checkers import CheckedScheduler

MS = 1_000_000


def policies(which):
    made = {
        "throughput": lambda: ThroughputPolicy(ThroughputSettings(max_drain_ns=40 * MS)),
        "latency_p95": lambda: LatencyP95Policy(
            LatencyP95Settings(
                slo_ns=50 * MS,
                soft_ns=20 * MS,
                hard_ns=30 * MS,
                release_fraction=0.5,
                window_ns=500 * MS,
                min_samples=2,
            )
        ),
    }
    made["gradient"] = lambda: GradientPolicy(GradientSettings(max_batch_tokens=40, max_batches=4))
    return [made[name]() for name in which]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        shape=st.sampled_from(Shape),
        which=st.sampled_from(
            [(), (), ("throughput",), ("latency_p95",), ("gradient",), ("throughput", "latency_p95", "gradient")]
        ),
        hold=st.sampled_from([0, 0, 3 * MS]),
        sizes=st.sampled_from([(), (), (1, 2, 4)]),
        items=st.integers(1, 9),
        crowd=st.sampled_from([1, 2, 100]),
        alike=st.sampled_from([6, 1000]),
    )
    def start(self, shape, which, hold, sizes, items, crowd, alike):
        self.now = 1_000 * MS
        self.ids = 0
        self.which = which
        self.scheduler = CheckedScheduler(
            SchedulerSettings(
                shape=shape,
                bucket_edges=(4, 8, 16),
                max_batch_tokens=40,
                max_batch_items=items,
                max_queue_items=60,
                max_queue_tokens=400,
                max_queue_delay_ns=hold,
                max_wait_ns=20 * MS,
                batch_sizes=sizes if shape is Shape.BUCKETED else (),
                max_tenants=crowd,
                failures_alike_max=alike,
                initial_batch_ns=1 * MS,
                initial_token_ns=100_000,
            ),
            policies(which),
        )

    @rule(
        tokens=st.lists(st.integers(1, 17), min_size=1, max_size=20),
        flow=st.integers(0, 3),
        patience=st.sampled_from([None, None, 5, 20, 200]),
        priority=st.sampled_from(Priority),
        tenant=st.sampled_from(["", "a", "b"]),
        continuation=st.booleans(),
        late=st.sampled_from([0, 0, 30]),
        early=st.booleans(),
    )
    def submit(self, tokens, flow, patience, priority, tenant, continuation, late, early):
        self.ids += 1
        deadline = None if patience is None else self.now + patience * MS
        if early:
            self.scheduler.judge(
                sum(tokens), len(tokens), deadline_ns=deadline, priority=priority, tenant=tenant, now_ns=self.now
            )
        self.scheduler.submit(
            Submission(self.ids, flow, tokens, self.now - late * MS, deadline, priority, tenant, continuation), self.now
        )

    @precondition(lambda self: self.ids)
    @rule(back=st.integers(0, 8))
    def cancel(self, back):
        self.scheduler.cancel(max(self.ids - back, 1), self.now)

    @rule(step=st.sampled_from([0, 1, 3, 10, 25, 300]))
    def wait(self, step):
        self.now += step * MS

    @rule()
    def expire(self):
        self.scheduler.expire(self.now)

    @precondition(lambda self: len(self.scheduler.live) < 2)
    @rule(report_first=st.booleans())
    def dispatch(self, report_first):
        if report_first:
            self.scheduler.expire(self.now)
        self.scheduler.next_batch(self.now)

    @precondition(lambda self: self.scheduler.live)
    @rule(data=st.data(), kind=st.sampled_from(["ok", "ok", "ok", "nan", "oom", "failed", "failed", "fatal"]))
    def complete(self, data, kind):
        batch_id = data.draw(st.sampled_from(sorted(self.scheduler.live)))
        rows = self.scheduler.live[batch_id][0].rows
        elapsed = data.draw(st.integers(1, 5 * MS))
        if kind == "fatal" and data.draw(st.integers(0, 9)) != 0:
            kind = "ok"
        outcome = {
            "ok": lambda: Succeeded(elapsed),
            "nan": lambda: Succeeded(elapsed, data.draw(st.frozensets(st.integers(0, rows - 1), min_size=1))),
            "oom": OutOfMemory,
            "failed": Failed,
            "fatal": lambda: Fatal("device lost"),
        }[kind]()
        self.now += 1 * MS
        self.scheduler.complete(batch_id, outcome, self.now)

    @precondition(lambda self: self.scheduler.suspect)
    @rule(good=st.integers(0, 4))
    def canary(self, good):
        if good:
            self.scheduler.acquit(self.now)
        else:
            self.scheduler.fail("the canary failed")

    @rule(sojourn=st.integers(0, 60 * MS), timed_out=st.booleans())
    def observe(self, sojourn, timed_out):
        self.scheduler.observe_sojourn(sojourn, self.now, timed_out=timed_out)

    @rule()
    def wake(self):
        self.scheduler.wake_at(self.now)
        self.scheduler.load(self.now)

    @rule(sure=st.integers(0, 5))
    def drain(self, sure):
        if sure == 0:
            self.scheduler.drain()

    def teardown(self):
        """I9: after a drain, good passes empty the queue in as many batches as there are items at most."""
        if not hasattr(self, "scheduler"):
            return
        s = self.scheduler
        s.drain()
        for batch_id in sorted(s.live):
            if batch_id in s.live:
                s.complete(batch_id, Succeeded(1 * MS), self.now)
        if s.suspect:
            s.acquit(self.now)
        for _ in range(2 * len(s.items) + 1):
            s.expire(self.now)
            batch = s.next_batch(self.now)
            if batch is None:
                break
            s.complete(batch.id, Succeeded(1 * MS), self.now)
        s.finish(policies(self.which))


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=500,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
