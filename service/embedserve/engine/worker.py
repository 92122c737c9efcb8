"""The threads that own the device: one, or as many as the backend takes passes at once.

Decides nothing but the order: they take passes from a queue, run them, and report each exactly once. Must never know
requests, policies or the event loop's state: it knows a backend and a ``post`` function that is safe to call from any
thread. Whatever ends one of these threads, even ``SystemExit``, is reported; nothing dies silently (a plain thread that
dies tells nobody: waiters hang and the process exits with 0).

Two threads, each with a pass of its own, rather than one that begins and one that waits for ends: a text alone is then
never handed from thread to thread (50 us), and the backend needs no second form of a pass.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from embedserve.engine.device_time import DeviceTime
from embedserve.errors import InvariantBroken
from embedserve.model.backend import (
    Backend,
    BackendFactory,
    DeviceLost,
    DeviceOutOfMemory,
    DeviceReport,
    ModelIdentity,
    PassTimes,
    TokenBatch,
    WarmPass,
)
from embedserve.scheduling.item import Failed, Fatal, Outcome, OutOfMemory, Skipped, Succeeded

__all__ = ["Part", "Pass", "PassResult", "Riders", "Worker", "WorkerReady"]

REPORT_INTERVAL_NS: Final = 1_000_000_000
"""Between looks at the device's memory: some 20 us each, and nobody reads them more often."""

COMPILATION_LOOK_S: Final = 0.5
"""Between looks at a compilation while nothing runs; it takes some seconds, once."""


class Part(NamedTuple):
    """Some rows of a batch, all of one submission."""

    ids: npt.NDArray[np.int32]
    """Token ids of the whole submission, end to end."""
    offsets: npt.NDArray[np.int64]
    """Shape ``[items + 1]``."""
    indexes: tuple[int, ...]
    """Items that ride, ascending."""
    normalize: bool
    skip: int
    """Leading tokens that pooling leaves out."""


ONE_TEXT: Final = 2
"""Offsets of a submission that is one text."""


class Riders:
    """Who still wants a pass. The event loop writes, the worker reads once: each field is one atomic read."""

    __slots__ = ("last_deadline_ns", "left")

    def __init__(self, left: int, last_deadline_ns: int | None) -> None:
        """``last_deadline_ns`` is ``None`` where one of them has no deadline."""
        self.left = left
        """Submissions in it whose caller has not gone."""
        self.last_deadline_ns = last_deadline_ns

    def want(self, now_ns: int) -> bool:
        """Whether one of them is still there and in time."""
        return self.left > 0 and (self.last_deadline_ns is None or now_ns < self.last_deadline_ns)


class Pass(NamedTuple):
    """One batch on its way to the device."""

    batch_id: int
    parts: Sequence[Part]
    rows: int
    pad_to: int | None
    riders: Riders | None = None
    """Asked when the device takes it up. A pass that somebody wants runs whole: to leave out the rows of the others
    would cost a new plan of the batch, at the very moment in which the device waits."""


class PassResult(NamedTuple):
    """What became of a pass."""

    batch_id: int
    outcome: Outcome
    vectors: npt.NDArray[np.float32] | None
    times: PassTimes | None
    error: BaseException | None
    report: DeviceReport | None
    """The device after a pass that did not end well; ``None`` otherwise."""
    shared_ns: int = 0
    """As in ``BatchRecord``."""


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """The backend is loaded and warm."""

    identity: ModelIdentity
    report: DeviceReport
    warm_up_ns: int
    passes: tuple[WarmPass, ...]
    """What passes cost, from the smallest to the largest."""


def assemble(work: Pass) -> TokenBatch:
    """Gather a pass's token ids end to end; one copy a row run, none where the whole submission rides alone."""
    ids: list[npt.NDArray[np.int32]] = []
    # Lists until all are here: a numpy call for each of fifty short texts would cost more than their tokens.
    lengths: list[int] = []
    normalize: list[bool] = []
    skip: list[int] = []
    for part in work.parts:
        count = len(part.indexes)
        if part.offsets.size == ONE_TEXT:
            ids.append(part.ids)
            lengths.append(part.ids.size)
        else:
            first, last = part.indexes[0], part.indexes[-1]
            if last - first + 1 == count:
                ids.append(part.ids[part.offsets[first] : part.offsets[last + 1]])
                lengths += (part.offsets[first + 1 : last + 2] - part.offsets[first : last + 1]).tolist()
            else:
                chosen = np.asarray(part.indexes)
                ids.extend(part.ids[part.offsets[i] : part.offsets[i + 1]] for i in part.indexes)
                lengths += (part.offsets[chosen + 1] - part.offsets[chosen]).tolist()
        normalize += [part.normalize] * count
        skip += [part.skip] * count
    offsets = np.zeros(work.rows + 1, dtype=np.int32)
    np.add.accumulate(lengths, out=offsets[1:])
    return TokenBatch(
        ids=ids[0] if len(ids) == 1 else np.concatenate(ids),
        offsets=offsets,
        normalize=np.array(normalize, dtype=np.bool_),
        pad_to=work.pad_to,
        skip=np.array(skip, dtype=np.int32) if any(skip) else None,
    )


class Worker:
    """Owns the backend. ``start`` builds it in its thread, ``submit`` hands over passes, ``stop`` ends all threads."""

    def __init__(
        self,
        factory: BackendFactory,
        *,
        warm_up_tokens: int,
        on_ready: Callable[[WorkerReady | BaseException], None],
        on_result: Callable[[PassResult], None],
        on_death: Callable[[BaseException], None],
        on_compilation: Callable[[DeviceReport], None],
    ) -> None:
        """``on_compilation`` is told once how the compilation of the model went, if there was one.

        The callbacks are called from the worker's threads and must hand over to the event loop themselves.
        """
        self._factory = factory
        self._warm_up_tokens = warm_up_tokens
        self._on_ready = on_ready
        self._on_result = on_result
        self._on_death = on_death
        self._on_compilation = on_compilation
        self._compilation_told = False
        self.device: DeviceReport | None = None
        """The device as it was lately: looked at after a pass, once in ``REPORT_INTERVAL_NS``. Any thread may read."""
        self._looked_ns = 0
        self._passes: queue.SimpleQueue[Pass | None] = queue.SimpleQueue()
        self._device_time = DeviceTime()
        self._between_passes = threading.Lock()
        """Held by the one thread that calls the backend for something else than a pass, or counts one's time."""
        self._ended = False
        """A thread was the last: what still waits is not begun with."""
        self._threads = [threading.Thread(target=self._main, name="embedserve-worker", daemon=True)]

    def start(self) -> None:
        """Begin to load; ``on_ready`` gets the identity, or the error that stopped the start."""
        self._threads[0].start()

    @property
    def passes_at_once(self) -> int:
        """Passes that may be at work at once."""
        return len(self._threads)

    def submit(self, work: Pass) -> None:
        """Queue a pass. The scheduler bounds how many are in flight, so this queue needs no bound of its own."""
        self._passes.put(work)

    def stop(self, timeout_s: float) -> bool:
        """End after the passes that are queued; whether the threads ended in time."""
        self._passes.put(None)
        ends = time.monotonic() + timeout_s
        for thread in tuple(self._threads):
            thread.join(max(0.0, ends - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _main(self) -> None:
        ready = False
        try:
            begun = time.monotonic_ns()
            backend = self._factory()
            passes = tuple(backend.warm_up(self._warm_up_tokens))
            ready = True
            report = backend.report()
            self._on_ready(WorkerReady(backend.identity, report, time.monotonic_ns() - begun, passes))
            self._heed(backend, report)
            self._serve(backend, compiling=report.compiling)
        except BaseException as death:  # noqa: BLE001 - the outermost frame of the thread: its death must be loud
            if ready:
                self._on_death(death)
            else:
                self._on_ready(death)

    def _serve_beside(self, backend: Backend) -> None:
        try:
            self._serve(backend, compiling=False)
        except BaseException as death:  # noqa: BLE001 - as in ``_main``
            self._on_death(death)

    def _heed(self, backend: Backend, report: DeviceReport) -> None:
        """Tell how a compilation went, and let as many threads serve as the backend takes passes at once now."""
        self._tell_compilation(report)
        while len(self._threads) < backend.passes_at_once:
            name = f"embedserve-worker_{len(self._threads)}"
            another = threading.Thread(target=self._serve_beside, args=(backend,), name=name, daemon=True)
            another.start()
            self._threads.append(another)

    def _serve(self, backend: Backend, *, compiling: bool) -> None:
        """Run passes until there are no more. One thread looks for what became of ``compiling`` while all is idle."""
        try:
            while (work := self._next(backend, compiling=compiling)) is not None:
                result = self._run(backend, work)
                self._on_result(result)
                if isinstance(result.outcome, Fatal):
                    self._ended = True
                    break
                self._look_at_device(backend)
                # A result keeps a whole batch's vectors alive until the next pass otherwise.
                del result, work
        except BaseException:
            self._ended = True
            raise
        finally:
            self._passes.put(None)  # for the other threads

    def _look_at_device(self, backend: Backend) -> None:
        """After the result has gone, so that nobody waits for it."""
        now = time.monotonic_ns()
        if now - self._looked_ns < REPORT_INTERVAL_NS:
            return
        with self._between_passes:
            self._looked_ns = now
            self.device = report = backend.report()
            self._heed(backend, report)

    def _next(self, backend: Backend, *, compiling: bool) -> Pass | None:
        """The next pass. An idle server that compiles looks now and then how that went: somebody may wait for it."""
        while compiling and not self._compilation_told:
            try:
                return self._unless_ended(self._passes.get(timeout=COMPILATION_LOOK_S))
            except queue.Empty:
                with self._between_passes:
                    report = backend.report()
                    self._heed(backend, report)
                    compiling = report.compiling
        return self._unless_ended(self._passes.get())

    def _unless_ended(self, work: Pass | None) -> Pass | None:
        return None if self._ended else work

    def _tell_compilation(self, report: DeviceReport) -> None:
        if not self._compilation_told and (report.compiled or report.compile_failure):
            self._compilation_told = True
            self._on_compilation(report)

    def _run(self, backend: Backend, work: Pass) -> PassResult:
        picked_up = time.monotonic_ns()
        if work.riders is not None and not work.riders.want(picked_up):
            return PassResult(work.batch_id, Skipped(), None, None, None, None)
        error: Exception
        outcome: Outcome
        try:
            result = backend.embed(assemble(work))
        except DeviceOutOfMemory as caught:
            outcome, error = OutOfMemory(), caught
        except DeviceLost as caught:
            outcome, error = Fatal(f"device lost: {caught}"), caught
        except Exception as caught:  # noqa: BLE001 - the batch guard: an item may have caused it, bisection finds out
            outcome, error = Failed(), caught
        else:
            return self._checked(backend, work, result.vectors, result.times, picked_up)
        with self._between_passes:
            if isinstance(outcome, OutOfMemory):
                # Outside the except block: a live traceback keeps the tensors of the failed pass alive (pytorch#18853).
                error.__traceback__ = None
                backend.release_memory()
            report = None if isinstance(outcome, Fatal) else backend.report()
        return PassResult(work.batch_id, outcome, None, None, error, report)

    def _checked(
        self, backend: Backend, work: Pass, vectors: npt.NDArray[np.float32], times: PassTimes, picked_up: int
    ) -> PassResult:
        """Wrong shapes end the process: the rows cannot be told apart any more. Rows that are not finite are named."""
        expected = (work.rows, backend.identity.dimension)
        if vectors.shape != expected:
            why = f"the backend returned shape {vectors.shape} where {expected} was asked"
            return PassResult(work.batch_id, Fatal(why), None, None, InvariantBroken(why), None)
        bad: frozenset[int] = frozenset()
        # NaN and infinity survive a sum, which is cheaper than a boolean array. A sum that overflows finds no row.
        if not np.isfinite(vectors.sum()):
            bad = frozenset(np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist())
        stamped = PassTimes(
            start_ns=picked_up,
            assembled_ns=times.assembled_ns,
            copied_in_ns=times.copied_in_ns,
            forward_ns=times.forward_ns,
            pooled_ns=times.pooled_ns,
            copied_out_ns=times.copied_out_ns,
        )
        with self._between_passes:
            shared = self._device_time.shared_ns(times.start_ns, times.copied_out_ns)
        elapsed = times.copied_out_ns - times.start_ns - shared
        return PassResult(work.batch_id, Succeeded(elapsed, bad), vectors, stamped, None, None, shared)
