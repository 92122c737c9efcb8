"""The accelerator on CUDA.

Decides which of torch's calls stand behind each verb. Nothing here waits for the device but ``CudaMark.wait`` and a
capture, and nothing gives memory back: ``torch.cuda.graph`` would empty the allocator's cache at each capture, so the
plain calls are made. Must never know a model.

Source: torch 2.11 to 2.13, ``torch/cuda/graphs.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from embedserve.model.cuda.accelerator import CannotCapture, Mark
from embedserve.model.cuda.rows_attention import RowsAttention, VarlenRows

__all__ = ["CudaAccelerator"]


class CudaMark:
    """An event."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """Recorded in ``stream`` now."""
        self.event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def wait(self) -> None:
        """Until the event has come; torch lets go of the interpreter's lock for it."""
        self.event.synchronize()

    def ns_until(self, later: Mark) -> int:
        """From the device's own clock, some half a microsecond fine."""
        assert isinstance(later, CudaMark)
        return int(self.event.elapsed_time(later.event) * 1e6)


class CudaStream:
    """A stream of one device. Errors of a kernel come with a later call, as always on CUDA."""

    def __init__(self, device: torch.device) -> None:
        """Beside the default stream, and not in order with it."""
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Callable[[], None]) -> None:
        """Launch ``work`` into the stream."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            work()

    def mark(self) -> CudaMark:
        """An event after all that was launched."""
        return CudaMark(self._stream)

    def follow(self, mark: Mark) -> None:
        """The device waits for the event."""
        assert isinstance(mark, CudaMark)
        self._stream.wait_event(mark.event)


class CudaAccelerator:
    """One GPU."""

    def __init__(self, device: torch.device) -> None:
        """``device`` exists."""
        self._device = device
        self._pool: Any = None
        self._capturing = threading.Lock()

    @property
    def device(self) -> torch.device:
        """The GPU."""
        return self._device

    @property
    def attention(self) -> RowsAttention:
        """The flash kernel that torch brings."""
        return VarlenRows

    def stream(self) -> CudaStream:
        """A new stream."""
        return CudaStream(self._device)

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pinned: a copy from other memory is made by the host, and waits for it."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of ``work``, which has run twice before: libraries make themselves ready at the first call.

        Other threads may go on: only what this one does is judged (``thread_local``). The current stream must be none
        of torch's default ones, which ``CudaStream.run`` sees to.
        """
        with self._capturing:
            for _ in range(2):
                work()
            torch.cuda.current_stream(self._device).synchronize()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            failure = _failure_of(work)
            ended = _failure_of(graph.capture_end)  # in any case: the stream is of no use while it captures
            failure = failure or ended
            if failure is None:
                return graph
            raise CannotCapture(f"{type(failure).__name__}: {failure}")

    def memory_used(self) -> int:
        """What torch's allocator has taken from the driver."""
        return torch.cuda.memory_reserved(self._device)


def _failure_of(step: Callable[[], None]) -> RuntimeError | None:
    try:
        step()
    except RuntimeError as error:
        return error
    return None
