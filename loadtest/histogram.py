"""Latencies in few numbers: buckets whose width grows with the value, as in HdrHistogram.

Decides the precision: 128 buckets for each doubling, so that a value is known to 0.8 %. Histograms of runs add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["BUCKETS_A_DOUBLING", "pack", "percentile", "unpack"]

BUCKETS_A_DOUBLING: Final = 128
UNIT_MS: Final = 0.001
"""The first bucket's upper end: nothing is measured below a microsecond."""


def pack(values_ms: npt.NDArray[np.float64]) -> dict[str, int]:
    """Counts by bucket number, empty buckets left out. Shape of ``values_ms``: ``[calls]``."""
    if not len(values_ms):
        return {}
    numbers = np.ceil(np.log2(np.maximum(values_ms, UNIT_MS) / UNIT_MS) * BUCKETS_A_DOUBLING).astype(np.int64)
    found, counts = np.unique(numbers, return_counts=True)
    return {str(number): int(count) for number, count in zip(found, counts, strict=True)}


def unpack(packed: Sequence[Mapping[str, int]]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The upper ends of the buckets in ms, ascending, and their counts; of several histograms together."""
    counts: dict[int, int] = {}
    for one in packed:
        for number, count in one.items():
            counts[int(number)] = counts.get(int(number), 0) + count
    numbers = sorted(counts)
    ends = UNIT_MS * 2 ** (np.array(numbers, dtype=np.float64) / BUCKETS_A_DOUBLING)
    return ends, np.array([counts[number] for number in numbers], dtype=np.int64)


def percentile(packed: Sequence[Mapping[str, int]], share: float) -> float:
    """The value in ms that ``share`` (0 to 1) of all calls do not pass; NaN without calls."""
    ends, counts = unpack(packed)
    if not len(ends):
        return float("nan")
    place = np.searchsorted(np.cumsum(counts), share * counts.sum())
    return float(ends[min(int(place), len(ends) - 1)])
