"""Measurements that wait to be counted: some hundred at a time, in numpy, instead of one by one.

Decides when they are counted: when ``ROWS_MAX`` wait, and before anybody reads. Must never know what a column means:
whoever adds rows says how they are counted. To note what a call measured costs the event loop one tuple; finding the
buckets of twelve histograms and adding to them costs 6 us a call one by one and 1 us together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

__all__ = ["ROWS_MAX", "Pending", "Rows"]

ROWS_MAX: Final = 256
"""Rows that are counted together: some 0.3 ms of the event loop's time, a fifth of which any number would cost."""

Columns = Sequence[tuple[Any, ...]]
CountColumns = Callable[[Columns], None]
"""Given one tuple a column, each with a value of every row. Called with the lock held, in any thread."""


class Rows:
    """Rows of one kind. The event loop adds; any thread has them counted, one at a time."""

    __slots__ = ("_count", "_lock", "_rows")

    def __init__(self, count: CountColumns, lock: threading.Lock) -> None:
        """Made by ``Pending.rows``."""
        self._count = count
        self._lock = lock
        self._rows: list[tuple[Any, ...]] = []

    def add(self, row: tuple[Any, ...]) -> None:
        """Note ``row``. Event loop only; never waits for a reader."""
        rows = self._rows
        rows.append(row)
        # Whoever holds the lock counts these rows; a reader that is at it for longer is asked again at the next row.
        if len(rows) >= ROWS_MAX and self._lock.acquire(blocking=False):
            try:
                self.fold()
            finally:
                self._lock.release()

    def fold(self) -> None:
        """Count what waits. The lock is held."""
        # The event loop may append between these steps, and only at the end.
        taken = self._rows[:]
        del self._rows[: len(taken)]
        if taken:
            self._count(tuple(zip(*taken, strict=True)))


class Pending:
    """All rows that wait in one process."""

    def __init__(self) -> None:
        """Nothing waits."""
        self._lock = threading.Lock()
        self._kinds: list[Rows] = []

    def rows(self, count: CountColumns) -> Rows:
        """A kind of rows, which ``count`` counts; made at wiring."""
        kind = Rows(count, self._lock)
        self._kinds.append(kind)
        return kind

    @contextmanager
    def counted(self) -> Iterator[None]:
        """All that waited is counted, and nothing more is while this lasts."""
        with self._lock:
            for kind in self._kinds:
                kind.fold()
            yield
