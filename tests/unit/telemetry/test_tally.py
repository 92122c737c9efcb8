"""Cells count what they are told, and stay few."""

from __future__ import annotations

import pytest
from opentelemetry.trace import SpanContext, TraceFlags

from embedserve.telemetry.tally import UNDECLARED_SERIES_MAX, CounterTally, HistogramTally

CONTEXT = SpanContext(0xABC, 0xDEF, False, TraceFlags(1))


class TestHistogram:
    @pytest.mark.parametrize(("value", "bucket"), [(0, 0), (1, 0), (1.0001, 1), (2, 1), (4, 2), (4.1, 3)])
    def test_bounds_are_upper_and_inclusive(self, value: float, bucket: int) -> None:
        cell = HistogramTally([], [()], {}, (1, 2, 4)).cell()

        cell.observe(value)

        point = cell.point(1)
        assert [int(index == bucket) for index in range(4)] == list(point.bucket_counts)
        assert (1, value) == (point.count, point.sum)

    def test_an_exemplar_is_the_last_sampled_trace_of_its_bucket(self) -> None:
        cell = HistogramTally([], [()], {}, (1, 2)).cell()
        later = SpanContext(0x123, 0x456, False, TraceFlags(1))

        cell.observe_traced(0.5, CONTEXT, 7)
        cell.observe_traced(0.75, later, 8)
        cell.observe_traced(5, CONTEXT, 9)
        cell.observe(1.5)

        found = [(e.value, e.trace_id, e.span_id) for e in cell.point(1).exemplars]
        assert found == [(0.75, 0x123, 0x456), (5, 0xABC, 0xDEF)]


class TestSeries:
    def test_declared_series_are_there_before_anything_is_counted(self) -> None:
        tally = CounterTally(["a", "b"], [("x", "1"), ("y", "2")], {"c": "k"})

        assert [c.attributes for c in tally.cells()] == [{"c": "k", "a": "x", "b": "1"}, {"c": "k", "a": "y", "b": "2"}]
        assert [c.value for c in tally.cells()] == [0, 0]

    def test_label_sets_that_nobody_declared_are_limited_and_nothing_is_lost(self) -> None:
        tally = CounterTally(["reason"], [("known",)], {})

        for number in range(1000):
            tally.cell(f"r{number}").value += 1

        cells = tally.cells()
        assert len(cells) == 1 + UNDECLARED_SERIES_MAX + 1
        assert sum(cell.value for cell in cells) == 1000
        assert cells[-1].attributes["reason"] == "_OTHER"
