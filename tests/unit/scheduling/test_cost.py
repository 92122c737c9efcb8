"""What items cost, and how the cost of a pass is learned."""

from random import Random

import pytest

from embedserve.scheduling.cost import Buckets, CostModel

MS = 1_000_000


class TestBuckets:
    def test_an_edge_belongs_to_its_bucket(self):
        b = Buckets((8, 16))

        assert [b.edge_of(n) for n in (1, 8, 9, 16)] == [8, 8, 16, 16]
        assert b.limit == 16

    def test_groups_keep_order_and_sum(self):
        assert Buckets((8, 16)).groups([5, 9, 8, 16]) == [(0, [0, 2], [0, 5, 13]), (1, [1, 3], [0, 9, 25])]

    @pytest.mark.parametrize("tokens", [[3], [3, 4, 5]])
    def test_one_bucket_is_one_group(self, tokens):
        [(bucket, indexes, sums)] = Buckets((8, 16)).groups(tokens)

        assert (bucket, list(indexes), sums[-1]) == (0, list(range(len(tokens))), sum(tokens))


class TestCostModel:
    def model(self, batch_ns=1 * MS, token_ns=10_000, memory=0.95):
        return CostModel(batch_ns, token_ns, memory, 1_000)

    def test_starts_with_the_guess(self):
        m = self.model()

        assert m.predict_ns(100) == 2 * MS
        assert m.tokens_per_second == pytest.approx(1_000 / 0.011)

    @pytest.mark.parametrize("factor", [0.01, 1, 100])
    def test_is_right_about_what_it_saw_from_the_first_sample(self, factor):
        m = self.model()
        m.learn(100, 100, int(2 * MS * factor), 0)

        assert m.predict_ns(100) == pytest.approx(2 * MS * factor, rel=0.01)
        assert m.predict_ns(1_000) == pytest.approx(11 * MS * factor, rel=0.01)

    def test_finds_both_terms(self):
        m, rng = self.model(), Random(5)
        for _ in range(200):
            n = rng.randint(10, 1_000)
            m.learn(n, n, int((5 * MS + 30_000 * n) * rng.uniform(0.95, 1.05)), 0)

        assert m.batch_ns == pytest.approx(5 * MS, rel=0.2)
        assert m.token_ns == pytest.approx(30_000, rel=0.1)

    def test_passes_of_one_size_leave_the_slope_to_the_guess(self):
        """Data that say nothing about the slope must not turn noise into one."""
        m, rng = self.model(), Random(5)
        for _ in range(200):
            m.learn(100, 100, int(4 * MS * rng.uniform(0.9, 1.1)), 0)

        assert m.predict_ns(1_000) == pytest.approx(22 * MS, rel=0.15)

    def test_a_stall_is_forgotten(self):
        """One pass of 30 s among passes of 2 ms counts as ten times its prediction, and fades."""
        m = self.model()
        for _ in range(20):
            m.learn(100, 100, 2 * MS, 0)
        m.learn(100, 100, 30_000 * MS, 0)

        assert m.predict_ns(100) < 4 * MS

        for _ in range(60):
            m.learn(100, 100, 2 * MS, 0)

        assert m.predict_ns(100) == pytest.approx(2 * MS, rel=0.05)

    def test_never_predicts_nothing(self):
        """Larger batches that were quicker are noise, not a negative cost."""
        m = self.model()
        for n, ms in ((10, 9), (1_000, 2), (10, 8), (500, 2)):
            m.learn(n, n, ms * MS, 0)

        assert m.token_ns > 0
        assert m.batch_ns >= 0

    def test_the_rate_is_of_useful_tokens_on_device_time(self):
        """Idle time between passes does not enter (coral's rate counted it, and hand-overs too: D11)."""
        m = self.model()
        for k in range(10):
            m.learn(100, 200, 10 * MS, k * 3_600_000 * MS)

        assert m.tokens_per_second == pytest.approx(10_000)
        assert m.padding == pytest.approx(2)

    def test_drain_counts_full_passes_and_the_rest(self):
        m = self.model()

        assert m.drain_ns(0, 0, 1_000, 64) == 0
        assert m.drain_ns(2_500, 30, 1_000, 64) == 3 * MS + 25 * MS
        assert m.drain_ns(100, 640, 1_000, 64) == 10 * MS + 1 * MS


class TestRide:
    """What those behind add to the pass that a candidate rides in."""

    @staticmethod
    def model():
        model = CostModel(1_000, 10, 0.95, 100)
        for _ in range(50):
            model.learn(60, 60, 1_600, 0)
        return model

    def test_an_empty_server_adds_nobody(self):
        assert self.model().ride_ns(20, 0, 0, 100) == pytest.approx((0, 1_200), abs=2)

    def test_those_who_wait_behind_ride_along(self):
        assert self.model().ride_ns(20, 30, 0, 100) == pytest.approx((300, 1_500), abs=2)

    def test_those_who_come_until_it_closes_ride_along(self):
        """Half of a usual pass's tokens in half of its time; never more than one usual pass."""
        assert self.model().ride_ns(20, 0, 800, 100) == pytest.approx((300, 1_500), abs=2)
        assert self.model().ride_ns(20, 0, 10**9, 100) == pytest.approx((600, 1_800), abs=2)

    def test_a_pass_is_never_more_than_full(self):
        assert self.model().ride_ns(20, 1_000, 10**9, 100) == pytest.approx((800, 2_000), abs=2)
        assert self.model().ride_ns(290, 1_000, 10**9, 100) == pytest.approx((100, 2_000), abs=2)
