"""Turns the crank between the pure scheduler and the worker thread.

Decides only *when* to ask the scheduler: after each event, and at the instant that it names itself. Must never know a
policy, a transport or what is in a batch. It polls nothing: with no request there is no timer and no work.

Late binding: a batch is closed when the device can take it, not before. One batch runs; the next is closed when the
running one is predicted to end within ``prepare_ahead_ns``, so that the hand-over costs the device nothing and late
arrivals still ride along.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedserve.engine.observer import BatchRecord, EngineObserver, Member
from embedserve.engine.pending import Pending
from embedserve.engine.stages import Ride
from embedserve.engine.worker import Part, Pass, PassResult
from embedserve.scheduling.item import (
    Admitted,
    Batch,
    Failed,
    Fatal,
    Outcome,
    OutOfMemory,
    Rejection,
    Settled,
    Shape,
    Succeeded,
)
from embedserve.scheduling.scheduler import Scheduler

__all__ = ["Driver"]

SWEEP_S = 1.0
"""How often running requests are looked at for deadlines that have passed, while there are any. Queued ones are dropped
on time by the scheduler; this is for a device that hangs, and a timer for each request would cost 4 us of the loop."""


class _Flight(NamedTuple):
    """A batch that the worker has."""

    batch: Batch
    riders: tuple[Pending, ...]
    dispatched_ns: int
    predicted_ns: int


class Driver:
    """The only caller of the scheduler. Lives on the event loop; no method blocks."""

    def __init__(
        self,
        scheduler: Scheduler,
        submit_pass: Callable[[Pass], None],
        observer: EngineObserver,
        *,
        batches_in_flight: int,
        prepare_ahead_ns: int,
        on_fatal: Callable[[str], None],
    ) -> None:
        """``on_fatal`` is called once, with a sentence, when nothing more will run."""
        self._scheduler = scheduler
        self._submit_pass = submit_pass
        self._observer = observer
        self._batches_in_flight = batches_in_flight
        self._prepare_ahead_ns = prepare_ahead_ns
        self._on_fatal = on_fatal
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, Pending] = {}
        self._flights: dict[int, _Flight] = {}
        self._device_free_ns = 0
        self._pump_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._sweep: asyncio.TimerHandle | None = None
        self._fatal: str | None = None
        self._changed = asyncio.Event()

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and not self._flights

    def submit(self, pending: Pending) -> Rejection | None:
        """Let the submission join its buckets, or say why not."""
        now = time.monotonic_ns()
        stages = pending.call.stages
        # Only a span shows what was waiting, and counting it by bucket costs 3 us.
        depth = self._scheduler.depth if pending.call.trace is not None else None
        answer = self._scheduler.submit(pending.submission, now)
        if isinstance(answer, Rejection):
            return answer
        assert isinstance(answer, Admitted)
        pending.queued_ns = now
        stages.queued_ns = now
        stages.predicted_ns = answer.predicted_wait_ns
        if depth is not None:
            stages.waiting_items = depth.waiting_items
            stages.waiting_tokens = depth.waiting_tokens
        self._waiting[pending.submission.id] = pending
        self._observer.admitted(len(pending.lengths), len(pending.ids))
        if self._sweep is None:
            self._sweep = self._loop.call_later(SWEEP_S, self._sweep_overdue)
        self._pump_soon()
        return None

    def cancel(self, pending: Pending) -> None:
        """The caller has gone: queued items leave at once, running ones are dropped when they come back."""
        if self._waiting.pop(pending.submission.id, None) is None:
            return
        self._scheduler.cancel(pending.submission.id, time.monotonic_ns())
        self._observer.settled("cancelled", pending.remaining)
        self._pump_soon()
        self.notify()

    def _sweep_overdue(self) -> None:
        """Tell those whose time is up that it is, whatever the device does with their texts."""
        now = time.monotonic_ns()
        for pending in list(self._waiting.values()):
            deadline = pending.call.deadline_ns
            if deadline is not None and now >= deadline and pending.expire():
                self.cancel(pending)
        self._sweep = self._loop.call_later(SWEEP_S, self._sweep_overdue) if self._waiting else None

    async def change(self) -> None:
        """Wait until something has left the queue or the device."""
        await self._changed.wait()

    def take_result(self, result: PassResult) -> None:
        """The worker is done with a pass."""
        now = time.monotonic_ns()
        flight = self._flights.pop(result.batch_id)
        settlement = self._scheduler.complete(result.batch_id, result.outcome, now)
        # What was predicted when the next pass was prepared is out of date: the pass before it has ended just now.
        self._device_free_ns = now + sum(other.predicted_ns for other in self._flights.values())
        if settlement.fatal is None and self._scheduler.waiting_items:
            self._pump()  # first the next pass, then the answers: the device must not wait for us
        if any(rider.call.trace is not None for rider in flight.riders):
            trace = self._observer.batch_finished(self._record(flight, result, now))
        else:
            # No answer needs the batch's trace, so the answers go first: this runs after the tasks that wait for them.
            trace = None
            self._loop.call_soon(self._tell, flight, result, now)
        self._settle(settlement.settled, flight, result, trace, now)
        if settlement.fatal is not None:
            self.fail(settlement.fatal)
        self.notify()

    def _tell(self, flight: _Flight, result: PassResult, now: int) -> None:
        self._observer.batch_finished(self._record(flight, result, now))

    def fail(self, why: str) -> None:
        """Nothing more will run: everybody who waits is told, once."""
        if self._fatal is not None:
            return
        self._fatal = why
        now = time.monotonic_ns()
        self._scheduler.drain()
        self._settle(self._scheduler.fail(why), None, None, None, now)
        self._flights.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._sweep is not None:
            self._sweep.cancel()
        self._on_fatal(why)
        self.notify()

    def notify(self) -> None:
        """Wake whoever waits for a change."""
        self._changed.set()
        self._changed.clear()

    def _pump_soon(self) -> None:
        """Once an iteration of the loop: everything that has arrived by then joins the same decision."""
        if not self._pump_due and self._fatal is None:
            self._pump_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        if self._fatal is not None:
            return
        now = time.monotonic_ns()
        expired = self._scheduler.expire(now)
        if expired:
            self._settle(expired, None, None, None, now)
            self.notify()
        early = False
        while len(self._flights) < self._batches_in_flight:
            early = bool(self._flights) and now < self._device_free_ns - self._prepare_ahead_ns
            if early:
                break
            batch = self._scheduler.next_batch(now)
            if batch is None:
                break
            self._dispatch(batch, now)
        self._arm(now, early=early)

    def _dispatch(self, batch: Batch, now: int) -> None:
        riders = tuple(self._waiting[piece.submission_id] for piece in batch.slices)
        predicted = self._scheduler.cost.predict_ns(batch.padded_tokens)
        self._flights[batch.id] = _Flight(batch, riders, now, predicted)
        self._device_free_ns = max(now, self._device_free_ns) + predicted
        parts = [
            Part(rider.ids, rider.offsets, piece.indexes, rider.normalize_on_device, rider.skip)
            for rider, piece in zip(riders, batch.slices, strict=True)
        ]
        pad_to = batch.edge if batch.shape is Shape.BUCKETED else None
        self._submit_pass(Pass(batch.id, parts, batch.rows, pad_to))

    def _arm(self, now: int, *, early: bool) -> None:
        """Sleep until the scheduler's answer may change by time alone, or it is no longer too ``early`` to ask.

        A timer that is set earlier is kept: it re-arms when it fires, which is cheaper than moving it each time.
        """
        wake = self._scheduler.wake_at(now)
        if early and self._scheduler.waiting_items:
            ready = self._device_free_ns - self._prepare_ahead_ns
            wake = ready if wake is None else min(wake, ready)
        if wake is None:
            return
        if self._timer is not None:
            if self._timer_ns <= wake:
                return
            self._timer.cancel()
        self._timer_ns = wake
        self._timer = self._loop.call_later(max(0, wake - now) / 1e9, self._fired)

    def _fired(self) -> None:
        self._timer = None
        self._pump()

    def _settle(
        self,
        settlement: Iterable[Settled],
        flight: _Flight | None,
        result: PassResult | None,
        trace: object | None,
        now: int,
    ) -> None:
        counts: dict[str, int] = {}
        for settled in settlement:
            counts[settled.verdict.value] = counts.get(settled.verdict.value, 0) + len(settled.indexes)
            pending = self._waiting.get(settled.submission_id)
            if pending is None:
                continue
            useless = False
            if settled.rows:
                assert flight is not None
                assert result is not None
                assert result.vectors is not None
                self._deliver(pending, settled, flight, result, result.vectors, trace, now)
            else:
                useless = pending.fail(settled)
            if pending.remaining == 0:
                del self._waiting[settled.submission_id]
            elif useless:
                self.cancel(pending)
        for verdict, items in counts.items():
            self._observer.settled(verdict, items)

    def _deliver(
        self,
        pending: Pending,
        settled: Settled,
        flight: _Flight,
        result: PassResult,
        vectors: npt.NDArray[np.float32],
        trace: object | None,
        now: int,
    ) -> None:
        times, batch, stages = result.times, flight.batch, pending.call.stages
        assert times is not None
        # The worker may have taken the pass up before the loop had stamped this request as queued by its own clock
        # reading.
        stages.dequeued_ns = max(times.start_ns, stages.queued_ns)
        stages.assembled_ns = max(times.assembled_ns, stages.dequeued_ns)
        stages.computed_ns = now
        ride = Ride(batch.id, batch.rows, batch.edge, len(settled.rows), stages.dequeued_ns, now, trace)
        pending.deliver(settled, vectors, ride)

    def _record(self, flight: _Flight, result: PassResult, now: int) -> BatchRecord:
        batch = flight.batch
        members = [
            Member(
                trace=rider.call.trace,
                first_index=piece.indexes[0],
                rows=len(piece.indexes),
                tokens=sum([rider.lengths[i] for i in piece.indexes]) if rider.call.trace is not None else 0,
                queued_ns=rider.queued_ns,
            )
            for rider, piece in zip(flight.riders, batch.slices, strict=True)
        ]
        return BatchRecord(
            batch=batch,
            members=members,
            outcome=_outcome_name(result.outcome),
            dispatched_ns=flight.dispatched_ns,
            times=result.times,
            returned_ns=now,
            predicted_ns=flight.predicted_ns,
            error=result.error,
        )


def _outcome_name(outcome: Outcome) -> str:
    match outcome:
        case Succeeded(non_finite=bad):
            return "non_finite" if bad else "ok"
        case OutOfMemory():
            return "out_of_memory"
        case Failed():
            return "failed"
        case Fatal():
            return "fatal"
