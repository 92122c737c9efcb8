"""What a call's marks become: its duration, and the time of each stage.

Decides how marks turn into measurements. Must never know sampling or spans. Calls that were answered are counted
together (``pending``), the others one by one.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from opentelemetry.trace import SpanContext

from embedserve.telemetry import instruments as table
from embedserve.telemetry.bulk_count import S_PER_NS, HistogramGroup
from embedserve.telemetry.instruments import Instruments
from embedserve.telemetry.pending import Columns, Rows
from embedserve.telemetry.segments import ADMIT_EXACT, ORDER, Marks, segments_between
from embedserve.telemetry.tally import HistogramCell, observe

__all__ = ["StageFigures", "answered_calls"]

_ADMITS: Final = ("admit", ADMIT_EXACT)
_ADMIT, _EXACT = (ORDER.index(name) for name in _ADMITS)
_KEPT: Final = [index for index in range(len(ORDER)) if index != _EXACT]
"""Both halves of admission are one stage."""


class StageFigures:
    """The histograms of stages, for calls that are counted one by one."""

    def __init__(self, instruments: Instruments) -> None:
        """Find the series."""
        stage = instruments.histogram(table.STAGE_DURATION)
        self._cells = {name: stage.cell(name) for name in table.STAGES}

    def count(
        self, arrived_ns: int, marks: Marks, ended_ns: int, traced: SpanContext | None, now_ns: int, *, answered: bool
    ) -> None:
        """Each stage that the call reached, once; ``now_ns`` is wall clock."""
        cells = self._cells
        observe(cells["receive"], (marks[0] - arrived_ns) * S_PER_NS, traced, now_ns)
        admitted_ns, was_judged = 0, False
        for stage, begin_ns, end_ns in segments_between(marks, ended_ns, answered=answered):
            if stage in _ADMITS:
                admitted_ns += end_ns - begin_ns
                was_judged = True
            else:
                observe(cells[stage], (end_ns - begin_ns) * S_PER_NS, traced, now_ns)
        if was_judged:
            observe(cells["admit"], admitted_ns * S_PER_NS, traced, now_ns)


def answered_calls(instruments: Instruments, duration: HistogramCell) -> Rows:
    """Rows of calls that were answered: arrival, the ``Marks``, the end, and the trace of a sampled one or ``None``.

    ``duration`` is the series of their method. No mark is missing, since none can be counted as not reached here.
    """
    stage = instruments.histogram(table.STAGE_DURATION)
    names = ("receive", *(ORDER[index] for index in _KEPT))
    group = HistogramGroup([duration, *(stage.cell(name) for name in names)])

    def count(columns: Columns) -> None:
        borders = np.array(columns[:-1], dtype=np.int64)
        group.count(_durations(borders) * S_PER_NS, columns[-1], borders[-1])

    return instruments.pending.rows(count)


def _durations(borders: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The whole, ``receive`` and the stages in their order, as ``segments_between`` cuts them: without gaps."""
    arrived, ended = borders[0], borders[-1]
    inner = np.maximum.accumulate(borders[1:], axis=0)
    # Windows of a stream overlap: a later window's mark may lie before an earlier window's next one.
    np.minimum(inner[1:], ended, out=inner[1:])
    stages = np.diff(inner, axis=0)
    stages[_ADMIT] += stages[_EXACT]
    return np.vstack((ended - arrived, inner[0] - arrived, stages[_KEPT]))
