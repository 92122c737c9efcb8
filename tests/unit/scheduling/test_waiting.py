"""The waiting queue: counts are true, leaving is cheap, tenants are bounded."""

import pytest

from embedserve.scheduling.cost import Buckets
from embedserve.scheduling.waiting import Ticket, WaitingQueue
from tests.unit.scheduling.making import submission

EDGES = (8, 16, 32)
LANES = pytest.mark.parametrize("lanes", [1, 3])


def queue(lanes, max_tenants=10):
    return WaitingQueue(Buckets(EDGES), lanes, max_tenants)


def add(q, number, *tokens, **changes):
    s = submission(number, *tokens, **changes)
    ticket = Ticket(s, 0, 0)
    q.add(ticket, s, sum(tokens))
    return ticket


class TestWaitingQueue:
    @LANES
    def test_counts(self, lanes):
        q = queue(lanes)
        add(q, 1, 5, 20, 9, 8, arrived_ns=7)
        add(q, 2, 30, arrived_ns=3)

        assert (q.items, q.tokens, q.by_bucket, q.submissions, q.oldest_ns()) == (5, 72, [2, 1, 2], 2, 3)
        assert q.tokens_by_bucket == [13, 9, 50]

    @LANES
    def test_the_oldest_of_each_bucket(self, lanes):
        q = queue(lanes)
        add(q, 1, 5, 20, arrived_ns=3)
        add(q, 2, 5, 21, 30, arrived_ns=7)

        assert q.oldest_by_bucket(100) == [3, None, 3]

    @LANES
    def test_a_scan_that_ends_early_never_makes_a_bucket_younger(self, lanes):
        q = queue(lanes)
        for number in range(10):
            add(q, number, 5, arrived_ns=number)
        add(q, 10, 30, arrived_ns=10)

        assert q.oldest_by_bucket(4) == [0, None, 3]

    @LANES
    def test_withdraw_takes_all_that_waits(self, lanes):
        q = queue(lanes)
        one = add(q, 1, 5, 20, 9, 8)
        add(q, 2, 30)
        q.take(one.runs[0], 1)

        assert len(q.withdraw(one)) == 3
        assert (q.items, q.tokens, q.by_bucket, q.submissions) == (1, 30, [0, 0, 1], 1)
        assert q.tokens_by_bucket == [0, 0, 30]

    @LANES
    def test_a_submission_costs_runs_not_items(self, lanes):
        """10,000 items are as many runs as there are buckets, so that cancelling them is as quick as cancelling one."""
        ticket = add(queue(lanes), 1, *[5, 12, 30] * 3_333)

        assert len(ticket.runs) == lanes

    def test_tenants_are_bounded(self):
        """Made-up names share one place."""
        q = queue(1, max_tenants=3)
        for number in range(50):
            add(q, number, 5, tenant=f"t{number}")

        assert len(q.classes[1].tenant_by_key) == 4
        assert q.items == 50

    def test_idle_tenants_make_room(self):
        q = queue(1, max_tenants=3)
        for number in range(50):
            q.withdraw(add(q, number, 5, tenant=f"t{number}"))

        assert WaitingQueue.CROWD not in q.classes[1].tenant_by_key
        assert len(q.classes[1].tenant_by_key) <= 3


class TestRun:
    def test_what_fits(self):
        run = add(queue(1), 1, 5, 20, 9, 8).runs[0]

        assert [run.fit(10, tokens, 0) for tokens in (4, 5, 24, 25, 34, 1_000)] == [0, 1, 1, 2, 3, 4]
        assert run.fit(2, 1_000, 0) == 2
        assert run.fit(10, 40, 16) == 2
