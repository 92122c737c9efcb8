"""Turns the crank between the pure scheduler and the worker thread.

Decides only *when* to ask the scheduler: after each event, and at the instant that it names itself. Must never know a
policy, a transport or what is in a batch. It polls nothing: with no request there is no timer and no work.

Late binding: a batch is closed when the device can take it, not before. One batch runs; the next is closed when the
running one is predicted to end within ``prepare_ahead_ns``, so that the hand-over costs the device nothing and late
arrivals still ride along. Behind a pass so long that the hand-over is nothing beside it, none is closed early at all.

A device that the scheduler suspects is tried with the pass of a text that is known to be good. It alone tells a device
that is broken from callers who send nothing but poison.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from embedserve.engine.observer import EngineObserver
from embedserve.engine.pending import Pending
from embedserve.engine.record import Flight, batch_record, board
from embedserve.engine.stages import Ride
from embedserve.engine.wall import sentence, walled
from embedserve.engine.worker import Part, Pass, PassResult, Riders
from embedserve.errors import EngineFailed, InvariantBroken
from embedserve.scheduling.item import Admitted, Batch, Rejection, Settled, Shape, Succeeded
from embedserve.scheduling.scheduler import Scheduler

__all__ = ["Driver", "PassWatch"]

LATE_BINDING_SHARE: Final = 0.02
"""Of a pass: where the hand-over takes less than this, the device may wait for it and nothing is decided early."""
TRIAL_ID: Final = 0
"""The batch id of a pass that tries a suspect device; the scheduler's begin at 1."""


class PassWatch(Protocol):
    """Is told when the device begins and ends a pass: ``engine/watchdog.py``."""

    def begun(self, now_ns: int, predicted_ns: int) -> None:
        """The device has turned to a pass."""

    def ended(self, now_ns: int) -> None:
        """A pass has ended, well or not."""

    def stop(self) -> None:
        """No more passes."""


class Driver:
    """The only caller of the scheduler. Lives on the event loop; no method blocks."""

    def __init__(
        self,
        scheduler: Scheduler,
        submit_pass: Callable[[Pass], None],
        observer: EngineObserver,
        watch: PassWatch,
        *,
        batches_in_flight: int,
        prepare_ahead_ns: Callable[[int], int],
        judge_probe: Callable[[npt.NDArray[np.float32]], str | None],
        on_fatal: Callable[[str], None],
    ) -> None:
        """``prepare_ahead_ns`` says how long before the end of a pass of so many nanoseconds the next one is closed.

        ``judge_probe`` says what is wrong with the vector of the known text.

        ``on_fatal`` is called once, with a sentence, when nothing more will run, before anybody who waits is told.
        """
        self._scheduler = scheduler
        self._submit_pass = submit_pass
        self._observer = observer
        self._watch = watch
        self._batches_in_flight = batches_in_flight
        self._prepare_ahead_ns = prepare_ahead_ns
        self._judge_probe = judge_probe
        self._on_fatal = on_fatal
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, Pending] = {}
        self._flights: dict[int, Flight] = {}
        self._known_good: Pass | None = None
        self._on_trial = False
        self._device_free_ns = 0
        self._pump_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._changed = asyncio.Event()
        self._pump_walled = walled(self._pump, self.broken)
        self._fired_walled = walled(self._fired, self.broken)
        self._tell_walled = walled(self._tell, self.broken)
        self.failure: str | None = None
        """Why nothing more will run."""
        self.streams: set[Callable[[], None]] = set()
        """Called when nothing more will run: a stream may be waiting for its reader or a tokenizer, not for a batch."""
        self.last_good_ns = 0
        """When a pass last gave a vector."""

    @property
    def idle(self) -> bool:
        """No caller's item waits or runs."""
        return all(pending.probe for pending in self._waiting.values()) and all(
            flight.probe for flight in self._flights.values()
        )

    def submit(self, pending: Pending) -> Rejection | None:
        """Let the submission join its buckets, or say why not."""
        now = time.monotonic_ns()
        stages = pending.call.stages
        # Only a span shows what was waiting.
        waiting = self._scheduler.waiting if pending.call.trace is not None else None
        try:
            answer = self._scheduler.submit(pending.submission, now)
        except AssertionError as broken:
            self.broken(broken)
            raise InvariantBroken(sentence(broken)) from broken
        if isinstance(answer, Rejection):
            return answer
        assert isinstance(answer, Admitted)
        pending.queued_ns = now
        stages.queued_ns = now
        stages.predicted_ns = answer.predicted_wait_ns
        if waiting is not None:
            stages.waiting_items, stages.waiting_tokens = waiting
        self._waiting[pending.submission.id] = pending
        if not pending.probe:
            self._observer.admitted(len(pending.lengths), len(pending.ids))
        self._pump_soon()
        return None

    def cancel(self, pending: Pending) -> None:
        """The caller has gone: queued items leave at once, running ones are dropped when they come back.

        A pass that nobody else rides in and that the device has not begun with is not run.
        """
        if self._waiting.pop(pending.submission.id, None) is None:
            return
        for flight in self._flights.values():
            if pending in flight.riders:
                flight.wanted.left -= 1
        try:
            self._scheduler.cancel(pending.submission.id, time.monotonic_ns())
        except AssertionError as broken:
            self.broken(broken)
        if not pending.probe:
            self._observer.settled("cancelled", pending.remaining)
        self._pump_soon()
        self.notify()

    async def change(self) -> None:
        """Wait until something has left the queue or the device."""
        await self._changed.wait()

    def take_result(self, result: PassResult) -> None:
        """The worker is done with a pass."""
        if self.failure is not None:
            return
        now = time.monotonic_ns()
        if result.batch_id == TRIAL_ID:
            self._watch.ended(now)
            self._end_trial(result, now)
            return
        # Where two passes are at work, one that overtakes the other says nothing of the other's health.
        oldest = next(iter(self._flights)) == result.batch_id
        flight = self._flights.pop(result.batch_id)
        if oldest:
            self._watch.ended(now)
            for first in self._flights.values():
                self._watch.begun(now, first.predicted_ns)
                break
        outcome = result.outcome
        if isinstance(outcome, Succeeded) and len(outcome.non_finite) < flight.batch.rows:
            self.last_good_ns = now
        settlement = self._scheduler.complete(result.batch_id, outcome, now)
        # What was predicted when the next pass was prepared is out of date: the pass before it has ended just now.
        self._device_free_ns = now + sum(other.predicted_ns for other in self._flights.values())
        if settlement.fatal is None and self._scheduler.waiting[0]:
            self._pump()  # first the next pass, then the answers: the device must not wait for us
        if not flight.probe:  # told after the tasks that wait for the answers have run
            self._loop.call_soon(self._tell_walled, flight, result, now)
        if settlement.fatal is not None:
            self.fail(settlement.fatal, settlement.settled)
        else:
            self._settle(settlement.settled, flight, result, now)
        self.notify()

    def fail(self, why: str, settled: Iterable[Settled] | None = None) -> None:
        """Nothing more will run: everybody who waits is told, once. ``settled`` is what the scheduler has given up."""
        if self.failure is not None:
            return
        self.failure = why
        self._on_fatal(why)
        self._watch.stop()
        if self._timer is not None:
            self._timer.cancel()
        for pending in self._waiting.values():
            pending.abort(EngineFailed(why))
        for tell in tuple(self.streams):
            tell()
        self.notify()
        self._count(self._give_up(why) if settled is None else settled)
        self._waiting.clear()
        self._flights.clear()

    def broken(self, error: Exception) -> None:
        """A promise of our own code does not hold: whatever it was, nobody may be left waiting."""
        self.fail(f"broken invariant: {sentence(error)}")

    def notify(self) -> None:
        """Wake whoever waits for a change."""
        self._changed.set()
        self._changed.clear()

    # ------------------------------------------------------------------------------------------------------ the crank

    def _pump_soon(self) -> None:
        """Once an iteration of the loop: everything that has arrived by then joins the same decision."""
        if not self._pump_due and self.failure is None:
            self._pump_due = True
            self._loop.call_soon(self._pump_walled)

    def _pump(self) -> None:
        self._pump_due = False
        if self.failure is not None:
            return
        now = time.monotonic_ns()
        expired = self._scheduler.expire(now)
        if expired:
            self._settle(expired, None, None, now)
            self.notify()
        for submission_id in self._scheduler.overdue():
            overdue = self._waiting.get(submission_id)
            if overdue is not None and overdue.expire():
                self.cancel(overdue)
        if self._scheduler.suspect is not None:
            self._begin_trial(now)
        early = False
        while len(self._flights) < self._batches_in_flight:
            if self._flights:
                if self._running_is_long():
                    break
                early = now < self._device_free_ns - self._ahead_ns()
                if early:
                    break
            batch = self._scheduler.next_batch(now)
            if batch is None:
                break
            self._dispatch(batch, now)
        self._arm(now, early=early)

    def _running_is_long(self) -> bool:
        """Whether what the device has takes so long that a pass prepared beside it would gain next to nothing.

        The prediction may be short by half of a pass, and whoever comes after the next one was closed waits for both.
        """
        return self._predicted_ns() * LATE_BINDING_SHARE > self._ahead_ns()

    def _ahead_ns(self) -> int:
        """How long before the end of what the device has the next pass is closed."""
        return self._prepare_ahead_ns(self._predicted_ns())

    def _predicted_ns(self) -> int:
        return sum([flight.predicted_ns for flight in self._flights.values()])

    def _dispatch(self, batch: Batch, now: int) -> None:
        riders = tuple([self._waiting[piece.submission_id] for piece in batch.slices])
        predicted = self._scheduler.cost.predict_ns(batch.padded_tokens)
        deadlines = [rider.call.deadline_ns for rider in riders]
        wanted = Riders(len(riders), None if None in deadlines else max(deadlines))  # type: ignore[type-var]
        if not self._flights:
            self._watch.begun(now, predicted)
        trace = board(batch, riders, self._observer, now)
        self._flights[batch.id] = Flight(batch, riders, now, predicted, wanted, trace)
        self._device_free_ns = max(now, self._device_free_ns) + predicted
        parts = [
            Part(rider.ids, rider.offsets, piece.indexes, rider.normalize_on_device, rider.skip)
            for rider, piece in zip(riders, batch.slices, strict=True)
        ]
        pad_to = batch.edge if batch.shape is Shape.BUCKETED else None
        if self._known_good is None and riders[0].probe and batch.rows == 1:
            self._known_good = Pass(TRIAL_ID, parts, 1, pad_to)
        self._submit_pass(Pass(batch.id, parts, batch.rows, pad_to, wanted))

    def _arm(self, now: int, *, early: bool) -> None:
        """Sleep until the scheduler's answer may change by time alone, or it is no longer too ``early`` to ask.

        A timer that is set earlier is kept: it re-arms when it fires, which is cheaper than moving it each time. That
        one timer also tells those whose deadline comes while the device is at work on their texts.
        """
        wake = self._scheduler.wake_at(now)
        if early and self._scheduler.waiting[0]:
            ready = self._device_free_ns - self._ahead_ns()
            wake = ready if wake is None else min(wake, ready)
        if wake is None:
            return
        if self._timer is not None:
            if self._timer_ns <= wake:
                return
            self._timer.cancel()
        self._timer_ns = wake
        self._timer = self._loop.call_later(max(0, wake - now) / 1e9, self._fired_walled)

    def _fired(self) -> None:
        self._timer = None
        self._pump()

    # ------------------------------------------------------------------------------------------------ a suspect device

    def _begin_trial(self, now: int) -> None:
        """Run the known text alone, once what the device has is back."""
        if self._flights or self._on_trial:
            return
        assert self._known_good is not None, "the device is suspect before it was found to be good"
        self._on_trial = True
        self._watch.begun(now, 0)
        self._submit_pass(self._known_good)

    def _end_trial(self, result: PassResult, now: int) -> None:
        self._on_trial = False
        wrong: str | None = f"it ended as {type(result.outcome).__name__}: {result.error}"
        if isinstance(result.outcome, Succeeded):
            assert result.vectors is not None
            wrong = self._judge_probe(result.vectors[0])
        if wrong is not None:
            self.fail(f"{self._scheduler.suspect}, and so did a text that is known to be good: {wrong}")
            return
        self.last_good_ns = now
        self._scheduler.acquit(now)
        self._pump()

    # -------------------------------------------------------------------------------------------------------- settling

    def _settle(
        self,
        settlement: Iterable[Settled],
        flight: Flight | None,
        result: PassResult | None,
        now: int,
    ) -> None:
        counted = []
        for settled in settlement:
            pending = self._waiting.get(settled.submission_id)
            if pending is None:
                # It has left, and its items were counted then: between a pass's end and this its deadline may have come
                # for those that still waited.
                continue
            if not pending.probe:
                counted.append(settled)
            useless = False
            if settled.rows:
                assert flight is not None
                assert result is not None
                assert result.vectors is not None
                self._deliver(pending, settled, flight, result, result.vectors, now)
            else:
                useless = pending.fail(settled)
            if pending.remaining == 0:
                del self._waiting[settled.submission_id]
            elif useless:
                self.cancel(pending)
        self._count(counted)

    def _count(self, settlement: Iterable[Settled]) -> None:
        counts: dict[str, int] = {}
        for settled in settlement:
            counts[settled.verdict.value] = counts.get(settled.verdict.value, 0) + len(settled.indexes)
        for verdict, items in counts.items():
            self._observer.settled(verdict, items)

    def _deliver(
        self,
        pending: Pending,
        settled: Settled,
        flight: Flight,
        result: PassResult,
        vectors: npt.NDArray[np.float32],
        now: int,
    ) -> None:
        times, batch, stages = result.times, flight.batch, pending.call.stages
        assert times is not None
        # The worker may have taken the pass up before the loop had stamped this request as queued by its own clock
        # reading.
        stages.dequeued_ns = max(times.start_ns, stages.queued_ns)
        stages.assembled_ns = max(times.assembled_ns, stages.dequeued_ns)
        stages.computed_ns = now
        ride = Ride(batch.id, batch.rows, batch.edge, len(settled.rows), stages.dequeued_ns, now)
        pending.deliver(settled, vectors, ride)

    def _give_up(self, why: str) -> Iterable[Settled]:
        """What the scheduler loses; nothing where it is the scheduler that broke, since all callers were told."""
        self._scheduler.drain()
        try:
            return self._scheduler.fail(why)
        except Exception:  # noqa: BLE001 - the process ends with the first failure's reason; this one only miscounts
            return ()

    def _tell(self, flight: Flight, result: PassResult, now: int) -> None:
        self._observer.batch_finished(batch_record(flight, result, now))
