"""The limit on tokens in flight that finds itself."""

import pytest

from embedserve.scheduling.admission.gradient import GradientPolicy
from embedserve.scheduling.item import Succeeded
from embedserve.scheduling.settings import GradientSettings
from tests.unit.scheduling.making import MS, small_scheduler, submission
from tests.unit.scheduling.test_admission import IDLE, advisory, candidate, load

SETTINGS = GradientSettings(max_batch_tokens=100)


def policy(**changes):
    return GradientPolicy(GradientSettings(**({"max_batch_tokens": 100} | changes)))


def passes(policy, signal, count, *, used=True):
    """So many passes of 10 ms, one request each, whose wait is ``signal`` after normalising."""
    for _ in range(count):
        if used:
            policy.judge(candidate(10), load((1, int(policy.limit_tokens) - 20)), 0)
        passes.now_ns += 10 * MS
        policy.observe_wait(int(signal * SETTINGS.batching_ratio * 10 * MS), 10 * MS, passes.now_ns)


passes.now_ns = 0


class TestLimit:
    def test_counts_waiting_running_and_this(self):
        p = policy()

        assert p.judge(candidate(50), load((1, 100), (1, 50)), 0) is None
        assert p.judge(candidate(51), load((1, 100), (1, 50)), 0).reason == "TOKENS_IN_FLIGHT_EXCEEDED"

    def test_a_pass_that_is_full_by_items_is_a_pass(self):
        """Items of 3 tokens where 5 fill a pass: each counts for 20 tokens, whether it waits, runs or comes."""
        p = policy(max_batch_items=5)

        assert p.judge(candidate(3, 1), load((6, 18), (3, 9)), 0) is None
        refused = p.judge(candidate(6, 2), load((6, 18), (3, 9)), 0)
        assert (refused.figures["in_flight_tokens"], refused.figures["tokens"]) == (180, 40)
        assert p.judge(candidate(50, 1), load((6, 160)), 0) is not None, "long items count by their tokens"

    def test_an_idle_server_takes_anything(self):
        assert policy().judge(candidate(10_000), load(IDLE), 0) is None

    def test_what_is_larger_than_the_limit_waits_for_half_of_it(self):
        """It would never be taken otherwise, unless it met an idle moment."""
        assert policy().judge(candidate(10_000), load((1, 100)), 0) is None
        assert policy().judge(candidate(10_000), load((1, 101)), 0) is not None

    def test_says_when_enough_will_have_gone(self):
        refused = policy().judge(candidate(50), load((1, 200), drain=40 * MS), 0)

        assert refused.retry_after_ms == 10

    def test_grows_while_nothing_queues_in_vain(self):
        p = policy()
        passes(p, 1.0, 21)

        assert p.limit_tokens == pytest.approx(200 + 20 * 10)

    def test_ends_at_its_ceiling(self):
        p = policy(max_batches=3)
        passes(p, 1.0, 100)

        assert p.limit_tokens == 300

    def test_an_idle_night_teaches_nothing(self):
        p = policy()
        passes(p, 1.0, 100, used=False)

        assert p.limit_tokens == 200

    def test_who_only_asks_teaches_nothing(self):
        """A balancer's poll is no load."""
        p = policy()
        for _ in range(20):
            p.judge(advisory(), load((1, int(p.limit_tokens) - 20)), 0)
            passes(p, 1.0, 1, used=False)

        assert p.limit_tokens == 200

    def test_shrinks_when_requests_outwait_their_batch_and_never_starves_the_device(self):
        p = policy()
        passes(p, 1.0, 101)
        high = p.limit_tokens
        passes(p, 3.0, 10)

        assert p.limit_tokens < high

        passes(p, 50.0, 100)

        assert p.limit_tokens == 200

    def test_comes_to_rest_where_waits_say(self):
        """limit * (1 - tolerance / s) = headroom."""
        p = policy()
        passes(p, 1.3 / 0.875, 500)

        assert p.limit_tokens == pytest.approx(50 / (1 - 0.875), rel=0.01)

    def test_timeouts_count(self):
        p = policy()
        passes(p, 1.0, 101)
        high = p.limit_tokens
        for k in range(20):
            p.observe_sojourn(0, passes.now_ns + k * MS, timed_out=True)

        assert p.limit_tokens < 0.5 * high

    def test_answers_in_time_count_once(self):
        """A served request is told by its wait; its sojourn holds times that are not the device's."""
        p = policy()
        passes(p, 1.0, 101)
        high = p.limit_tokens
        for k in range(20):
            p.observe_sojourn(10**12, passes.now_ns + k * MS, timed_out=False)

        assert p.limit_tokens == high

    def test_one_pass_moves_it_once(self):
        """However many requests rode in it: their mean counts."""
        p, q = policy(), policy()
        for k in range(1, 4):
            for _ in range(50):
                p.observe_wait(40 * MS, 10 * MS, k)
            q.observe_wait(40 * MS, 10 * MS, k)

        assert p.limit_tokens == q.limit_tokens


class TestInTheScheduler:
    def test_it_is_told_the_wait_and_the_time_of_its_pass(self):
        p = GradientPolicy(GradientSettings(max_batch_tokens=64))
        s = small_scheduler([p], initial_batch_ns=1 * MS, initial_token_ns=0 + 1)
        for number in (1, 2):
            s.submit(submission(number, 8), 0)
            s.complete(s.next_batch(0).id, Succeeded(1 * MS), number * 8 * MS)

        assert s.figures(0)["gradient"]["signal"] == pytest.approx(8 / 1.6, rel=0.01)

    def test_it_combines(self):
        s = small_scheduler([GradientPolicy(GradientSettings(max_batch_tokens=8, min_batches=1))])
        s.submit(submission(1, 8), 0)
        refused = s.submit(submission(2, 8), 0)

        assert (refused.policy, refused.retry_after_ms >= 1) == ("gradient", True)
