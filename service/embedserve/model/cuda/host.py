"""The accelerator on a CPU: a thread for each stream, memory of the host for the device's.

Decides nothing that CUDA does not: work of one stream runs in order, that of two beside each other, and only marks tie
them together. So a copy that does not wait for its pass, a buffer that is used again too early or a pass that was not
filled up gives wrong vectors here too. Slow; it is for tests and for trying the benchmark. What it cannot show is time,
memory, and what only a real capture refuses. Must never know a model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from embedserve.model.cuda.accelerator import Mark
from embedserve.model.cuda.rows_attention import ReferenceRows, RowsAttention

__all__ = ["HostAccelerator", "HostRecording", "HostStream"]


class HostMark:
    """The instant at which a thread came by."""

    def __init__(self, reached: Future[int]) -> None:
        """``reached`` gives the instant, or raises what failed before it."""
        self._reached = reached

    def wait(self) -> None:
        """Until the thread has come by."""
        self._reached.result()

    def ns_until(self, later: Mark) -> int:
        """By the host's clock."""
        assert isinstance(later, HostMark)
        return later._reached.result() - self._reached.result()  # noqa: SLF001 - of its own kind


class HostStream:
    """A thread, which waits without cost and ends with this object."""

    def __init__(self) -> None:
        """No work yet."""
        self._thread = ThreadPoolExecutor(1, "embedserve-stream")
        self._failure: BaseException | None = None

    def run(self, work: Callable[[], None]) -> None:
        """Queue ``work``."""
        self._thread.submit(self._attempt, work)

    def mark(self) -> HostMark:
        """The place after all work so far. It takes the failure with it: what comes later has done nothing wrong."""
        return HostMark(self._thread.submit(self._instant))

    def follow(self, mark: Mark) -> None:
        """The thread waits."""
        self._thread.submit(self._attempt, mark.wait)

    def _attempt(self, work: Callable[[], None]) -> None:
        if self._failure is not None:
            return
        try:
            with torch.inference_mode():
                work()
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for the mark behind it
            self._failure = error

    def _instant(self) -> int:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return time.monotonic_ns()


class HostRecording:
    """Work that is done again, on the buffers and with the sizes that it was captured with."""

    def __init__(self, work: Callable[[], None]) -> None:
        """``work`` must hold nothing of a batch."""
        self._work = work

    def replay(self) -> None:
        """Do it."""
        self._work()


class HostAccelerator:
    """The CPU as a device."""

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def attention(self) -> RowsAttention:
        """Row by row."""
        return ReferenceRows

    def stream(self) -> HostStream:
        """A new thread."""
        return HostStream()

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As any."""
        return torch.empty(shape, dtype=dtype)

    def capture(self, work: Callable[[], None]) -> HostRecording:
        """Run it once, and keep it."""
        work()
        return HostRecording(work)

    def memory_used(self) -> int:
        """Nothing that could be told apart."""
        return 0
