"""Several engines' load as one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from embedserve.engine.load import NO_LOAD, LoadReport, add_loads

ONE = LoadReport("healthy", True, 1000, 1e5, 10.0, 20.0, 3, 60, 2, 500)
OTHER = LoadReport("overloaded", False, 9000, 3e5, 30.0, 15.0, 7, 50, 4, 1500)
GONE = replace(OTHER, state="not_serving", accepting_requests=False)


class TestSum:
    def test_one_is_itself(self):
        assert add_loads([OTHER]) == OTHER

    def test_what_is_there_is_added_and_a_newcomer_is_told_what_the_best_says(self):
        """The drain time is all work over all rates: (1,000 + 9,000) tokens at 400,000 a second."""
        both = LoadReport("healthy", True, 10_000, 4e5, pytest.approx(25.0), 20.0, 10, 60, 6, 2000)
        assert add_loads([ONE, OTHER]) == both
        assert add_loads([OTHER, ONE]) == both

    def test_one_that_does_not_serve_counts_for_nothing_and_the_rest_asks_for_less(self):
        left = add_loads([ONE, GONE])
        assert left == replace(ONE, state="degraded")
        assert add_loads([OTHER, GONE]).state == "overloaded"

    def test_with_none_left_nothing_is_accepted(self):
        assert not add_loads([GONE, GONE]).accepting_requests
        assert add_loads([NO_LOAD, NO_LOAD]).state == "not_serving"
