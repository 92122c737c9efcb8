"""Counts and histograms that cost the event loop a fraction of a microsecond.

Decides how a measurement is kept until somebody reads it. Must never know what is measured or who reads. The SDK's own
``Histogram.record`` costs 3 to 6 us (it copies and hashes the attributes, takes two locks and asks for the time), which
is a tenth of what a whole call may cost; a cell here is found once and then costs an addition or a bisection. Counters
are handed to OpenTelemetry as observable counters, histograms as data points beside the SDK's own (``exporters``,
``prometheus``).

What every call measures is not even counted at once: it waits in ``Pending`` until a few hundred are counted together,
or until somebody reads, so that a reader sees all that was measured before.

One thread measures (the event loop), any thread reads: a reader copies the bucket list in one step, so that counts are
exact and only ``sum`` may be one measurement ahead or behind. What is counted together is kept apart from what is
counted one by one, because any thread may do it, under a lock.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Generic, TypeVar

from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import HistogramDataPoint
from opentelemetry.trace import SpanContext

from embedserve.telemetry.pending import Pending
from embedserve.telemetry.semconv import OTHER

__all__ = ["CounterCell", "CounterTally", "HistogramCell", "HistogramTally", "observe"]

UNDECLARED_SERIES_MAX: Final = 32
"""Label sets that a tally takes beside its declared ones; more are counted as ``_OTHER``. Cardinality is closed."""


class CounterCell:
    """One series of a counter: add to ``value``."""

    __slots__ = ("attributes", "value")

    def __init__(self, attributes: Mapping[str, str]) -> None:
        """Begin at zero."""
        self.attributes = dict(attributes)
        self.value: float = 0


class HistogramCell:
    """One series of a histogram."""

    __slots__ = (
        "_bulk_counts", "_bulk_sum", "_counts", "_exemplars", "_pending", "_since_ns", "_sum", "attributes", "bounds",
    )  # fmt: skip

    def __init__(self, attributes: Mapping[str, str], bounds: Sequence[float], pending: Pending | None = None) -> None:
        """``bounds`` are upper, inclusive and ascending, in the instrument's unit; a read asks ``pending`` first."""
        self.attributes = dict(attributes)
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self._bulk_counts = self._counts.copy()
        self._exemplars: list[tuple[float, SpanContext, int] | None] = [None] * len(self._counts)
        self._sum = 0.0
        self._bulk_sum = 0.0
        self._pending = pending or Pending()
        self._since_ns = time.time_ns()

    def observe(self, value: float) -> None:
        """Count ``value``, in the instrument's unit."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self._sum += value

    def observe_traced(self, value: float, context: SpanContext, now_ns: int) -> None:
        """Count ``value``; its bucket remembers the sampled trace that it belongs to. ``now_ns`` is wall clock."""
        index = bisect_left(self.bounds, value)
        self._counts[index] += 1
        self._sum += value
        self._exemplars[index] = (value, context, now_ns)

    def add_bulk(self, counts: Sequence[int], total: float) -> None:
        """Count what was counted together: so many in each bucket. The lock of ``pending`` is held."""
        self._bulk_counts = [a + b for a, b in zip(self._bulk_counts, counts, strict=True)]
        self._bulk_sum += total

    def remember(self, bucket: int, value: float, context: SpanContext, now_ns: int) -> None:
        """The last of its bucket that belongs to a sampled trace, as ``observe_traced`` does."""
        self._exemplars[bucket] = (value, context, now_ns)

    def point(self, now_ns: int) -> HistogramDataPoint:
        """Everything since the start, as OpenTelemetry's cumulative data point."""
        with self._pending.counted():
            counts = [a + b for a, b in zip(self._counts.copy(), self._bulk_counts, strict=True)]
            total = self._sum + self._bulk_sum
        return HistogramDataPoint(
            attributes=self.attributes,
            start_time_unix_nano=self._since_ns,
            time_unix_nano=now_ns,
            count=sum(counts),
            sum=total,
            bucket_counts=counts,
            explicit_bounds=self.bounds,
            # Extremes of a whole life are of no use to anyone; the protocol makes both optional, the SDK's type not.
            min=None,  # type: ignore[arg-type]
            max=None,  # type: ignore[arg-type]
            exemplars=[_exemplar(*kept) for kept in self._exemplars.copy() if kept is not None],
        )


def observe(cell: HistogramCell, value: float, context: SpanContext | None, now_ns: int) -> None:
    """Count ``value``, with an exemplar where it belongs to the sampled trace ``context``; ``now_ns`` is wall clock."""
    if context is None:
        cell.observe(value)
    else:
        cell.observe_traced(value, context, now_ns)


def _exemplar(value: float, context: SpanContext, at_ns: int) -> Exemplar:
    return Exemplar({}, value, at_ns, context.span_id, context.trace_id)


CellT = TypeVar("CellT")


class _Tally(Generic[CellT]):
    """The series of one instrument, by their label values."""

    def __init__(self, labels: Sequence[str], declared: Iterable[tuple[str, ...]], constant: Mapping[str, str]) -> None:
        self._labels = tuple(labels)
        self._constant = dict(constant)
        self._cells = {values: self._new(self._named(values)) for values in declared}
        self._series_max = len(self._cells) + UNDECLARED_SERIES_MAX

    def cell(self, *values: str) -> CellT:
        """The series with these label values, in the instrument's order; ``_OTHER`` when there are too many."""
        cell = self._cells.get(values)
        if cell is None:
            if len(self._cells) >= self._series_max:
                values = (OTHER,) * len(self._labels)
            cell = self._cells.setdefault(values, self._new(self._named(values)))
        return cell

    def cells(self) -> list[CellT]:
        """Every series there is now."""
        return list(self._cells.values())

    def _named(self, values: tuple[str, ...]) -> dict[str, str]:
        return {**self._constant, **dict(zip(self._labels, values, strict=True))}

    def _new(self, attributes: dict[str, str]) -> CellT:
        raise NotImplementedError


class CounterTally(_Tally[CounterCell]):
    """A counter's series."""

    def _new(self, attributes: dict[str, str]) -> CounterCell:
        return CounterCell(attributes)


class HistogramTally(_Tally[HistogramCell]):
    """A histogram's series, all with one set of bounds."""

    def __init__(
        self,
        labels: Sequence[str],
        declared: Iterable[tuple[str, ...]],
        constant: Mapping[str, str],
        bounds: Sequence[float],
        pending: Pending | None = None,
    ) -> None:
        """``bounds`` and ``pending`` as in ``HistogramCell``."""
        self._bounds = tuple(bounds)
        self._pending = pending
        super().__init__(labels, declared, constant)

    def _new(self, attributes: dict[str, str]) -> HistogramCell:
        return HistogramCell(attributes, self._bounds, self._pending)
