"""When the stages of a pass began and ended, by the host's clock and by the device's.

Decides how a GPU's own time is read without stopping it between stages: events, read once after the last copy. Must
never know what the stages do.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from embedserve.model.backend import PassTimes

__all__ = ["Stopwatch", "latest"]

DEVICE_MARKS = 3
"""Copied in, forward, pooled."""


class Stopwatch:
    """Started when made; ``mark_assembled`` once, ``mark_device`` after each device stage, then ``stop``."""

    def __init__(self, device: torch.device) -> None:
        """Start."""
        self._cuda = device.type == "cuda"
        self._start_ns = self._assembled_ns = time.monotonic_ns()
        self._marks_ns: list[int] = []
        self._events: list[torch.cuda.Event] = []

    @property
    def started_ns(self) -> int:
        """When it was made."""
        return self._start_ns

    def mark_assembled(self) -> None:
        """The batch is laid out on the host."""
        self._assembled_ns = time.monotonic_ns()

    def mark_device(self) -> None:
        """A device stage ends here: copies in, then the forward pass, then pooling."""
        if self._cuda:
            self._events.append(_recorded())
        else:
            self._marks_ns.append(time.monotonic_ns())

    def stop(self) -> PassTimes:
        """The vectors are on the host. Each time is at least the one before."""
        end_ns = time.monotonic_ns()
        if self._cuda:
            self._marks_ns = self._device_marks(end_ns)
        assert len(self._marks_ns) == DEVICE_MARKS, "a pass has three device stages"
        copied_in_ns, forward_ns, pooled_ns = self._marks_ns
        return PassTimes(self._start_ns, self._assembled_ns, copied_in_ns, forward_ns, pooled_ns, end_ns)

    def _device_marks(self, end_ns: int) -> list[int]:
        """Host times of the events, counted back from the end of the last copy, which waited for all of them."""
        last = _recorded()
        last.synchronize()
        marks = (end_ns - int(event.elapsed_time(last) * 1e6) for event in self._events)
        return [max(mark, self._assembled_ns) for mark in marks]


def latest(start_ns: int, lanes: Sequence[PassTimes]) -> PassTimes:
    """The stages of a pass that began at ``start_ns`` and ran in lanes: each ends when its last lane is through."""
    return PassTimes(
        start_ns,
        max(times.assembled_ns for times in lanes),
        max(times.copied_in_ns for times in lanes),
        max(times.forward_ns for times in lanes),
        max(times.pooled_ns for times in lanes),
        max(times.copied_out_ns for times in lanes),
    )


def _recorded() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
