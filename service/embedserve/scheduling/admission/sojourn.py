"""How long requests have taken lately: quantiles over a sliding window, and an online quantile.

Decides nothing. Both cost O(log n) a sample and a question: no sorting, no list of samples.
"""

from __future__ import annotations

__all__ = ["OnlineQuantile", "SojournWindow"]


class SojournWindow:
    """Counts of durations of the last ``window_ns``, in bins 3 % wide (the layout of HdrHistogram), 1 us to 73 min.

    A Fenwick tree answers a quantile in O(log bins); the window slides in tenths, each of which is taken out whole.
    """

    __slots__ = ("_by_slice", "_slice_ns", "_slices", "_tree", "total")

    SUB_BITS = 5
    """32 bins an octave."""
    LOW_BITS = 10
    """Durations under 1,024 ns share the first bin."""
    BINS = 1_024
    SLICES = 10

    def __init__(self, window_ns: int) -> None:
        self._slice_ns = max(window_ns // self.SLICES, 1)
        self._tree = [0] * (self.BINS + 1)
        self._by_slice: dict[int, dict[int, int]] = {}
        self._slices: list[int] = []
        self.total = 0
        """Samples in the window when last touched."""

    def add(self, duration_ns: int, now_ns: int) -> None:
        """One request ended."""
        self._slide(now_ns)
        slot = now_ns // self._slice_ns
        counts = self._by_slice.get(slot)
        if counts is None:
            counts = self._by_slice[slot] = {}
            self._slices.append(slot)
        k = self._bin(duration_ns)
        counts[k] = counts.get(k, 0) + 1
        self._shift(k, 1)

    def count(self, now_ns: int) -> int:
        """Samples in the window now."""
        self._slide(now_ns)
        return self.total

    def quantile_ns(self, q: float, now_ns: int) -> int | None:
        """The upper edge of the bin that holds the quantile; ``None`` without samples."""
        self._slide(now_ns)
        if not self.total:
            return None
        rank = max(1, -int(-q * self.total // 1))
        position, step, tree = 0, self.BINS, self._tree
        while step:
            ahead = position + step
            if ahead <= self.BINS and tree[ahead] < rank:
                position = ahead
                rank -= tree[ahead]
            step >>= 1
        return self._edge(position)

    def _slide(self, now_ns: int) -> None:
        oldest = now_ns // self._slice_ns - self.SLICES
        while self._slices and self._slices[0] <= oldest:
            for k, n in self._by_slice.pop(self._slices.pop(0)).items():
                self._shift(k, -n)

    def _shift(self, k: int, n: int) -> None:
        self.total += n
        position, tree = k + 1, self._tree
        while position <= self.BINS:
            tree[position] += n
            position += position & -position

    @classmethod
    def _bin(cls, duration_ns: int) -> int:
        octave = duration_ns.bit_length() - 1 - cls.LOW_BITS
        if octave < 0:
            return 0
        mantissa = (duration_ns >> (octave + cls.LOW_BITS - cls.SUB_BITS)) & ((1 << cls.SUB_BITS) - 1)
        return min((octave << cls.SUB_BITS) + mantissa, cls.BINS - 1)

    @classmethod
    def _edge(cls, k: int) -> int:
        octave, mantissa = k >> cls.SUB_BITS, k & ((1 << cls.SUB_BITS) - 1)
        return ((1 << cls.SUB_BITS) + mantissa + 1) << (octave + cls.LOW_BITS - cls.SUB_BITS)


class OnlineQuantile:
    """Follows a quantile of a stream of positive ratios without keeping them.

    Stochastic approximation of the pinball loss (Robbins and Monro 1951): up by ``step * q`` when a sample lies
    above, down by ``step * (1 - q)`` otherwise, relative to the value, so that it is as quick at 0.1 as at 10.
    """

    __slots__ = ("_down", "_high", "_low", "_up", "value")

    def __init__(self, q: float, step: float, start: float = 1.0, low: float = 0.25, high: float = 16.0) -> None:
        self._up = 1.0 + step * q
        self._down = 1.0 - step * (1.0 - q)
        self._low = low
        self._high = high
        self.value = start

    def observe(self, ratio: float) -> None:
        """One sample."""
        moved = self.value * (self._up if ratio > self.value else self._down)
        self.value = min(max(moved, self._low), self._high)
