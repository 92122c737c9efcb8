"""How long what runs will still run."""

import pytest

from embedserve.scheduling.flight import Flight
from embedserve.scheduling.item import Batch, Shape
from embedserve.scheduling.retry import Group


def batch(number):
    return Batch(number, (), Shape.PACKED, 8, 2, 16, 16, 0)


def group():
    return Group.first([], 2)


class TestResidual:
    def test_counts_down(self):
        f = Flight()
        f.start(batch(1), group(), 100, 1_000)

        assert [f.residual_ns(now) for now in (1_000, 1_040, 1_100)] == [100, 60, 0]

    def test_a_stall_looks_longer_the_longer_it_lasts(self):
        """Admission sees a device that does not answer before any deadline does."""
        f = Flight()
        f.start(batch(1), group(), 100, 1_000)

        assert f.residual_ns(1_600) == 500

    def test_only_the_first_clock_runs(self):
        """A prepared batch waits for the one before it."""
        f = Flight()
        f.start(batch(1), group(), 100, 1_000)
        f.start(batch(2), group(), 70, 1_010)

        assert (f.residual_ns(1_050), f.items, f.tokens) == (120, 4, 32)

        f.end(1, 1_090)

        assert (f.residual_ns(1_100), f.items) == (60, 2)

    def test_an_unknown_batch_is_an_error(self):
        with pytest.raises(KeyError):
            Flight().end(1, 0)
