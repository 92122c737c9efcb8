"""Work that nobody wants any more, and the engine's own probes: what the scheduler is told and what it learns."""

import pytest

from embedserve.scheduling.admission.throughput import ThroughputPolicy
from embedserve.scheduling.item import Admitted, Failed, Rejection, Settled, Skipped, Succeeded, Verdict
from embedserve.scheduling.settings import ThroughputSettings
from tests.unit.scheduling.making import MS, items, small_scheduler, submission


class TestSkipped:
    """A batch that the device passed over, because all in it had gone or were too late."""

    def test_those_past_their_deadline_are_told_and_the_cancelled_are_not(self):
        s = small_scheduler()
        s.submit(submission(1, 5, 6, deadline_ns=10 * MS), 0)
        s.submit(submission(2, 7), 0)
        batch = s.next_batch(0)
        s.cancel(2, 1 * MS)

        settlement = s.complete(batch.id, Skipped(), 10 * MS)

        assert settlement.settled == (Settled(1, (0, 1), Verdict.EXPIRED),)
        assert (s.depth.running_items, s.depth.running_tokens, s.depth.waiting_items) == (0, 0, 0)

    def test_it_says_nothing_of_the_device(self):
        """A skip is no failed pass: it neither makes the device suspect nor ends a streak."""
        s = small_scheduler(failures_alike_max=2)
        for number, outcome in enumerate((Failed(), Skipped(), Skipped(), Failed()), start=1):
            s.submit(submission(number, 5), 0)
            batch = s.next_batch(0)
            if isinstance(outcome, Skipped):
                s.cancel(number, 0)
            suspect_before = s.suspect
            s.complete(batch.id, outcome, 0)

        assert suspect_before is None
        assert s.suspect

    def test_a_batch_that_somebody_wants_is_not_skipped(self):
        s = small_scheduler()
        s.submit(submission(1, 5), 0)
        batch = s.next_batch(0)

        with pytest.raises(AssertionError, match="wanted"):
            s.complete(batch.id, Skipped(), 0)


class TestOverdue:
    """A deadline that comes while items run: its submission is named once, so that its caller can be told at once."""

    def test_it_is_named_at_its_deadline_and_once(self):
        s = small_scheduler()
        s.submit(submission(1, 5, deadline_ns=10 * MS), 0)
        s.next_batch(0)

        assert s.wake_at(0) == 10 * MS
        s.expire(10 * MS - 1)
        assert s.overdue() == ()
        assert s.expire(10 * MS) == ()
        assert s.overdue() == (1,)
        assert s.overdue() == ()

    def test_one_that_ended_meanwhile_is_not_named(self):
        s = small_scheduler()
        s.submit(submission(1, 5, deadline_ns=10 * MS), 0)
        batch = s.next_batch(0)
        s.expire(10 * MS)
        s.complete(batch.id, Succeeded(1000), 11 * MS)

        assert s.overdue() == ()

    def test_items_that_wait_expire_and_those_that_run_make_it_overdue(self):
        s = small_scheduler(max_batch_items=1)
        s.submit(submission(1, 5, 5, deadline_ns=10 * MS), 0)
        batch = s.next_batch(0)

        assert items(batch) == [(1, 0)]
        assert s.expire(10 * MS) == (Settled(1, (1,), Verdict.EXPIRED),)
        assert s.overdue() == (1,)


class TestProbe:
    """The engine's own submission: no policy refuses it and none learns from it."""

    def test_a_policy_that_refuses_others_takes_it(self):
        s = small_scheduler(policies=[ThroughputPolicy(ThroughputSettings(max_drain_ns=1))])
        s.submit(submission(1, 5, continuation=True), 0)

        assert isinstance(s.submit(submission(2, 5), 0), Rejection)
        assert isinstance(s.submit(submission(3, 5)._replace(probe=True), 0), Admitted)

    @pytest.mark.parametrize("probe", [False, True])
    def test_theta_does_not_move_by_its_wait(self, probe):
        s = small_scheduler()
        before = s.theta
        s.submit(submission(1, 5)._replace(probe=probe), 0)
        s.complete(s.next_batch(0).id, Succeeded(1000), 1000 * MS)

        assert (s.theta == before) is probe

    @pytest.mark.parametrize("probe", [False, True])
    def test_the_cost_model_does_not_learn_from_its_pass(self, probe):
        """A text that goes alone through a cold device says nothing of the rate under load."""
        s = small_scheduler()
        before = s.cost.tokens_per_second
        s.submit(submission(1, 5)._replace(probe=probe), 0)
        s.complete(s.next_batch(0).id, Succeeded(50 * MS), 50 * MS)

        assert (s.cost.tokens_per_second == before) is probe
