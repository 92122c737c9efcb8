"""When a server is well again: one definition for every load test."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.caller import CALLS
from loadtest.overload import waited_for
from loadtest.recovery import recovery_s, windowed_p99


def calls(*rows: tuple[float, float]) -> np.ndarray:
    return np.array([(meant, meant, meant + took, 0, np.nan) for meant, took in rows], dtype=CALLS)


class TestWindows:
    def test_one_without_calls_is_left_out(self):
        found = windowed_p99(calls((0.1, 0.2), (1.1, 0.3)), 0.0, 2.0)
        assert found == [(0.5, pytest.approx(0.2)), (1.5, pytest.approx(0.3))]

    def test_a_call_belongs_to_the_window_in_which_it_was_meant_to_be_sent(self):
        assert windowed_p99(calls((0.5, 9.0)), 0.0, 1.0) == [(1.0, pytest.approx(9.0))]


class TestRecovery:
    def test_a_tenth_more_than_before_is_normal(self):
        assert recovery_s(calls((0.1, 0.109), (0.6, 0.109)), 0.0, 1.0, 0.1) == 0.0
        assert recovery_s(calls((0.1, 0.111), (0.6, 0.109)), 0.0, 1.0, 0.1) == 0.5
        assert recovery_s(calls((0.1, 0.109), (0.6, 0.111)), 0.0, 1.0, 0.1) == 1.0


class TestOverload:
    def test_of_calls_that_were_answered_or_expired(self):
        rows = calls(*((0.1, 0.1) for _ in range(6)))
        rows["code"] = (0, 4, 8, 13, 14, 2)
        assert waited_for(rows)["code"].tolist() == [0, 4]
