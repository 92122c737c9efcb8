"""What metrics show of the queue and of failed passes."""

from embedserve.scheduling.item import Failed
from tests.unit.scheduling.making import run_all, small_scheduler, submission


class TestCensus:
    def test_an_idle_scheduler_has_every_bucket_at_zero(self):
        census = small_scheduler().census(0)

        assert census.tokens_by_bucket == census.oldest_ns_by_bucket == {8: 0, 16: 0, 32: 0}
        assert (census.retry_items, census.retry_tokens, census.tenants_apart) == (0, 0, 0)

    def test_what_waits_is_counted_in_its_bucket_with_its_age(self):
        s = small_scheduler()
        s.submit(submission(1, 5, 20, arrived_ns=10), 20)
        s.submit(submission(2, 30, 31, arrived_ns=40), 50)

        census = s.census(100)

        assert census.tokens_by_bucket == {8: 5, 16: 0, 32: 81}
        assert census.oldest_ns_by_bucket == {8: 90, 16: 0, 32: 90}
        run_all(s)
        assert set(s.census(100).tokens_by_bucket.values()) == {0}

    def test_a_failed_pass_leaves_retries_a_spent_budget_and_a_tenant_apart(self):
        s = small_scheduler(quarantine_ns=100, initial_batch_ns=1_000)
        before = s.census(0)
        s.submit(submission(1, 8, 8, tenant="m"), 0)
        s.complete(s.next_batch(0).id, Failed(), 0)

        assert (s.census(0).retry_items, s.census(0).retry_tokens) == (2, 16)

        while (batch := s.next_batch(0)) is not None:
            s.complete(batch.id, Failed(), 50)
        after = s.census(60)

        assert (after.retry_items, after.tenants_apart) == (0, 1)
        assert after.retry_credit_ns < before.retry_credit_ns
        assert s.census(150).tenants_apart == 0
