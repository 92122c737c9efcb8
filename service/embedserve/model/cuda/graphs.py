"""The graphs that there are, and what they cost and brought.

Decides the order of capture, when it stops, and what is counted. Must never know what is captured.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from embedserve.model.backend import GraphReport
from embedserve.model.cuda.accelerator import Accelerator, CannotCapture, Recording, Stream
from embedserve.model.cuda.ladder import GraphKey, Ladder

__all__ = ["Captured", "GraphSet"]

Captured = tuple[GraphKey, Recording]
"""A graph, and what it is for."""


class GraphSet:
    """Recordings by key. ``find`` may be called beside ``capture_next``; each of them by one thread at a time."""

    def __init__(
        self,
        ladder: Ladder,
        accelerator: Accelerator,
        stream: Stream,
        work_of: Callable[[GraphKey], Callable[[], None]],
    ) -> None:
        """``work_of`` readies buffers that stay, in ``stream``, and gives the work of a key on them."""
        self._ladder = ladder
        self._accelerator = accelerator
        self._stream = stream
        self._work_of = work_of
        self._missing = list(reversed(ladder.keys()))
        self._planned = len(self._missing)
        self._recordings: dict[GraphKey, Recording] = {}
        self._counting = threading.Lock()
        self._hits = self._misses = self._memory_bytes = self._elapsed_ns = 0
        self._failure = ""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to capture, or it has been given up."""
        return not self._missing

    def find(self, tokens: int, longest: int, rows: int) -> Captured | None:
        """The graph for a batch, or ``None`` where it must run without; counted as a hit or a miss."""
        key = self._ladder.key_for(tokens, longest, rows)
        recording = None if key is None else self._recordings.get(key)
        if key is None or recording is None:
            self.miss()
            return None
        with self._counting:
            self._hits += 1
        return key, recording

    def miss(self) -> None:
        """Count a pass that runs without, whatever its shape."""
        with self._counting:
            self._misses += 1

    def capture_next(self) -> Captured | None:
        """Capture the largest that is missing, while no pass is launched; no batch finds it before ``use``.

        Where one cannot be captured, or no memory is left, the others are given up: what there is stays in use.
        """
        if not self._missing:
            return None
        key = self._missing.pop()
        begun, used = time.monotonic_ns(), self._accelerator.memory_used()
        made: list[Recording] = []
        work = self._work_of(key)
        try:
            self._stream.run(lambda: made.append(self._accelerator.capture(work)))
            self._stream.mark().wait()
        except (CannotCapture, RuntimeError) as error:
            # Of a device that is lost the next pass tells, too, and there it is fatal.
            self._give_up(key, f"{type(error).__name__}: {error}")
            made.clear()
        self._elapsed_ns += time.monotonic_ns() - begun
        self._memory_bytes += max(self._accelerator.memory_used() - used, 0)
        return (key, made[0]) if made else None

    def use(self, key: GraphKey, recording: Recording) -> None:
        """Let batches find it."""
        self._recordings[key] = recording

    def refuse(self, key: GraphKey, why: str) -> None:
        """It must not be used, nor is another captured: what made this one wrong may make them so."""
        self._give_up(key, why)

    def report(self) -> GraphReport:
        """What there is, what it cost and how often it was of use."""
        return GraphReport(
            planned=self._planned,
            captured=len(self._recordings),
            capture_s=self._elapsed_ns / 1e9,
            memory_bytes=self._memory_bytes,
            hits=self._hits,
            misses=self._misses,
            failure=self._failure,
        )

    def _give_up(self, key: GraphKey, why: str) -> None:
        self._failure = (
            f"no graph for {key.tokens} tokens of {key.rows} rows of up to {key.length}, nor for the "
            f"{len(self._missing)} shapes after it: {why}"
        )
        self._missing.clear()
