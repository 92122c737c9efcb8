"""What a packed pass asks of a device: streams that run beside the host, marks in them, memory to copy from, graphs.

Decides the few verbs. ``device.py`` has them on CUDA, ``host.py`` on a CPU, with threads for streams, so that the order
of copies and passes, the use of buffers and the filling-up of a pass are the same code and can be tested anywhere. Must
never know a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from embedserve.model.cuda.rows_attention import RowsAttention

__all__ = ["Accelerator", "CannotCapture", "Mark", "Recording", "Stream"]


class CannotCapture(Exception):
    """Work could not be captured; the stream is as good as before."""


class Mark(Protocol):
    """A place in a stream."""

    def wait(self) -> None:
        """Until all work before it is done, without the interpreter's lock. Raises what that work raised."""

    def ns_until(self, later: Mark) -> int:
        """Nanoseconds of the device between two marks that are done."""


class Stream(Protocol):
    """Work in order, beside the host. Used by one thread at a time."""

    def run(self, work: Callable[[], None]) -> None:
        """Begin ``work`` when all before it is done. May raise what ``work`` raises, or leave it to the next mark."""

    def mark(self) -> Mark:
        """The place after all work so far."""

    def follow(self, mark: Mark) -> None:
        """What comes now waits for a place in another stream; the host does not."""


class Recording(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """The same work on the same buffers, from within ``run`` of a stream."""


class Accelerator(Protocol):
    """One device."""

    @property
    def device(self) -> torch.device:
        """Where tensors lie."""

    @property
    def attention(self) -> RowsAttention:
        """The kernel for rows of any length."""

    def stream(self) -> Stream:
        """A new stream."""

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the host that the device copies from and to by itself."""

    def capture(self, work: Callable[[], None]) -> Recording:
        """Run ``work`` once, then capture it; all recordings share their memory. Called from within ``run``.

        Raises ``CannotCapture``, or what ``work`` raises when it runs.
        """

    def memory_used(self) -> int:
        """Bytes of the device that this process has taken, 0 where that means nothing."""
