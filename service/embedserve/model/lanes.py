"""How one pass is spread over the cores of a CPU: by rows, each core on its own, and not within each operation.

Decides how many lanes a pass gets and which rows ride in which. Must never know a model or a tensor.

Threads within an operation meet at a barrier after each, some hundred times a pass. On small texts the barriers cost
more than they bring (MiniLM in bfloat16 on two cores of a Zen 5: 12 tokens 9.4 ms with two threads, 5.3 with one; 128
tokens 22.5 and 14.5), and whatever takes one core for a moment, an event loop or a client beside us, stops all of them:
at twice the load the capacity fell by 28 % where 5 % of the processor's time was taken. Lanes meet once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Lanes"]

_T = TypeVar("_T")

Int = npt.NDArray[np.int64]

SPLIT_TOKENS = 384
"""Tokens from which lanes pay: 256 took 25 ms in one and 29 in two, 640 54 and 49, 1,024 89 and 48."""


class Lanes:
    """The cores for one backend's passes. Used from one thread, which is the first lane itself.

    The other threads are begun when they are needed, wait without cost, and end with this object.
    """

    def __init__(self, count: int) -> None:
        """``count`` lanes, each a thread that computes alone."""
        self._count = count
        # Per thread where torch runs on OpenMP; a thread that has said nothing takes the last value that anybody set.
        torch.set_num_threads(1)
        self._others = ThreadPoolExecutor(
            max(count - 1, 1), "embedserve-lane", initializer=torch.set_num_threads, initargs=(1,)
        )

    def shares(self, lengths: Int) -> list[Int]:
        """The rows of each lane, ascending; one share where lanes do not pay. All shares have nearly as many tokens."""
        lanes = min(self._count, lengths.size)
        if lanes < 2 or int(lengths.sum()) < SPLIT_TOKENS:
            return [np.arange(lengths.size)]
        # Longest first, dealt forth and back, so that no lane always gets the longer one.
        order = np.argsort(-lengths, kind="stable")
        turn = np.arange(lengths.size) % (2 * lanes)
        lane = np.where(turn < lanes, turn, 2 * lanes - 1 - turn)
        return [np.sort(order[lane == k]) for k in range(lanes)]

    def run(self, work: Sequence[Callable[[], _T]]) -> list[_T]:
        """Do all at once, the first here; what one raises is raised when all have ended."""
        futures = [self._others.submit(each) for each in work[1:]]
        try:
            first = work[0]()
        finally:
            for future in futures:
                future.exception()  # waits: no lane may still read the batch when this returns
        return [first, *(future.result() for future in futures)]

    @contextmanager
    def all_on_one(self, tokens: int) -> Iterator[None]:
        """All cores within each operation, for a single long row, which cannot be dealt out."""
        if self._count < 2 or tokens < SPLIT_TOKENS:
            yield
            return
        torch.set_num_threads(self._count)
        try:
            yield
        finally:
            torch.set_num_threads(1)
