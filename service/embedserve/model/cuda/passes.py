"""Packed passes, one behind another on the device and one ahead on the host.

Decides what a pass goes through, and what may overlap. Three streams: a batch is copied in beside the pass before it,
its pass follows that one, and its vectors are copied out beside the next. Each caller waits for its own vectors only,
in its own thread. Must never know where a batch came from, nor an event loop.

Threads launch in turn (``_launching``), into one stream: what graphs share, their memory and the buffers that they read
and write, is then used by one pass at a time. A CUDA graph belongs to no thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from embedserve.model.backend import BatchResult, GraphReport, PassTimes, TokenBatch
from embedserve.model.compiled import least_cosine
from embedserve.model.cuda.accelerator import Accelerator, Mark, Recording
from embedserve.model.cuda.graphs import Captured, GraphSet
from embedserve.model.cuda.inputs import InputLayout
from embedserve.model.cuda.ladder import GraphKey, Ladder
from embedserve.model.cuda.program import Program
from embedserve.model.cuda.settings import GraphSettings
from embedserve.model.cuda.slot import Slot
from embedserve.model.layout import Packed, packed
from embedserve.model.warm_up import known_batch

__all__ = ["PASSES_AT_ONCE", "PackedPasses"]

PASSES_AT_ONCE: Final = 2
"""One that runs and one that is laid out and copied in; a third would only wait longer."""
CAPTURE_PAUSE_S: Final = 0.05
"""Between captures beside a server that serves: each holds passes up for as long as it takes, so they are spread."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Places:
    """The filler's token, and how this architecture counts positions."""

    filler_id: int
    filler_position: int
    offset_pad_id: int | None


class PackedPasses:
    """The packed passes of one model on one accelerator. ``embed`` is safe from several threads."""

    def __init__(
        self,
        program: Program,
        accelerator: Accelerator,
        *,
        skips: bool,
        dimension: int,
        length_max: int,
        pad_id: int,
        offset_pad_id: int | None,
        vocab_size: int,
        cosine_min: float,
        graphs: GraphSettings,
    ) -> None:
        """Nothing is captured before ``prepare``; passes run without graphs until then.

        ``skips`` says whether graphs look for tokens that pooling leaves out, which costs a walk over all token
        vectors. A batch that has some runs without a graph otherwise. ``cosine_min`` is how alike to a pass without it
        the vectors of a graph must be that is captured beside serving.
        """
        self._skips = skips
        self._program = program
        self._accelerator = accelerator
        self._dimension = dimension
        self._length_max = length_max
        self._vocab_size = vocab_size
        self._cosine_min = cosine_min
        self._places = _Places(pad_id, 0 if offset_pad_id is None else offset_pad_id, offset_pad_id)
        self._settings = graphs
        self._copies_in, self._passes, self._copies_out = (accelerator.stream() for _ in range(3))
        self._launching = threading.Lock()
        self._slots: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for _ in range(PASSES_AT_ONCE):
            self._slots.put(Slot(accelerator, dimension))
        self._static = Slot(accelerator, dimension)
        """What graphs read and write."""
        self._graphs: GraphSet | None = None
        self._closing = threading.Event()

    def prepare(self, tokens_max: int) -> None:
        """Make room for batches of ``tokens_max`` tokens, and capture what is to be captured before serving."""
        settings = self._settings
        largest = InputLayout(tokens_max, settings.rows_max)
        for slot in [self._slots.get() for _ in range(PASSES_AT_ONCE)]:
            slot.reserve(largest.size, settings.rows_max)
            self._slots.put(slot)
        if not settings.enabled:
            return
        ladder = Ladder(
            tokens_max=min(tokens_max, settings.tokens_max or tokens_max),
            length_max=self._length_max,
            rows_max=settings.rows_max,
            growth=settings.growth,
            tiles_max=self._program.tiles_length_max,
        )
        top = InputLayout(ladder.tokens[-1], ladder.rows[-1])
        self._static.reserve(top.size, top.rows)
        graphs = GraphSet(ladder, self._accelerator, self._passes, self._work_of)
        self._graphs = graphs
        if settings.before_ready:
            while not graphs.complete:
                with self._launching:
                    made = graphs.capture_next()
                if made is not None:
                    graphs.use(*made)  # the warm-up compares them before the first text
        else:
            threading.Thread(
                target=self._capture_beside, args=(graphs,), name="embedserve-capture", daemon=True
            ).start()

    def close(self) -> None:
        """Capture nothing more."""
        self._closing.set()

    def report(self) -> GraphReport:
        """What graphs there are."""
        return GraphReport() if self._graphs is None else self._graphs.report()

    def alone(self, work: Callable[[], _T]) -> _T:
        """Do ``work`` in this thread when the device has nothing else of ours: what sets the model's state."""
        with self._launching:
            self._passes.mark().wait()
            return work()

    def embed(self, batch: TokenBatch, lengths: npt.NDArray[np.int64], start_ns: int) -> BatchResult:
        """One pass over checked rows of ``lengths``, which began at ``start_ns``."""
        layout = packed(batch, lengths, self._places.offset_pad_id)
        with self._slot() as slot:
            return self._embed(batch, layout, slot, start_ns, self._found(batch, layout))

    def _found(self, batch: TokenBatch, layout: Packed) -> Captured | None:
        """The graph that serves a batch."""
        if self._graphs is None:
            return None
        if self._skips or batch.skip is None:
            return self._graphs.find(layout.ids.size, int(layout.lengths[0]), layout.lengths.size)
        self._graphs.miss()
        return None

    def _embed(
        self, batch: TokenBatch, layout: Packed, slot: Slot, start_ns: int, found: Captured | None
    ) -> BatchResult:
        """One pass, by the graph that was ``found``."""
        tokens, rows, longest = layout.ids.size, layout.lengths.size, int(layout.lengths[0])
        shape = InputLayout(tokens, rows) if found is None else InputLayout(found[0].tokens, found[0].rows)
        slot.reserve(shape.size, rows)
        shape.write(
            slot.written(),
            layout,
            normalize=batch.normalize,
            skip=batch.skip,
            filler_id=self._places.filler_id,
            filler_position=self._places.filler_position,
        )
        assembled_ns = time.monotonic_ns()
        self._copies_in.run(
            lambda: _copy(slot.device_inputs[: shape.size], slot.host_inputs[: shape.size])  # beside the pass before
        )
        copied_in = self._copies_in.mark()
        with self._launching:
            self._passes.follow(copied_in)
            if found is None:
                inputs = shape.views(slot.device_inputs, skips=batch.skip is not None)
                self._passes.run(lambda: self._program.run(inputs, longest, slot.device_vectors))
            else:
                self._passes.run(self._replayed(slot, shape, rows, found[1]))
            computed = self._passes.mark()
            # In the same turn: a mark between another pass's work and its own mark would take that pass's failure.
            self._copies_out.follow(computed)
            self._copies_out.run(lambda: _copy(slot.host_vectors[:rows], slot.device_vectors[:rows]))
            done = self._copies_out.mark()
        done.wait()
        times = _times(start_ns, assembled_ns, copied_in, computed, done)
        vectors = np.empty((rows, self._dimension), np.float32)
        vectors[layout.order] = slot.host_vectors[:rows].numpy()
        return BatchResult(vectors, times)

    def _replayed(self, slot: Slot, shape: InputLayout, rows: int, recording: Recording) -> Callable[[], None]:
        def work() -> None:
            _copy(self._static.device_inputs[: shape.size], slot.device_inputs[: shape.size])
            recording.replay()
            _copy(slot.device_vectors[:rows], self._static.device_vectors[:rows])

        return work

    def _work_of(self, key: GraphKey) -> Callable[[], None]:
        buffer = self._static.device_inputs
        inputs = InputLayout(key.tokens, key.rows).views(buffer, skips=self._skips)
        # A pass without rows. What a batch of another key left there would be read as ids that no embedding has.
        self._passes.run(lambda: _clear(buffer))
        return lambda: self._program.run(inputs, key.length, self._static.device_vectors)

    @contextmanager
    def _slot(self) -> Iterator[Slot]:
        slot = self._slots.get()
        try:
            yield slot
        except BaseException:
            self._quiet()
            raise
        finally:
            self._slots.put(slot)

    def _quiet(self) -> None:
        """Wait until no copy of a pass that failed half-way is under way; what else fails then adds nothing."""
        for stream in (self._copies_in, self._passes, self._copies_out):
            try:
                stream.mark().wait()
            except RuntimeError:
                continue

    def _capture_beside(self, graphs: GraphSet) -> None:
        while not graphs.complete and not self._closing.wait(CAPTURE_PAUSE_S):
            with self._launching:
                made = graphs.capture_next()
            if made is None:
                continue
            why = self._difference(made)
            if why:
                graphs.refuse(made[0], why)
            else:
                graphs.use(*made)

    def _difference(self, made: Captured) -> str:
        """Why a graph that was captured beside serving must not be used: nobody has compared it before. Or nothing."""
        lengths = made[0].example()
        batch = known_batch(lengths, self._vocab_size)
        layout = packed(batch, np.asarray(lengths, np.int64), self._places.offset_pad_id)
        try:
            with torch.inference_mode():
                vectors = []
                for found in (None, made):
                    with self._slot() as slot:
                        vectors.append(self._embed(batch, layout, slot, time.monotonic_ns(), found).vectors)
        except RuntimeError as error:  # of a device that is lost the next pass tells, too, and there it is fatal
            return f"{type(error).__name__}: {error}"
        cosine = least_cosine(*vectors)
        return "" if cosine >= self._cosine_min else f"it gives other vectors than a pass without it ({cosine:.6f})"


def _clear(buffer: torch.Tensor) -> None:
    buffer.zero_()


def _copy(to: torch.Tensor, what: torch.Tensor) -> None:
    to.copy_(what, non_blocking=True)


def _times(start_ns: int, assembled_ns: int, copied_in: Mark, computed: Mark, done: Mark) -> PassTimes:
    """Host times of the device's marks, counted back from the last one, which has just come.

    Pooling is in the graph with the rest: it has no time of its own.
    """
    end_ns = time.monotonic_ns()
    copied_in_ns = min(max(end_ns - copied_in.ns_until(done), assembled_ns), end_ns)
    computed_ns = min(max(end_ns - computed.ns_until(done), copied_in_ns), end_ns)
    return PassTimes(start_ns, assembled_ns, copied_in_ns, computed_ns, computed_ns, end_ns)
