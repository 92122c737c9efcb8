"""Instants at which submissions become due: deadlines, arrivals.

Decides which submission is due first, ties by submission id. Must never know what is due: the owner says by a predicate
which submissions still count, because leaving is frequent and happens in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush

__all__ = ["Agenda"]


class Agenda:
    """A heap of (instant, submission id); gone entries are dropped when met, and swept when they are the most.

    O(log n) a call, amortised; never more than ``2 * live + SLACK`` entries after ``add``, so that cancelled work
    cannot fill memory while nothing is popped.
    """

    __slots__ = ("_heap", "_is_live", "_sweep_at")

    SLACK = 64
    """Gone entries that are not worth a sweep."""

    def __init__(self, is_live: Callable[[int], bool]) -> None:
        self._heap: list[tuple[int, int]] = []
        self._is_live = is_live
        self._sweep_at = 2 * self.SLACK

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, instant_ns: int, submission_id: int) -> None:
        """Notes that a submission is due at an instant."""
        heappush(self._heap, (instant_ns, submission_id))
        if len(self._heap) > self._sweep_at:
            self._heap = [entry for entry in self._heap if self._is_live(entry[1])]
            heapify(self._heap)
            self._sweep_at = 2 * (len(self._heap) + self.SLACK)

    def first_ns(self) -> int | None:
        """The earliest instant of a submission that still counts."""
        heap, is_live = self._heap, self._is_live
        while heap:
            if is_live(heap[0][1]):
                return heap[0][0]
            heappop(heap)
        return None

    def pop_due(self, now_ns: int) -> int | None:
        """Removes and returns one submission due at or before now, in order; ``None`` when there is none."""
        heap, is_live = self._heap, self._is_live
        while heap and heap[0][0] <= now_ns:
            _, submission_id = heappop(heap)
            if is_live(submission_id):
                return submission_id
        return None
