"""The ladder after a batch that did not end well."""

import pytest

from embedserve.scheduling.item import Failed, OutOfMemory, Settled, Shape, Succeeded, Verdict
from tests.unit.scheduling.making import items, small_scheduler, submission

SHAPES = pytest.mark.parametrize("shape", list(Shape))


def serve(scheduler, device):
    """Runs until nothing waits; ``device(batch)`` is the outcome. Verdicts by (submission, index), and the batches."""
    verdicts, batches = {}, []
    while (batch := scheduler.next_batch(0)) is not None:
        batches.append(batch)
        settlement = scheduler.complete(batch.id, device(batch), 0)
        for s in settlement.settled:
            for i in s.indexes:
                assert (s.submission_id, i) not in verdicts
                verdicts[s.submission_id, i] = s.verdict
        if settlement.fatal:
            break
    return verdicts, batches


def poison(*bad):
    return lambda batch: Failed() if set(items(batch)) & set(bad) else Succeeded(1_000)


class TestPoison:
    @SHAPES
    @pytest.mark.parametrize("bad", range(8))
    def test_only_the_poison_item_fails(self, shape, bad):
        """Bisection: the innocent succeed, in at most 2 log2(n) more passes (coral: INTERNAL for all, D4)."""
        s = small_scheduler(shape=shape)
        s.submit(submission(1, *[8] * 8), 0)
        verdicts, batches = serve(s, poison((1, bad)))

        assert verdicts == {(1, i): Verdict.ITEM_ERROR if i == bad else Verdict.DONE for i in range(8)}
        assert len(batches) <= 1 + 2 * 3

    def test_retries_are_bounded_and_go_first(self):
        """I11, and what failed does not queue again behind others."""
        s = small_scheduler()
        s.submit(submission(1, *[8] * 8), 0)
        first = s.next_batch(0)
        s.submit(submission(2, *[8] * 8), 0)
        s.complete(first.id, Failed(), 0)
        again = s.next_batch(0)

        assert {x for x, _ in items(again)} == {1}
        assert again.attempt == 1

    def test_bad_items_far_apart(self):
        s = small_scheduler()
        s.submit(submission(1, *[8] * 8), 0)
        verdicts, batches = serve(s, poison((1, 0), (1, 7)))

        assert [k for k, v in verdicts.items() if v is Verdict.ITEM_ERROR] == [(1, 0), (1, 7)]
        assert max(b.attempt for b in batches) <= 3


class TestOutOfMemory:
    @SHAPES
    def test_halves_are_retried_and_the_limit_falls_then_rises(self, shape):
        s = small_scheduler(shape=shape, oom_rise_tokens=1)
        s.submit(submission(1, *[8] * 8), 0)
        verdicts, batches = serve(s, lambda b: OutOfMemory() if b.padded_tokens > 33 else Succeeded(1_000))

        assert set(verdicts.values()) == {Verdict.DONE}
        assert [b.rows for b in batches] == [8, 4, 4]
        assert s.max_batch_tokens == 32 + 2

        for number in range(2, 60):
            s.submit(submission(number, 8), 0)
            serve(s, lambda _: Succeeded(1_000))

        assert s.max_batch_tokens == 64

    def test_halves_by_cost(self):
        s = small_scheduler()
        s.submit(submission(1, 32, 8, 8, 8, 8), 0)
        _, batches = serve(s, lambda b: OutOfMemory() if b.padded_tokens > 40 else Succeeded(1_000))

        assert [b.tokens for b in batches] == [64, 32, 32]

    def test_uneven_costs_do_not_break_the_bound(self):
        """Halving by cost alone would part 32, 16, 8, 4, 2, 1, 1 one by one: I11 asks for log2."""
        s = small_scheduler(bucket_edges=(32,), max_batch_items=8)
        s.submit(submission(1, 32, 16, 8, 4, 2, 1, 1), 0)
        verdicts, batches = serve(s, lambda b: OutOfMemory() if b.rows > 1 else Succeeded(1_000))

        assert set(verdicts.values()) == {Verdict.DONE}
        assert max(b.attempt for b in batches) <= 3

    def test_a_single_item_is_given_up(self):
        s = small_scheduler()
        s.submit(submission(1, 32, 8), 0)
        verdicts, _ = serve(s, lambda b: OutOfMemory() if (1, 0) in items(b) else Succeeded(1_000))

        assert verdicts == {(1, 0): Verdict.OUT_OF_MEMORY, (1, 1): Verdict.DONE}

    def test_the_limit_never_falls_below_the_longest_item(self):
        s = small_scheduler(failures_alike_max=1_000)
        for number in range(10):
            s.submit(submission(number, 32), 0)
        serve(s, lambda _: OutOfMemory())

        assert s.max_batch_tokens == 32


class TestNonFinite:
    def test_company_that_spoils_a_row_is_healed_alone(self):
        s = small_scheduler()
        s.submit(submission(1, 8, 8, 8), 0)
        verdicts, batches = serve(s, lambda b: Succeeded(1_000, frozenset({1} if b.rows > 1 else ())))

        assert set(verdicts.values()) == {Verdict.DONE}
        assert [b.rows for b in batches] == [3, 1]

    def test_a_row_that_stays_bad_is_given_up_after_one_more_run(self):
        s = small_scheduler()
        s.submit(submission(1, 8, 8), 0)
        bad = lambda b: Succeeded(1_000, frozenset(r for r, item in enumerate(items(b)) if item == (1, 0)))
        verdicts, batches = serve(s, bad)

        assert verdicts == {(1, 0): Verdict.NON_FINITE, (1, 1): Verdict.DONE}
        assert len(batches) == 2

    def test_good_rows_of_the_batch_keep_their_numbers(self):
        s = small_scheduler()
        s.submit(submission(1, 8, 8, 8), 0)
        done = s.complete(s.next_batch(0).id, Succeeded(1_000, frozenset({1})), 0)

        assert done.settled == (Settled(1, (0, 2), Verdict.DONE, (0, 2)),)
        assert done.requeued == 1


class TestSuspect:
    @pytest.mark.parametrize("outcome", [Failed(), Succeeded(1, frozenset({0})), OutOfMemory()])
    def test_failing_alike_again_and_again_makes_the_device_suspect(self, outcome):
        """It gets no work until the driver has tried it."""
        s, batches = self.suspected(outcome)

        assert batches == 5
        assert s.next_batch(0) is None
        assert s.fatal is None

    @pytest.mark.parametrize("outcome", [Failed(), Succeeded(1, frozenset({0})), OutOfMemory()])
    def test_an_acquitted_device_works_on(self, outcome):
        """All who waited are served, and it takes as many failures again."""
        s, _ = self.suspected(outcome)
        s.acquit(0)
        again = s.next_batch(0)
        bad = Succeeded(1, frozenset(range(again.rows))) if isinstance(outcome, Succeeded) else outcome
        s.complete(again.id, bad, 0)

        assert s.suspect is None

        verdicts, _ = serve(s, lambda _: Succeeded(1_000))

        assert set(verdicts.values()) == {Verdict.DONE}
        assert s.depth.waiting_items == 0

    def test_a_device_that_is_given_up_leaves_nobody_waiting(self):
        s, _ = self.suspected(Failed())
        waiting = s.depth.waiting_items
        settled = s.fail("the canary failed, too")

        assert waiting > 0
        assert sum(len(x.indexes) for x in settled) == waiting
        assert {x.verdict for x in settled} == {Verdict.ENGINE_FAILED}
        assert s.submit(submission(99, 8), 0).reason == "ENGINE_FAILED"

    def test_deadlines_pass_while_it_is_suspect(self):
        s = small_scheduler(failures_alike_max=1)
        s.submit(submission(1, 32), 0)
        s.complete(s.next_batch(0).id, Failed(), 0)
        s.submit(submission(2, 8, deadline_ns=100), 0)

        assert s.next_batch(50) is None
        assert s.wake_at(50) == 100
        assert s.expire(100) == (Settled(2, (0,), Verdict.EXPIRED),)

    @staticmethod
    def suspected(outcome):
        s = small_scheduler(failures_alike_max=5, bucket_edges=(32,))
        for number in range(20):
            s.submit(submission(number, 32, tenant=str(number)), 0)
        batches = 0
        while s.suspect is None:
            batch = s.next_batch(0)
            batches += 1
            bad = Succeeded(1, frozenset(range(batch.rows))) if isinstance(outcome, Succeeded) else outcome
            assert s.complete(batch.id, bad, 0).fatal is None
        return s, batches

    def test_a_good_pass_ends_the_streak(self):
        s = small_scheduler(failures_alike_max=3)
        for k in range(20):
            s.submit(submission(k, 8), 0)
            s.complete(s.next_batch(0).id, Succeeded(1_000) if k % 3 == 2 else Failed(), 0)

        assert s.suspect is None

    @pytest.mark.parametrize("bad", range(8))
    def test_one_poison_item_is_not_the_device(self, bad):
        """Breadth first: its passes never fail more than three times in a row."""
        s = small_scheduler(failures_alike_max=4)
        s.submit(submission(1, *[8] * 8), 0)
        serve(s, poison((1, bad)))

        assert s.suspect is None


class TestBudget:
    def scheduler(self, **changes):
        """Failed batches of tenant m, one of tenant a waiting."""
        s = small_scheduler(initial_batch_ns=1_000, initial_token_ns=10, quarantine_ns=0, **changes)
        s.submit(submission(1, *[8] * 8, tenant="m"), 0)
        s.complete(s.next_batch(0).id, Failed(), 0)
        return s

    def test_the_first_search_does_not_wait(self):
        s = self.scheduler()
        s.submit(submission(2, 8, tenant="a"), 0)

        assert items(s.next_batch(0)) == [(1, 0), (1, 1)]

    def test_beyond_its_share_fresh_work_goes_first_and_retries_fill_the_rest(self):
        """A quarter of the passes, here of equal length, while others wait; all of them when nobody does."""
        s = small_scheduler(
            initial_batch_ns=1_000,
            initial_token_ns=1,
            quarantine_ns=0,
            failures_alike_max=10**6,
            max_queue_items=10_000,
            max_queue_tokens=100_000,
        )
        order = []
        for number in range(400):
            s.submit(submission(2 * number, 8, 8, tenant="m"), 0)
            s.submit(submission(2 * number + 1, *[8] * 8, tenant="a"), 0)
            batch = s.next_batch(0)
            order.append(batch.attempt > 0)
            bad = any(x % 2 == 0 for x, _ in items(batch))
            s.complete(batch.id, Failed() if bad else Succeeded(1_064), 0)
        busy = order[100:]

        assert 0.15 <= sum(busy) / len(busy) <= 0.35

        verdicts, _ = serve(s, lambda b: Failed() if any(x % 2 == 0 for x, _ in items(b)) else Succeeded(1_000))

        assert {v for (x, _), v in verdicts.items() if x % 2} == {Verdict.DONE}
        assert {v for (x, _), v in verdicts.items() if x % 2 == 0} == {Verdict.ITEM_ERROR}

    def test_what_runs_again_is_paid_with_later_turns(self):
        """Tenant m had a batch and two runs of its parts: a has more of the next batches."""
        s = self.scheduler(retry_share=0.9)
        for number in range(2, 6):
            s.submit(submission(number, *[8] * 8, tenant="m"), 0)
        for number in range(6, 10):
            s.submit(submission(number, *[8] * 8, tenant="a"), 0)
        first = []
        while len(first) < 16:
            batch = s.next_batch(0)
            if not batch.attempt:
                first += items(batch)
            s.complete(batch.id, Succeeded(1_000), 0)

        assert sum(x >= 6 for x, _ in first) > sum(x < 6 for x, _ in first)


class TestQuarantine:
    @SHAPES
    def test_who_had_poison_rides_alone_for_a_while(self, shape):
        s = small_scheduler(shape=shape, quarantine_ns=100)
        s.submit(submission(1, 8, tenant="m"), 0)
        s.complete(s.next_batch(0).id, Failed(), 0)
        self.both(s, 2, 50)

        assert self.companies(s, 50) == [{"m"}, {"a", "b"}]

        self.both(s, 12, 100)

        assert self.companies(s, 100) == [{"m", "a", "b"}]

    def test_memory_is_nobodys_fault(self):
        s = small_scheduler(failures_alike_max=1_000)
        s.submit(submission(1, 8, tenant="m"), 0)
        s.complete(s.next_batch(0).id, OutOfMemory(), 0)
        self.both(s, 2, 0)

        assert self.companies(s, 0) == [{"m", "a", "b"}]

    @staticmethod
    def both(s, number, now):
        for k, tenant in enumerate("mab"):
            s.submit(submission(number + k, 8, tenant=tenant, arrived_ns=now), now)

    @staticmethod
    def companies(s, now):
        """Tenants of each batch until nothing waits."""
        found = []
        while (batch := s.next_batch(now)) is not None:
            found.append({"mab"[(x - 2) % 10] for x, _ in items(batch)})
            s.complete(batch.id, Succeeded(1_000), now)
        return sorted(found, key=len)


class TestCap:
    """What fitted the device at warm-up."""

    def test_batches_never_hold_more_and_never_rise_over_it(self):
        s = small_scheduler()
        s.cap_batches(32)
        s.submit(submission(1, *[8] * 8), 0)
        _, batches = serve(s, lambda batch: Succeeded(1_000))

        assert max(batch.padded_tokens for batch in batches) <= 32
        assert s.max_batch_tokens == 32

    def test_the_longest_text_still_fits(self):
        s = small_scheduler()
        s.cap_batches(1)
        s.submit(submission(1, 8), 0)
        verdicts, _ = serve(s, lambda batch: Succeeded(1_000))

        assert verdicts == {(1, 0): Verdict.DONE}

    def test_more_than_the_setting_changes_nothing(self):
        s = small_scheduler()
        s.cap_batches(1 << 20)

        assert s.max_batch_tokens == 64
