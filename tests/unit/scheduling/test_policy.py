"""When a batch closes, which bucket leads, how many rows."""

from collections import Counter

import pytest

from embedserve.scheduling.cost import Buckets, CostModel
from embedserve.scheduling.item import Priority, Shape, Submission, Succeeded
from embedserve.scheduling.policy import BatchPolicy
from embedserve.scheduling.waiting import WaitingQueue
from tests.unit.scheduling.making import MS, items, run_all, small_scheduler, small_settings, submission


class TestPacked:
    def test_a_long_head_is_passed_over_and_leads_the_next_batch(self):
        """What does not fit the rest of a batch waits for the next one only; shorter ones fill the room."""
        s = small_scheduler()
        for number, tokens in enumerate((30, 30, 20, 4), start=1):
            s.submit(submission(number, tokens), 0)

        assert items(s.next_batch(0)) == [(1, 0), (2, 0), (4, 0)]
        assert items(s.next_batch(0)) == [(3, 0)]

    def test_flows_share_a_full_batch(self):
        s = small_scheduler(bucket_edges=(8, 16), max_batch_items=64)
        for number in (1, 2):
            s.submit(submission(number, *[8] * 8), 0)

        assert [x for x, _ in items(s.next_batch(0))].count(1) == 4


class TestLarge:
    """Submissions that take several passes leave room for those that do not."""

    @pytest.mark.parametrize("shape", list(Shape))
    def test_alone_they_fill_two_fifths(self, shape):
        """25 of 64 tokens: three items of 8."""
        s = small_scheduler(shape=shape, max_batch_items=64)
        s.submit(submission(1, *[8] * 15), 0)

        assert [b.tokens for b in run_all(s)] == [24, 24, 24, 24, 24]

    @pytest.mark.parametrize(("whole", "tokens"), [(0, [32]), (64, [32]), (65, [24, 8])])
    def test_a_part_is_as_large_as_its_request(self, whole, tokens):
        """A stream is submitted piece by piece: were each judged by itself, a stream would fill every pass."""
        s = small_scheduler(max_batch_items=64)
        s.submit(submission(1, *[8] * 4)._replace(whole_tokens=whole), 0)

        assert [b.tokens for b in run_all(s)] == tokens

    @pytest.mark.parametrize("shape", list(Shape))
    def test_beside_a_small_one_a_fifth(self, shape):
        s = small_scheduler(shape=shape, max_batch_items=64)
        s.submit(submission(1, *[8] * 40), 0)
        first = s.next_batch(0)
        s.submit(submission(2, 8), 0)
        s.complete(first.id, Succeeded(1_000), 0)

        assert items(s.next_batch(0)) == [(2, 0), (1, 3)]

    def test_one_that_fits_a_batch_is_not_cut(self):
        s = small_scheduler()
        s.submit(submission(1, *[8] * 8), 0)

        assert s.next_batch(0).tokens == 64

    def test_an_item_that_fills_a_batch_rides_all_the_same(self):
        s = small_scheduler(max_batch_tokens=32)
        s.submit(submission(1, 32, 32, 32), 0)

        assert [b.tokens for b in run_all(s)] == [32, 32, 32]

    def test_many_large_ones_keep_no_small_one_out(self):
        s = small_scheduler(max_batch_items=64)
        for number in range(1, 30):
            s.submit(submission(number, *[8] * 20), 0)
        for _ in range(20):
            s.complete(s.next_batch(0).id, Succeeded(1_000), 0)
        s.submit(submission(99, 8), 0)

        assert (99, 0) in items(s.next_batch(0))


class TestHeldBack:
    """What large work leaves of a batch is not for those who are ahead of it."""

    def served(self, *submissions, batches=12, **changes):
        """Tokens of each submission in so many batches of at most 64."""
        s = small_scheduler(max_batch_items=64, **changes)
        for sent in submissions:
            s.submit(sent, 0)
        tokens, sizes = Counter(), []
        for _ in range(batches):
            batch = s.next_batch(0)
            sizes.append(batch.tokens)
            for piece in batch.slices:
                tokens[piece.submission_id] += 8 * len(piece.indexes)
            s.complete(batch.id, Succeeded(1_000), 0)
        return tokens, sizes

    def small(self, tenant, first=100, count=200, **changes):
        return [submission(first + n, 8, tenant=tenant, **changes) for n in range(count)]

    def large(self, count, **changes):
        return [submission(n, *[8] * 100, tenant=f"large{n}", **changes) for n in range(1, count + 1)]

    def of_small(self, tokens, first=100):
        return sum(n for number, n in tokens.items() if number >= first)

    def test_a_tenant_with_small_ones_has_as_much_as_each_with_a_large_one(self):
        tokens, sizes = self.served(*self.large(3), *self.small("crowd"), batches=24)
        parts = [tokens[1], tokens[2], tokens[3], self.of_small(tokens)]

        assert max(parts) - min(parts) <= 64
        assert min(sizes) >= 24  # what large work fills, at least

    def test_its_work_is_not_held_back_where_nobody_is_behind(self):
        """One tenant: small calls beside a large one fill the batch."""
        _, sizes = self.served(submission(1, *[8] * 100), *[submission(100 + n, 8) for n in range(200)])

        assert sizes == [64] * 12

    def test_a_large_one_that_the_rest_is_too_short_for_holds_nobody_back(self):
        """It leads the next batch; the cap is not what keeps it out."""
        s = small_scheduler(max_batch_items=64, max_batch_tokens=64)
        s.submit(submission(1, *[30] * 9, tenant="large"), 0)
        s.submit(submission(2, *[10] * 6, tenant="a"), 0)

        assert s.next_batch(0).tokens == 60

    def test_a_lower_class_has_a_turn_of_the_rest(self):
        """A turn is 32 tokens here, beside 24 of large work."""
        tokens, sizes = self.served(*self.large(1), *self.small("other", priority=Priority.BULK), quantum_divisor=8)

        assert 0.5 <= self.of_small(tokens) / sum(sizes) <= 32 / 56

    def test_and_nothing_where_a_tenant_of_the_class_above_is_held_back(self):
        """But the part that every class has."""
        tokens, sizes = self.served(
            *self.large(4),
            *self.small("crowd"),
            *self.small("other", first=1_000, priority=Priority.BULK),
            batches=24,
        )

        assert self.of_small(tokens, first=1_000) / sum(sizes) <= 0.3

    def test_a_small_one_that_comes_rides_at_once(self):
        s = small_scheduler(max_batch_items=64)
        for sent in (*self.large(4), *self.small("crowd")):
            s.submit(sent, 0)
        for number in range(1_000, 1_040):
            s.complete(s.next_batch(0).id, Succeeded(1_000), 0)
            s.submit(submission(number, 8, tenant=f"new{number}"), 0)
            batch = s.next_batch(0)

            assert (number, 0) in items(batch)
            s.complete(batch.id, Succeeded(1_000), 0)


class TestTime:
    def test_a_pass_is_no_longer_than_it_may_take(self):
        """2 ms and 1 ms a token: 42 tokens take 44 ms."""
        s = small_scheduler(initial_batch_ns=2 * MS, initial_token_ns=1 * MS, max_batch_ns=44 * MS)
        for number in range(1, 9):
            s.submit(submission(number, 8), 0)

        assert s.max_batch_tokens == 42
        assert s.next_batch(0).tokens == 40

    def test_the_longest_item_always_fits(self):
        s = small_scheduler(initial_batch_ns=2 * MS, initial_token_ns=1 * MS, max_batch_ns=3 * MS)
        s.submit(submission(1, 32), 0)

        assert s.next_batch(0).tokens == 32


class TestBuckets:
    def bucketed(self, **changes):
        return small_scheduler(shape=Shape.BUCKETED, max_wait_ns=100 * MS, **changes)

    def test_the_oldest_goes_first_not_the_shortest(self):
        s = self.bucketed()
        s.submit(submission(1, 30), 0)
        s.submit(submission(2, 5), 1)

        assert [b.edge for b in run_all(s, 2)] == [32, 8]

    def test_a_full_bucket_goes_before_an_older_one(self):
        s = self.bucketed()
        s.submit(submission(1, 5), 0)
        s.submit(submission(2, 30), 1)
        s.submit(submission(3, 30), 1)

        assert [b.edge for b in run_all(s, 2)] == [32, 8]

    def test_an_overdue_wait_goes_before_a_full_bucket(self):
        s = self.bucketed()
        s.submit(submission(1, 5), 0)
        s.submit(submission(2, 30, arrived_ns=50 * MS), 50 * MS)
        s.submit(submission(3, 30, arrived_ns=50 * MS), 50 * MS)

        assert [b.edge for b in run_all(s, 101 * MS)] == [8, 32]

    def test_a_bulk_job_has_no_claim_by_age_or_fullness(self):
        """Its buckets are full and its items old, and still a single newcomer is next once it was served."""
        s = self.bucketed()
        s.submit(submission(1, *[5, 12, 30] * 100), 0)
        s.next_batch(0)
        s.submit(Submission(2, 2, (9,), 200 * MS), 200 * MS)

        assert (2, 0) in items(s.next_batch(200 * MS))

    def test_buckets_of_one_flow_take_turns(self):
        s = self.bucketed()
        s.submit(submission(1, *[5, 12, 30] * 40), 0)

        assert len({s.next_batch(0).edge for _ in range(3)}) == 3

    def test_lower_classes_fill_the_rest_of_the_bucket(self):
        s = self.bucketed()
        s.submit(submission(1, 5, 6, 30, priority=Priority.BULK), 0)
        s.submit(submission(2, 7, priority=Priority.INTERACTIVE), 0)

        assert sorted(items(s.next_batch(0))) == [(1, 0), (1, 1), (2, 0)]


class TestClasses:
    def test_the_lowest_class_keeps_its_share(self):
        """Beside a class that could use everything, it gets 5 % of the tokens, and so does the middle one."""
        s = small_scheduler(
            max_queue_items=100_000, max_queue_tokens=1_000_000, max_batch_items=64, max_batch_tokens=80
        )
        for number, priority in enumerate(Priority, start=1):
            s.submit(submission(number, *[8] * 4_000, priority=priority), 0)
        rows = [x for _ in range(400) for x, _ in items(s.next_batch(0))]
        shares = [rows.count(number) / len(rows) for number in (1, 2, 3)]

        assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.01)


class TestRows:
    """Rows on a device with captured shapes. Down where padding costs more than one more launch, else up."""

    def policy(self, batch_ns, sizes=(1, 2, 4, 8), max_batch_tokens=64):
        settings = small_settings(shape=Shape.BUCKETED, batch_sizes=sizes, max_batch_tokens=max_batch_tokens)
        buckets = Buckets(settings.bucket_edges)
        cost = CostModel(batch_ns, 10_000, 0.95, 64)
        return BatchPolicy(settings, buckets, WaitingQueue(buckets, 3, 10), cost)

    def test_without_sizes_any_count_runs(self):
        assert self.policy(0, ()).captured_rows(5, 8, 64) == 5

    def test_cheap_launches_round_down(self):
        assert self.policy(batch_ns=1_000).captured_rows(5, 8, 64) == 4

    def test_dear_launches_round_up(self):
        """All five run, padded to eight rows."""
        p = self.policy(batch_ns=10 * MS)

        assert (p.captured_rows(5, 8, 64), p.padded_rows(5, 8, 64)) == (5, 8)

    def test_what_a_size_would_push_over_the_limit_rounds_down(self):
        assert self.policy(10 * MS).captured_rows(3, 16, 48) == 2

    def test_padded_rows_are_counted(self):
        s = small_scheduler(shape=Shape.BUCKETED, batch_sizes=(4, 8), initial_batch_ns=50 * MS)
        s.submit(submission(1, 5, 5, 5), 0)
        batch = s.next_batch(0)

        assert (batch.rows, batch.padded_tokens) == (3, 32)


class TestDeadlineCut:
    """A pass ends for all its riders at once: whoever comes last makes the others late."""

    def rows(self, shape, *deadlines, **changes):
        """Of a batch for 8 items of 8 tokens, which takes 2 + 64 ms when it is full."""
        model = {"initial_batch_ns": 2 * MS, "initial_token_ns": 1 * MS, "pass_overrun_ratio": 1.0}
        s = small_scheduler(shape=shape, **(model | changes))
        for number, deadline in enumerate(deadlines):
            s.submit(submission(number, 8, deadline_ns=deadline, continuation=True), 0)
        return s.next_batch(0).rows

    @pytest.mark.parametrize("shape", list(Shape))
    def test_a_pass_is_cut_so_that_it_ends_by_the_first_deadline_in_it(self, shape):
        late = [1_000 * MS] * 7

        assert self.rows(shape, *late, 1_000 * MS) == 8
        assert self.rows(shape, 42 * MS, *late) == 5
        assert self.rows(shape, 41 * MS, *late) == 4

    @pytest.mark.parametrize("shape", list(Shape))
    def test_a_pass_may_take_longer_than_predicted(self, shape):
        assert self.rows(shape, 42 * MS, *[1_000 * MS] * 7, pass_overrun_ratio=2.0) == 2

    def test_no_deadline_makes_passes_that_mostly_wait_for_their_launch(self):
        """Else one caller with deadlines that nobody can meet would make all batches tiny."""
        assert self.rows(Shape.PACKED, 1, *[1_000 * MS] * 7) == 2  # 18 tokens take 18 ms of 20

    def test_those_without_a_deadline_cut_nothing(self):
        assert self.rows(Shape.PACKED, *[None] * 8) == 8
