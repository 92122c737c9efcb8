"""When calls are to be sent."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.schedule import arrivals, timetable
from tests.unit.loadtest.scenarios import scenario


class TestArrivals:
    def test_are_a_poisson_process_of_the_asked_rate(self):
        gaps = np.diff(arrivals(timetable(scenario({"rate": 500.0, "seconds": 200.0})), seed=17))
        # 100,000 gaps: the mean is known to 0.3 %, and an exponential's standard deviation is its mean.
        assert gaps.mean() == pytest.approx(1 / 500, rel=0.02)
        assert gaps.std() == pytest.approx(gaps.mean(), rel=0.02)
        # A share of 1/e of the gaps is longer than the mean, 1/e^2 longer than twice the mean.
        assert (gaps > 1 / 500).mean() == pytest.approx(np.exp(-1), abs=0.01)
        assert (gaps > 2 / 500).mean() == pytest.approx(np.exp(-2), abs=0.01)

    def test_counts_in_windows_vary_as_much_as_their_mean(self):
        instants = arrivals(timetable(scenario({"rate": 200.0, "seconds": 500.0})), seed=3)
        counts, _ = np.histogram(instants, np.arange(0.0, 500.5, 0.5))
        assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.15)

    def test_the_seed_decides_and_nothing_else(self):
        spans = timetable(scenario({"rate": 300.0}))
        assert arrivals(spans, 5).tolist() == arrivals(spans, 5).tolist()
        assert arrivals(spans, 5).tolist() != arrivals(spans, 6).tolist()

    def test_each_phase_has_its_own_rate_and_place(self):
        spans = timetable(scenario({"rate": 100.0, "seconds": 50.0}, {"callers": 3, "seconds": 10.0},
                                   {"rate": 400.0, "seconds": 50.0}))  # fmt: skip
        instants = arrivals(spans, 1)
        assert (np.diff(instants) >= 0).all()
        assert ((instants < 50.0) | (instants >= 60.0)).all()
        assert (instants < 50.0).sum() == pytest.approx(5000, rel=0.06)
        assert (instants >= 60.0).sum() == pytest.approx(20_000, rel=0.03)

    def test_a_longer_first_phase_leaves_the_second_as_it_was(self):
        short, long = (
            arrivals(timetable(scenario({"rate": 50.0, "seconds": s}, {"rate": 80.0})), 2) for s in (1.0, 2.0)
        )
        assert short[short >= 1.0] - 1.0 == pytest.approx(long[long >= 2.0] - 2.0)

    def test_a_closed_loop_has_none(self):
        assert not len(arrivals(timetable(scenario({"callers": 4})), 1))


class TestTimetable:
    def test_a_multiple_of_the_capacity_becomes_a_rate(self):
        (span,) = timetable(scenario({"of_capacity": 2.0}), capacity=150.0)
        assert span.rate == 300.0

    def test_without_a_capacity_it_says_which_phase_needs_one(self):
        with pytest.raises(ValueError, match="p0 is a multiple of the capacity"):
            timetable(scenario({"of_capacity": 2.0}))
