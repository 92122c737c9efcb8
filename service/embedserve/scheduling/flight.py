"""Batches that run now and how long they still will.

Decides nothing but the residual time. Must never know outcomes or who waits.
"""

from __future__ import annotations

from embedserve.scheduling.item import Batch
from embedserve.scheduling.retry import Group

__all__ = ["Flight"]


class Flight:
    """Dispatched batches in order. A device begins with them one after another, so only the first one's clock runs."""

    __slots__ = ("_batches", "_front_since_ns", "_predicted_ns", "items", "tokens")

    def __init__(self) -> None:
        self._batches: dict[int, tuple[Batch, Group, int]] = {}
        self._predicted_ns = 0
        self._front_since_ns = 0
        self.items = 0
        self.tokens = 0

    def __bool__(self) -> bool:
        return bool(self._batches)

    def start(self, batch: Batch, group: Group, predicted_ns: int, now_ns: int) -> None:
        """A batch was handed out."""
        if not self._batches:
            self._front_since_ns = now_ns
        self._batches[batch.id] = (batch, group, predicted_ns)
        self._predicted_ns += predicted_ns
        self.items += batch.rows
        self.tokens += batch.tokens

    def end(self, batch_id: int, now_ns: int) -> tuple[Batch, Group, int]:
        """A batch came back; also its predicted time. Raises ``KeyError`` for one that does not run."""
        if next(iter(self._batches), None) == batch_id:  # one that overtakes another leaves that one's clock alone
            self._front_since_ns = now_ns
        batch, group, predicted_ns = self._batches.pop(batch_id)
        self._predicted_ns -= predicted_ns
        self.items -= batch.rows
        self.tokens -= batch.tokens
        return batch, group, predicted_ns

    def clear(self) -> list[tuple[Batch, Group]]:
        """Gives up every batch."""
        gone = [(batch, group) for batch, group, _ in self._batches.values()]
        self._batches.clear()
        self._predicted_ns = self.items = self.tokens = 0
        return gone

    def residual_ns(self, now_ns: int) -> int:
        """Predicted time until the running batches end.

        A batch that overran its prediction is expected to take as long again as it overran (Lindy): a stalled device
        looks slower the longer it stalls, and admission sees it before any deadline does.
        """
        if not self._batches:
            return 0
        _, _, front_ns = next(iter(self._batches.values()))
        ran_ns = max(now_ns - self._front_since_ns, 0)
        return self._predicted_ns - front_ns + abs(front_ns - ran_ns)
