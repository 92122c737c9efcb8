"""Who is refused, by whom, and when to come back."""

from random import Random

import pytest

from embedserve.scheduling.admission import Candidate, LoadState, retry_after_ms
from embedserve.scheduling.admission.deadline import DeadlinePolicy
from embedserve.scheduling.admission.latency_p95 import LatencyP95Policy
from embedserve.scheduling.admission.queue import QueuePolicy
from embedserve.scheduling.admission.sojourn import OnlineQuantile, SojournWindow
from embedserve.scheduling.admission.throughput import ThroughputPolicy
from embedserve.scheduling.item import Admitted, Priority, Rejection, Submission, Succeeded
from embedserve.scheduling.scheduler import Scheduler
from embedserve.scheduling.settings import LatencyP95Settings, ThroughputSettings
from tests.unit.scheduling.making import MS, S, small_scheduler, small_settings, submission


def candidate(tokens=10, items=1, deadline_ns=None, estimated=False, **stage):
    return Candidate(tokens, items, deadline_ns, Priority.DEFAULT, "", estimated, **stage)


def advisory(tokens=10, items=1):
    return Candidate(tokens, items, None, Priority.DEFAULT, "", True, True)


def load(waiting=(10, 100), running=(0, 0), drain=0, drain_with=0, predicted=0, theta=1.0, old=False):
    return LoadState(*waiting, *running, 0, drain, drain_with, predicted, theta, 1_000.0, old)


IDLE = (0, 0)


class TestQueue:
    policy = QueuePolicy(small_settings(max_queue_items=100, max_queue_tokens=1_000))

    def test_counts_what_waits_and_what_runs(self):
        assert self.policy.judge(candidate(10, 1), load((50, 100), (49, 100)), 0) is None
        assert self.policy.judge(candidate(10, 2), load((50, 100), (49, 100)), 0).reason == "QUEUE_FULL"
        assert self.policy.judge(candidate(801, 1), load((50, 100), (49, 100)), 0).reason == "QUEUE_FULL"

    def test_says_when_enough_will_have_gone(self):
        refused = self.policy.judge(candidate(10, 50), load((100, 1_000), drain=8 * S), 0)

        assert refused.retry_after_ms == 4_000

    def test_what_never_fits_may_not_come_back(self):
        refused = self.policy.judge(candidate(10, 101), load(IDLE), 0)

        assert (refused.policy, refused.retry_after_ms) == ("too_large", None)


class TestDeadline:
    policy = DeadlinePolicy()

    def test_refuses_what_would_end_too_late(self):
        assert self.policy.judge(candidate(deadline_ns=100), load(predicted=100), 0) is None
        assert self.policy.judge(candidate(deadline_ns=99), load(predicted=100), 0).reason == "DEADLINE_UNREACHABLE"
        assert self.policy.judge(candidate(), load(predicted=10**18), 0) is None

    def test_predictions_that_were_too_short_are_raised_and_never_lowered(self):
        assert self.policy.judge(candidate(deadline_ns=150), load(predicted=100, theta=1.6), 0) is not None
        assert self.policy.judge(candidate(deadline_ns=99), load(predicted=100, theta=0.5), 0) is not None

    @pytest.mark.parametrize(
        ("left", "wait", "own", "admitted"),
        [
            (200, 100, 100, True),
            (199, 100, 100, False),
            (1_400, 1_000, 200, True),  # two passes of 200 may take twice as long
            (1_399, 1_000, 200, False),
        ],
    )
    def test_leaves_room_for_passes_that_take_longer(self, left, wait, own, admitted):
        """Two passes at most; over many, what is too slow and too fast evens out."""
        state = load(predicted=wait)
        state.pass_ns = own

        assert (DeadlinePolicy(2.0).judge(candidate(deadline_ns=left), state, 0) is None) is admitted

    def test_an_idle_server_has_no_edge(self):
        state = load(IDLE, predicted=100)
        state.pass_ns = 100

        assert DeadlinePolicy(2.0).judge(candidate(deadline_ns=100), state, 0) is None

    def test_an_idle_server_refuses_but_not_for_good(self):
        """The estimate may be of a slow moment: a client that is told never would not come back when it has passed."""
        refused = self.policy.judge(candidate(deadline_ns=50_000_000), load(IDLE, predicted=100_000_000), 0)

        assert (refused.reason, refused.retry_after_ms) == ("DEADLINE_TOO_SHORT", 100)

    def test_an_old_estimate_is_probed(self):
        """A wrong estimate that refuses everybody would never be corrected."""
        assert self.policy.judge(candidate(deadline_ns=50), load(IDLE, predicted=100, old=True), 0) is None
        assert self.policy.judge(candidate(deadline_ns=50), load(predicted=100, old=True), 0) is not None

    def test_a_server_that_was_once_slow_recovers(self):
        """One pass of 10 s, then nobody is admitted with a 1 s deadline, until the estimate is old."""
        s = small_scheduler()
        s.submit(submission(1, 8), 0)
        s.complete(s.next_batch(0).id, Succeeded(10 * S), 10 * S)

        assert s.submit(submission(2, 8, deadline_ns=11 * S), 10 * S).policy == "deadline"
        assert isinstance(s.submit(submission(3, 8, deadline_ns=13 * S), 12 * S), Admitted)

        s.complete(s.next_batch(12 * S).id, Succeeded(1 * MS), 12 * S)
        for number in range(4, 60):
            now = 12 * S + number * 2 * S
            s.submit(Submission(number, number, (8,), now, now + S), now)
            if (batch := s.next_batch(now)) is not None:
                s.complete(batch.id, Succeeded(1 * MS), now + 1 * MS)

        assert s.cost.predict_ns(8) < 1 * S


class TestThroughput:
    policy = ThroughputPolicy(ThroughputSettings(max_drain_ns=1 * S))

    def test_refuses_what_drains_too_late(self):
        assert self.policy.judge(candidate(), load(drain_with=1 * S), 0) is None
        assert self.policy.judge(candidate(), load(drain_with=1 * S + 1), 0).reason == "DRAIN_TIME_EXCEEDED"

    def test_an_idle_server_takes_anything(self):
        """Nothing could make it readier for this one."""
        assert self.policy.judge(candidate(), load(IDLE, drain_with=60 * S), 0) is None

    def test_says_when_it_fits_under_the_resume_level(self):
        refused = self.policy.judge(candidate(), load(drain=1 * S, drain_with=1_100 * MS), 0)

        assert refused.retry_after_ms == 300

    def test_counts_waiting_running_and_this(self):
        """Running work counts (coral left it out)."""
        s = small_scheduler(
            [ThroughputPolicy(ThroughputSettings(max_drain_ns=20 * MS))], initial_batch_ns=0, initial_token_ns=100_000
        )
        s.submit(submission(1, *[8] * 8), 0)
        s.submit(submission(2, *[8] * 8), 0)
        s.next_batch(0)

        assert s.judge(64, 8, now_ns=0) is None
        assert s.judge(80, 10, now_ns=0).policy == "throughput"
        assert s.judge(80, 10, now_ns=5 * MS) is None  # the running batch is nearly done


def settings(**changes):
    base = {
        "slo_ns": S,
        "soft_ns": 500 * MS,
        "hard_ns": S,
        "min_samples": 10,
        "window_ns": 5 * S,
    }
    return LatencyP95Settings(**(base | changes))


class TestLatencyP95:
    busy = staticmethod(lambda **changes: load(**({"predicted": 500 * MS} | changes)))

    def shed(self, policy, now, n=2_000, **changes):
        return sum(policy.judge(candidate(), self.busy(**changes), now) is not None for _ in range(n)) / n

    def observed(self, sojourn, n=100, **changes):
        policy = LatencyP95Policy(settings(**changes))
        for _ in range(n):
            policy.observe_sojourn(sojourn, 0, timed_out=False)
        return policy

    def test_sheds_nothing_below_soft(self):
        assert self.shed(self.observed(450 * MS), 0) == 0

    def test_the_share_ramps_and_leaves_a_way_in(self):
        shares = [self.shed(self.observed(ms * MS), 0) for ms in (550, 700, 850, 5_000)]

        assert shares == sorted(shares)
        assert shares[0] == pytest.approx(0.25, abs=0.06)
        assert shares[-1] == pytest.approx(0.9, abs=0.03)

    def test_hysteresis(self):
        """Between release and soft it depends on where it came from."""
        policy = self.observed(450 * MS)
        low = policy.shed_share(0)
        for _ in range(200):
            policy.observe_sojourn(900 * MS, 1 * S, timed_out=False)
        policy.shed_share(1 * S)
        for _ in range(20_000):
            policy.observe_sojourn(450 * MS, 2 * S, timed_out=False)

        assert low == 0
        assert policy.shed_share(2 * S) > 0

        for _ in range(400_000 // 100):
            policy.observe_sojourn(100 * MS, 7 * S, timed_out=False)

        assert policy.shed_share(7 * S) == 0

    def test_timeouts_count(self):
        """A timeout is a miss however early the caller gave up (coral sampled successes only: D9)."""
        policy = LatencyP95Policy(settings())
        for k in range(100):
            policy.observe_sojourn(50 * MS, 0, timed_out=k % 10 == 0)

        assert self.shed(policy, 0) == pytest.approx(0.9, abs=0.03)

    def test_history_alone_refuses_nobody(self):
        policy = self.observed(5 * S)

        assert self.shed(policy, 0, predicted=100 * MS) == 0
        assert self.shed(policy, 0, waiting=IDLE) == 0

    def test_the_window_forgets(self):
        assert self.shed(self.observed(5 * S), 6 * S) == 0

    def test_who_only_asks_moves_no_decision(self):
        """A balancer's polls: neither the coin, nor who was let through, nor the hysteresis."""
        asked, alone = self.observed(600 * MS), self.observed(600 * MS)
        answers = []
        for policy in (asked, alone):
            told = [policy.judge(candidate(), self.busy(), 0) is None]
            for k in range(200):
                if policy is asked:
                    for predicted in (400 * MS, 500 * MS, 2 * S):
                        policy.judge(advisory(), self.busy(predicted=predicted), 0)
                told.append(policy.judge(candidate(estimated=k % 2 == 0), self.busy(), 0) is None)
            answers.append(told)

        assert answers[0] == answers[1]
        assert len(set(answers[0])) == 2

        policy = self.observed(900 * MS)
        policy.judge(advisory(), self.busy(), 0)

        assert policy.shedding is False

    @pytest.mark.parametrize(("p95_ms", "refused"), [(450, False), (600, False), (850, True), (5_000, True)])
    def test_who_only_asks_is_told_what_most_would_be(self, p95_ms, refused):
        policy = self.observed(p95_ms * MS)

        assert {policy.judge(advisory(), self.busy(), 0) is not None for _ in range(100)} == {refused}
        assert policy.judge(advisory(), load(IDLE), 0) is None
        assert policy.judge(advisory(), self.busy(predicted=2 * S), 0) is not None

    def test_few_samples_say_nothing(self):
        assert self.shed(self.observed(5 * S, n=9), 0) == 0

    def test_predicts(self):
        policy = LatencyP95Policy(settings())

        assert policy.judge(candidate(), load(predicted=900 * MS, theta=1.1), 0) is None
        assert policy.judge(candidate(), load(predicted=900 * MS, theta=1.2), 0).reason == "PREDICTED_WAIT_EXCEEDS_SLO"
        assert policy.judge(candidate(), load(IDLE, predicted=9 * S), 0) is None

    def test_the_coin_is_thrown_once_a_request(self):
        """The estimate and the exact judgement together shed what was meant, not its square."""
        policy = self.observed(5 * S)
        passed = 0
        for _ in range(4_000):
            if policy.judge(candidate(estimated=True), self.busy(), 0) is None:
                passed += policy.judge(candidate(), self.busy(), 0) is None

        assert passed / 4_000 == pytest.approx(0.1, abs=0.02)

    @pytest.mark.parametrize("watched", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("together", [1, 20])
    def test_and_once_a_request_that_was_judged_unread(self, watched, together):
        """Three judgements, whatever share of the calls has the first of them and however many are on their way."""
        policy, rng = self.observed(700 * MS), Random(3)
        share = policy.shed_share(0)
        way, refused, n = [], 0, 6_000
        assert 0.3 < share < 0.7

        for _ in range(n):
            unread = rng.random() < watched
            stages = [candidate(estimated=True, unread=True)] if unread else []
            stages.append(candidate(estimated=True, drawn=unread))
            if any(policy.judge(stage, self.busy(), 0) is not None for stage in stages):
                refused += 1
            else:
                way.append(unread)
            if len(way) >= together:
                way.pop(rng.randrange(len(way)))
                refused += policy.judge(candidate(), self.busy(), 0) is not None

        assert refused / n == pytest.approx(share, abs=0.02)

    def test_who_went_all_the_way_leaves_no_free_pass(self):
        """Who is judged on exact tokens alone draws his own lot."""
        policy = self.observed(5 * S)
        share = policy.shed_share(0)
        for _ in range(2_000):
            stages = candidate(estimated=True, unread=True), candidate(estimated=True, drawn=True), candidate()
            any(policy.judge(stage, self.busy(), 0) is not None for stage in stages)

        assert self.shed(policy, 0) == pytest.approx(share, abs=0.02)

    def test_what_was_judged_unread_is_still_refused_by_prediction(self):
        policy = self.observed(600 * MS)

        assert policy.judge(candidate(estimated=True, drawn=True), self.busy(predicted=2 * S), 0) is not None

    @pytest.mark.parametrize("stages", [("unread", "estimate", "exact"), ("estimate", "exact"), ("exact",)])
    def test_the_same_events_give_the_same_decisions_through_all_stages(self, stages):
        def decide():
            policy = self.observed(700 * MS)
            made = {
                "unread": lambda: candidate(estimated=True, unread=True),
                "estimate": lambda: candidate(estimated=True, drawn="unread" in stages),
                "exact": candidate,
            }
            return [policy.judge(made[stage](), self.busy(), 0) is None for _ in range(100) for stage in stages]

        once = decide()
        assert once == decide()
        assert len(set(once)) == 2

    def test_the_same_events_give_the_same_decisions(self):
        def decide():
            policy = self.observed(700 * MS)
            return [policy.judge(candidate(), self.busy(), 0) is None for _ in range(200)]

        assert decide() == decide()

    def test_a_scrape_moves_no_decision(self):
        one, two = self.observed(700 * MS), self.observed(700 * MS)
        for _ in range(100):
            two.figures(0)

            assert (one.judge(candidate(), self.busy(), 0) is None) == (two.judge(candidate(), self.busy(), 0) is None)


class TestCombination:
    def test_either_refuses(self):
        throughput = ThroughputPolicy(ThroughputSettings(max_drain_ns=1 * MS))
        s = small_scheduler([LatencyP95Policy(settings()), throughput])
        s.submit(submission(1, 8), 0)

        assert s.submit(submission(2, *[8] * 50), 0).policy == "throughput"
        assert set(s.figures(0)) == {"queue", "deadline", "latency_p95", "throughput"}


class TestSojournWindow:
    def test_quantiles_within_a_bin(self):
        """Against sorting: never below the true value, and at most 3.2 % above."""
        window, rng, samples = SojournWindow(10 * S), Random(1), []
        for k in range(5_000):
            samples.append(int(rng.lognormvariate(17, 1.5)))
            window.add(samples[-1], k)
        samples.sort()
        for q in (0.5, 0.95, 0.99, 1.0):
            true = samples[max(int(q * len(samples)) - 1, 0)]

            assert true <= window.quantile_ns(q, 5_000) <= 1.032 * true + 1

    def test_slides(self):
        window = SojournWindow(10 * S)
        window.add(1 * S, 0)
        window.add(1 * MS, 9 * S)

        assert window.count(9 * S) == 2
        assert window.count(12 * S) == 1
        assert window.quantile_ns(1.0, 12 * S) < 2 * MS
        assert window.quantile_ns(1.0, 100 * S) is None

    @pytest.mark.parametrize("duration", [0, 1, 1_023, 1_024, 10**15])
    def test_takes_any_duration(self, duration):
        window = SojournWindow(10 * S)
        window.add(duration, 0)

        assert window.quantile_ns(0.5, 0) > 0


class TestOnlineQuantile:
    def test_follows_the_quantile(self):
        theta, rng, above = OnlineQuantile(0.95, 0.02), Random(2), 0
        for k in range(20_000):
            ratio = rng.lognormvariate(0.5, 0.3)
            above += k >= 2_000 and ratio > theta.value
            theta.observe(ratio)

        assert above / 18_000 == pytest.approx(0.05, abs=0.01)

    def test_one_outlier_hardly_moves_it(self):
        theta = OnlineQuantile(0.95, 0.02)
        theta.observe(1e9)

        assert theta.value == pytest.approx(1.019)


class TestRetryAfter:
    @pytest.mark.parametrize(("wait", "ms"), [(0, 1), (-5, 1), (1, 1), (1_000_001, 2)])
    def test_at_least_one_millisecond(self, wait, ms):
        assert retry_after_ms(wait) == ms


class TestClasses:
    """Nobody is refused for work that comes after him."""

    LIMIT_NS = 100_000

    def judged(self, waiting: Priority, asking: Priority, tenant: str = "other") -> Rejection | None:
        """What one item of a class is told beside a backlog of another class, of six times the drain limit."""
        settings = small_settings(max_queue_items=10_000, max_queue_tokens=1_000_000)
        free = Scheduler(settings)
        limited = Scheduler(settings, [ThroughputPolicy(ThroughputSettings(max_drain_ns=self.LIMIT_NS))])
        for s in (free, limited):
            s.cost.learn(64, 64, 10_000, 0)
        backlog = submission(1, *[8] * 8, priority=waiting, tenant="backlog")
        count = 0
        while free.load(0).drain_ns < 6 * self.LIMIT_NS:
            count += 1
            free.submit(backlog._replace(id=count), 0)
            # As a stream's later windows are: by the hard limits alone.
            limited.submit(backlog._replace(id=count, continuation=True), 0)
        return limited.judge(8, 1, priority=asking, tenant=tenant, now_ns=0)

    @pytest.mark.parametrize("asking", [Priority.INTERACTIVE, Priority.DEFAULT])
    def test_a_backlog_of_bulk_refuses_no_class_above(self, asking: Priority) -> None:
        assert self.judged(Priority.BULK, asking) is None

    @pytest.mark.parametrize("asking", [Priority.DEFAULT, Priority.BULK])
    def test_a_backlog_of_a_class_above_does(self, asking: Priority) -> None:
        rejection = self.judged(Priority.INTERACTIVE, asking)

        assert rejection is not None
        assert rejection.reason == "DRAIN_TIME_EXCEEDED"

    def test_in_one_class_a_modest_tenant_is_let_in_and_the_greedy_one_is_not(self) -> None:
        assert self.judged(Priority.BULK, Priority.BULK) is None
        assert self.judged(Priority.BULK, Priority.BULK, tenant="backlog") is not None
