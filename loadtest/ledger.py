"""What is kept of each call: one row, in a form that processes can hand to each other.

Decides which facts of a call survive. Must never know what they mean: figures are made of them in ``figures.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.target import Reply

__all__ = ["ROW", "Ledger", "Rows", "Scribe"]

ROW = np.dtype(
    [
        ("meant", "f8"),  # seconds since the start of the run; of a closed loop the same as sent
        ("sent", "f8"),
        ("ended", "f8"),
        ("outcome", "u2"),  # index into Ledger.outcomes
        ("phase", "u2"),
        ("texts", "u4"),  # asked for
        ("items", "u4"),  # received
        ("tokens", "u4"),
        ("batch_items", "f4"),
        ("padding_efficiency", "f4"),
        ("server_ms", "f4"),
        ("first_ms", "f4"),
        ("retry_after_ms", "f4"),  # NaN where the server did not say
    ]
)
Rows = npt.NDArray[Any]
BLOCK = 8192
"""Rows that wait as tuples, five times the size of a row in an array."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """All calls of one client process, or of several."""

    rows: Rows
    """Of ``ROW``, in the order in which they ended."""
    outcomes: tuple[tuple[str, str], ...]
    """Status and reason of each outcome that a row may have."""

    @classmethod
    def merged(cls, ledgers: Iterable[Ledger]) -> Ledger:
        """One ledger of several: outcomes are numbered anew, rows ordered by their end."""
        numbers: dict[tuple[str, str], int] = {}
        parts = []
        for ledger in ledgers:
            translation = [numbers.setdefault(outcome, len(numbers)) for outcome in ledger.outcomes]
            rows = ledger.rows.copy()
            if translation:
                rows["outcome"] = np.array(translation, dtype=np.uint16)[rows["outcome"]]
            parts.append(rows)
        joined = np.concatenate(parts) if parts else np.empty(0, ROW)
        return cls(joined[np.argsort(joined["ended"], kind="stable")], tuple(numbers))

    def having(self, *statuses: str, reason: str | None = None) -> npt.NDArray[np.bool_]:
        """Which rows ended with one of ``statuses``, and for this ``reason`` where one is named."""
        wanted = [
            number for number, (status, why) in enumerate(self.outcomes) if status in statuses and reason in (None, why)
        ]
        return np.isin(self.rows["outcome"], wanted)


class Scribe:
    """Writes the rows of one client."""

    def __init__(self) -> None:
        self._open: list[tuple[Any, ...]] = []
        self._blocks: list[Rows] = []
        self._outcomes: dict[tuple[str, str], int] = {}
        self.calls = 0
        self.failed = 0

    def note(self, meant: float, sent: float, ended: float, phase: int, texts: int, reply: Reply) -> None:
        """One call has ended."""
        outcome = self._outcomes.setdefault((reply.status, reply.reason), len(self._outcomes))
        retry = float("nan") if reply.retry_after_ms is None else reply.retry_after_ms
        self.calls += 1
        self.failed += reply.status != "OK"
        self._open.append(
            (meant, sent, ended, outcome, phase, texts, reply.items, reply.tokens,
             reply.batch_items, reply.padding_efficiency, reply.server_ms, reply.first_ms, retry)
        )  # fmt: skip
        if len(self._open) == BLOCK:
            self._close_block()

    def ledger(self) -> Ledger:
        """All that was noted."""
        self._close_block()
        return Ledger(np.concatenate(self._blocks), tuple(self._outcomes))

    def _close_block(self) -> None:
        self._blocks.append(np.array(self._open, dtype=ROW))
        self._open = []
