"""What the engine's marks become: durations, sizes and ratios of passes, waits and tokenizer work.

Decides how marks turn into measurements that are counted together (``pending``). Must never know events: ``observers``
says which rows there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from embedserve.telemetry import instruments as table
from embedserve.telemetry.bulk_count import S_PER_NS, HistogramGroup
from embedserve.telemetry.instruments import Instruments
from embedserve.telemetry.pending import Columns, Rows
from embedserve.telemetry.semconv import OTHER

__all__ = ["answered_requests", "computed_passes", "tokenizer_work"]


def tokenizer_work(instruments: Instruments) -> Rows:
    """Rows of wait for a thread and time at work, nanoseconds."""
    group = HistogramGroup(
        [instruments.histogram(table.TOKENIZER_WAIT).cell(), instruments.histogram(table.TOKENIZER_DURATION).cell()]
    )
    return instruments.pending.rows(lambda columns: group.count(np.array(columns) * S_PER_NS))


def answered_requests(instruments: Instruments, edges: Sequence[int]) -> Rows:
    """Rows of requests that were answered: bucket, and when they were queued, dequeued and computed; the prediction.

    Times are nanoseconds, the prediction above 0. What lies beyond the last of ``edges``, and everything where they are
    not known, is one series: a packed pass has no edges and gives the longest row instead.
    """
    waits = HistogramGroup([instruments.histogram(table.QUEUE_WAIT).cell(word) for word in (*map(str, edges), OTHER)])
    totals = HistogramGroup(
        [instruments.histogram(table.WAIT_PREDICTED).cell(), instruments.histogram(table.WAIT_ACTUAL).cell()]
    )
    ratio = HistogramGroup([instruments.histogram(table.WAIT_PREDICTION).cell()])
    borders = np.array(edges, dtype=np.int64)

    def count(columns: Columns) -> None:
        bucket, queued, dequeued, computed, predicted = np.array(columns)
        waits.count_picked(np.searchsorted(borders, bucket), np.maximum(dequeued - queued, 0) * S_PER_NS)
        took = np.maximum(computed - queued, 0)
        totals.count(np.stack((predicted, took)) * S_PER_NS)
        ratio.count((took / predicted)[None])

    return instruments.pending.rows(count)


def computed_passes(instruments: Instruments) -> Rows:
    """Rows of passes that ended well: hand-over, the six marks of ``PassTimes``, the result's return; rows, tokens and
    computed tokens; device time and its prediction; the trace, or ``None``. The computed tokens and the prediction are
    above 0.
    """  # noqa: D205 - a list
    stage = instruments.histogram(table.BATCH_STAGE_DURATION)
    times = HistogramGroup(
        [instruments.histogram(table.BATCH_DURATION).cell("ok"), *(stage.cell(name) for name in table.PASS_STAGES)]
    )
    items = HistogramGroup([instruments.histogram(table.BATCH_ITEMS).cell()])
    tokens = HistogramGroup(
        [instruments.histogram(table.BATCH_TOKENS).cell(), instruments.histogram(table.BATCH_PADDED_TOKENS).cell()]
    )
    efficiency = HistogramGroup([instruments.histogram(table.BATCH_EFFICIENCY).cell()])
    prediction = HistogramGroup([instruments.histogram(table.BATCH_PREDICTION).cell()])

    def count(columns: Columns) -> None:
        numbers: npt.NDArray[np.int64] = np.array(columns[:-1])
        marks = numbers[:8]
        durations = np.vstack((marks[-1] - marks[0], np.diff(marks[1:-1], axis=0)))
        times.count(durations * S_PER_NS, columns[-1], marks[-1])
        rows, useful, computed, busy, predicted = numbers[8:]
        items.count(rows[None])
        tokens.count(np.stack((useful, computed)))
        efficiency.count((useful / computed)[None])
        prediction.count((busy / predicted)[None])

    return instruments.pending.rows(count)
