"""Histograms of one kind, counted many measurements at a time.

Decides how buckets are found for a whole matrix, and which measurement of a bucket becomes its exemplar: the last of a
sampled trace, as one by one. Must never know what is measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from opentelemetry.trace import SpanContext

from embedserve.telemetry.tally import HistogramCell

__all__ = ["S_PER_NS", "HistogramGroup"]

S_PER_NS: Final = 1e-9


class HistogramGroup:
    """Series with the same bounds. Used with the lock of ``Pending`` held."""

    def __init__(self, cells: Sequence[HistogramCell]) -> None:
        """Count into ``cells``."""
        self._cells = tuple(cells)
        (bounds,) = {cell.bounds for cell in cells}
        self._bounds = np.array(bounds)
        self._width = len(bounds) + 1
        self._firsts = np.arange(len(self._cells))[:, None] * self._width

    def count(
        self,
        values: npt.NDArray[np.floating[Any]],
        traces: Sequence[SpanContext | None] = (),
        ended_ns: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Count ``values``, a row for each series, in its unit.

        ``traces`` has the sampled trace of each column, and ``ended_ns`` when it was measured, by the monotonic clock.
        """
        places = np.searchsorted(self._bounds, values) + self._firsts
        counts = np.bincount(places.ravel(), minlength=len(self._cells) * self._width)
        found = counts.reshape(len(self._cells), self._width).tolist()
        for cell, one, total in zip(self._cells, found, values.sum(axis=1).tolist(), strict=True):
            cell.add_bulk(one, total)
        if ended_ns is not None and any(traces):
            self._remember(places, values, traces, ended_ns)

    def count_picked(self, series: npt.NDArray[np.intp], values: npt.NDArray[np.floating[Any]]) -> None:
        """Count ``values``, one a measurement, each into the series that ``series`` picks."""
        places = np.searchsorted(self._bounds, values) + series * self._width
        counts = np.bincount(places, minlength=len(self._cells) * self._width)
        found = counts.reshape(len(self._cells), self._width)
        totals = np.bincount(series, values, minlength=len(self._cells))
        for index in np.flatnonzero(found.any(axis=1)).tolist():
            self._cells[index].add_bulk(found[index].tolist(), float(totals[index]))

    def _remember(
        self,
        places: npt.NDArray[np.intp],
        values: npt.NDArray[np.floating[Any]],
        traces: Sequence[SpanContext | None],
        ended_ns: npt.NDArray[np.int64],
    ) -> None:
        traced = np.array([column for column, trace in enumerate(traces) if trace is not None])
        last = np.full(len(self._cells) * self._width, -1)
        # Where a place is named more than once, numpy keeps the last value.
        last[places[:, traced]] = traced
        offset_ns = time.time_ns() - time.monotonic_ns()
        for place in np.flatnonzero(last >= 0).tolist():
            series, bucket = divmod(place, self._width)
            column = int(last[place])
            trace = traces[column]
            assert trace is not None
            self._cells[series].remember(
                bucket, float(values[series, column]), trace, int(ended_ns[column]) + offset_ns
            )
