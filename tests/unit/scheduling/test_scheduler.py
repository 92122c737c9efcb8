"""The scheduler as its driver sees it: submit, next_batch, complete, cancel, expire, drain, wake_at.

Method: few items, small limits, time as plain integers.
"""

import pytest

from embedserve.scheduling.item import (
    Admitted,
    Failed,
    Fatal,
    OutOfMemory,
    Priority,
    Rejection,
    Settled,
    Shape,
    Slice,
    Succeeded,
    Verdict,
)
from tests.unit.scheduling.making import MS, items, small_scheduler, submission

SHAPES = pytest.mark.parametrize("shape", list(Shape))


class TestLife:
    @SHAPES
    def test_one_item(self, shape):
        """An item is admitted, dispatched, settled once, and forgotten."""
        s = small_scheduler(shape=shape)

        assert isinstance(s.submit(submission(1, 5), 0), Admitted)

        batch = s.next_batch(0)

        assert batch.slices == (Slice(1, (0,)),)
        assert (batch.rows, batch.tokens, batch.attempt, batch.oldest_ns) == (1, 5, 0, 0)
        assert (batch.edge, batch.padded_tokens) == ((8, 8) if shape is Shape.BUCKETED else (5, 5))
        assert s.depth.running_items == 1

        done = s.complete(batch.id, Succeeded(1000), 10)

        assert done.settled == (Settled(1, (0,), Verdict.DONE, (0,)),)
        assert s.next_batch(11) is None
        assert (s.depth.waiting_items, s.depth.running_items, s.depth.oldest_arrived_ns) == (0, 0, None)

    @SHAPES
    def test_rows_are_numbered_through_the_slices(self, shape):
        """Row r of a batch is the r-th index of its slices."""
        s = small_scheduler(shape=shape)
        s.submit(submission(1, 5, 6), 0)
        s.submit(submission(2, 7), 0)
        batch = s.next_batch(0)

        settled = s.complete(batch.id, Succeeded(1000), 1).settled

        assert {x.submission_id: (x.indexes, x.rows) for x in settled} == {1: ((0, 1), (0, 1)), 2: ((0,), (2,))}

    @SHAPES
    def test_a_submission_larger_than_a_batch_is_split(self, shape):
        """No batch passes its limits, whatever one request holds (coral ran 2,000 rows where 512 were allowed: D7)."""
        s = small_scheduler(shape=shape)
        s.submit(submission(1, *[8] * 50), 0)
        seen = []
        while (batch := s.next_batch(0)) is not None:
            assert batch.rows <= 8
            assert batch.padded_tokens <= 64
            seen += items(batch)
            s.complete(batch.id, Succeeded(1000), 0)

        assert seen == [(1, i) for i in range(50)]

    def test_buckets_are_not_mixed_when_bucketed(self):
        s = small_scheduler(shape=Shape.BUCKETED)
        s.submit(submission(1, 5, 30, 6, 12), 0)
        batches = [s.next_batch(0) for _ in range(3)]

        assert sorted((b.edge, b.slices[0].indexes) for b in batches) == [(8, (0, 2)), (16, (3,)), (32, (1,))]
        assert s.next_batch(0) is None

    def test_lengths_share_a_batch_when_packed(self):
        s = small_scheduler()
        s.submit(submission(1, 5, 30, 6, 12), 0)
        batch = s.next_batch(0)

        assert (batch.slices, batch.edge, batch.tokens, batch.padded_tokens) == ((Slice(1, (0, 1, 2, 3)),), 30, 53, 53)

    def test_two_batches_may_be_live(self):
        """No item is in two of them (I4), and they may end in any order."""
        s = small_scheduler()
        s.submit(submission(1, *[8] * 16), 0)
        one, two = s.next_batch(0), s.next_batch(0)

        assert not set(items(one)) & set(items(two))
        assert s.depth.running_items == 6  # it takes several passes, and leaves room in each

        s.complete(two.id, Succeeded(1000), 5)
        s.complete(one.id, Succeeded(1000), 6)

        assert s.depth.running_items == 0

    def test_an_unknown_batch_is_a_broken_invariant(self):
        with pytest.raises(KeyError):
            small_scheduler().complete(7, Succeeded(1), 0)

    @pytest.mark.parametrize("tokens", [(), (0,), (3, 0)])
    def test_a_broken_submission_is_an_error(self, tokens):
        with pytest.raises(ValueError, match="at least one"):
            small_scheduler().submit(submission(1, *tokens), 0)

    def test_an_id_in_use_is_an_error(self):
        s = small_scheduler()
        s.submit(submission(1, 5), 0)

        with pytest.raises(ValueError, match="already known"):
            s.submit(submission(1, 5), 0)


class TestAdmission:
    @SHAPES
    def test_an_item_that_never_fits_is_refused_at_submit(self, shape):
        """It is refused for good instead of looping in the queue (text-embeddings-inference 723)."""
        s = small_scheduler(shape=shape)
        refused = s.submit(submission(1, 5, 33), 0)

        assert isinstance(refused, Rejection)
        assert (refused.policy, refused.reason, refused.retry_after_ms) == ("too_large", "ITEM_EXCEEDS_BATCH", None)
        assert s.depth.waiting_items == 0

    def test_all_or_none(self):
        s = small_scheduler(max_queue_items=10)
        s.submit(submission(1, *[5] * 8), 0)
        refused = s.submit(submission(2, 5, 5, 5), 0)

        assert (refused.policy, refused.reason) == ("queue", "QUEUE_FULL")
        assert refused.retry_after_ms >= 1
        assert s.depth.waiting_items == 8

    def test_judge_takes_nothing(self):
        s = small_scheduler(max_queue_items=10)

        assert s.judge(50, 10, now_ns=0) is None
        assert s.judge(50, 11, now_ns=0).policy == "too_large"
        assert s.depth.waiting_items == 0

    def test_a_continuation_is_judged_by_hard_limits_only(self):
        """A later window of an admitted stream is not refused for its deadline or while draining, but for memory."""
        s = small_scheduler(max_queue_items=10)
        s.drain()

        assert s.submit(submission(1, 5), 0).policy == "draining"
        assert isinstance(s.submit(submission(2, *[5] * 8, continuation=True, deadline_ns=1), 0), Admitted)
        assert s.submit(submission(3, *[5] * 8, continuation=True), 0).policy == "queue"

    def test_running_items_count_for_the_limit(self):
        """A failed batch comes back to the queue, and the limit must hold then too (I3)."""
        s = small_scheduler(max_queue_items=8)
        s.submit(submission(1, *[5] * 8), 0)
        batch = s.next_batch(0)

        assert s.submit(submission(2, 5), 0).policy == "queue"

        s.complete(batch.id, Succeeded(1000), 1)

        assert isinstance(s.submit(submission(2, 5), 1), Admitted)

    def test_a_deadline_in_the_past_is_refused(self):
        refused = small_scheduler().submit(submission(1, 5, deadline_ns=10), 10)

        assert (refused.policy, refused.reason, refused.retry_after_ms) == ("deadline", "DEADLINE_PASSED", None)


class TestCancel:
    @SHAPES
    def test_waiting_items_leave_at_once(self, shape):
        """Abandoned work takes no place in the queue (coral kept 139,264 tokens of it: D8)."""
        s = small_scheduler(shape=shape, max_queue_items=30)
        s.submit(submission(1, *[5, 20] * 15), 0)

        assert s.submit(submission(2, 5), 0).policy == "queue"
        assert s.cancel(1, 1) == 30
        assert isinstance(s.submit(submission(2, 5), 1), Admitted)
        assert items(s.next_batch(1)) == [(2, 0)]

    def test_running_items_are_dropped_without_a_settlement(self):
        s = small_scheduler()
        s.submit(submission(1, *[8] * 12), 0)
        s.submit(submission(2, 8), 0)
        batch = s.next_batch(0)
        waiting = s.depth.waiting_items

        assert s.cancel(1, 1) == sum(1 for i in range(12) if (1, i) not in items(batch))
        assert waiting >= 4

        settled = s.complete(batch.id, Succeeded(1000), 2).settled

        assert all(x.submission_id == 2 for x in settled)

    def test_retries_skip_the_cancelled(self):
        s = small_scheduler()
        s.submit(submission(1, 8, 8), 0)
        s.submit(submission(2, 8, 8), 0)
        batch = s.next_batch(0)
        s.cancel(1, 1)

        assert s.complete(batch.id, Failed(), 2).requeued == 2

        again = [*items(s.next_batch(2)), *items(s.next_batch(2))]

        assert sorted(again) == [(2, 0), (2, 1)]

    def test_cancelling_between_failure_and_retry_frees_the_place(self):
        s = small_scheduler()
        s.submit(submission(1, 8, 8), 0)
        s.complete(s.next_batch(0).id, Failed(), 1)

        assert s.depth.waiting_items == 2
        assert s.cancel(1, 2) == 2
        assert s.depth.waiting_items == 0
        assert s.next_batch(2) is None

    def test_twice_or_unknown_is_no_error(self):
        """A cancellation may cross the settlement on its way."""
        s = small_scheduler()
        s.submit(submission(1, 8), 0)

        assert [s.cancel(1, 0), s.cancel(1, 0), s.cancel(9, 0)] == [1, 0, 0]


class TestDeadlines:
    @SHAPES
    def test_an_expired_item_is_never_dispatched(self, shape):
        s = small_scheduler(shape=shape)
        s.submit(submission(1, 5, 20, deadline_ns=100 * MS), 0)

        assert s.next_batch(100 * MS) is None
        assert s.expire(100 * MS) == (Settled(1, (0, 1), Verdict.EXPIRED),)
        assert s.expire(100 * MS) == ()
        assert s.depth.waiting_items == 0

    def test_a_running_item_does_not_expire(self):
        s = small_scheduler()
        s.submit(submission(1, 5, deadline_ns=100 * MS), 0)
        batch = s.next_batch(0)

        assert s.expire(200 * MS) == ()
        assert s.complete(batch.id, Succeeded(1000), 201 * MS).settled[0].verdict is Verdict.DONE

    @pytest.mark.parametrize("outcome", [Failed(), OutOfMemory(), Succeeded(1, frozenset({0}))])
    def test_a_failed_item_past_its_deadline_expires(self, outcome):
        s = small_scheduler()
        s.submit(submission(1, 5, deadline_ns=100 * MS), 0)
        batch = s.next_batch(0)
        s.expire(150 * MS)

        assert s.complete(batch.id, outcome, 201 * MS).settled == (Settled(1, (0,), Verdict.EXPIRED),)
        assert s.next_batch(201 * MS) is None

    def test_an_item_that_waits_for_its_retry_expires(self):
        s = small_scheduler()
        s.submit(submission(1, 5, 5, deadline_ns=100 * MS), 0)
        s.complete(s.next_batch(0).id, Failed(), 50 * MS)

        assert s.expire(100 * MS) == (Settled(1, (0, 1), Verdict.EXPIRED),)


class TestWakeAt:
    def test_an_idle_scheduler_sleeps(self):
        assert small_scheduler().wake_at(0) is None

    def test_a_deadline_wakes(self):
        s = small_scheduler()
        s.submit(submission(1, 5, deadline_ns=100 * MS), 0)

        assert s.wake_at(0) == 100 * MS
        assert s.wake_at(150 * MS) == 150 * MS  # it has something to report now

        s.expire(150 * MS)

        assert s.wake_at(150 * MS) is None

    def test_a_hold_wakes_when_it_ends(self):
        s = small_scheduler(max_queue_delay_ns=3 * MS)
        s.submit(submission(1, 5), 0)

        assert s.next_batch(0) is None
        assert s.wake_at(0) == 3 * MS
        assert s.next_batch(3 * MS) is not None

    def test_the_deadline_of_a_running_item_does_not_wake_again_and_again(self):
        s = small_scheduler()
        s.submit(submission(1, 5, deadline_ns=100 * MS), 0)
        s.next_batch(0)

        assert s.wake_at(150 * MS) is None


class TestHold:
    @SHAPES
    def test_a_full_batch_is_not_held(self, shape):
        s = small_scheduler(shape=shape, max_queue_delay_ns=3 * MS)
        s.submit(submission(1, *[8] * 7), 0)

        assert s.next_batch(0) is None

        s.submit(submission(2, 8), 0)

        assert s.next_batch(0).rows == 8

    def test_a_drain_ends_holds(self):
        s = small_scheduler(max_queue_delay_ns=3 * MS)
        s.submit(submission(1, 5), 0)
        s.drain()

        assert s.next_batch(0).rows == 1


class TestDrain:
    def test_nothing_is_admitted_and_the_queue_empties(self):
        s = small_scheduler()
        s.submit(submission(1, *[8] * 20), 0)
        s.drain()

        assert s.submit(submission(2, 5), 0).reason == "DRAINING"
        assert s.judge(5, 1, now_ns=0).reason == "DRAINING"

        while (batch := s.next_batch(1)) is not None:
            s.complete(batch.id, Succeeded(1000), 1)

        assert s.depth.waiting_items == 0


class TestFatal:
    def test_everything_is_settled_at_once(self):
        """Waiting, running and retried items all end as ENGINE_FAILED; nobody waits for a dead device."""
        s = small_scheduler()
        s.submit(submission(1, *[8] * 20), 0)
        s.complete(s.next_batch(0).id, Failed(), 1)
        running = s.next_batch(1)
        other = s.next_batch(1)
        end = s.complete(running.id, Fatal("device lost"), 2)

        assert end.fatal == s.fatal == "device lost"
        assert end.settled == (Settled(1, tuple(range(20)), Verdict.ENGINE_FAILED),)
        assert s.next_batch(3) is None
        assert s.submit(submission(2, 5), 3).reason == "ENGINE_FAILED"
        assert s.complete(other.id, Succeeded(1), 3).settled == ()
        assert s.depth.waiting_items == s.depth.running_items == 0


class TestPriority:
    def test_a_higher_class_goes_first(self):
        s = small_scheduler()
        s.submit(submission(1, *[8] * 8, priority=Priority.BULK), 0)
        s.submit(submission(2, *[8] * 8, priority=Priority.INTERACTIVE), 0)

        assert {i for i, _ in items(s.next_batch(0))} == {2}
