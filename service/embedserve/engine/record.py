"""A pass as observers see it.

Decides what is told of a pass and what an outcome is called. Must never know who watches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from embedserve.engine.observer import BatchRecord, EngineObserver, Member
from embedserve.engine.pending import Pending
from embedserve.engine.stages import Boarding
from embedserve.engine.worker import PassResult, Riders
from embedserve.scheduling.item import Batch, Failed, Fatal, Outcome, OutOfMemory, Skipped, Succeeded

__all__ = ["Flight", "batch_record", "board"]


class Flight(NamedTuple):
    """A batch that the worker has."""

    batch: Batch
    riders: tuple[Pending, ...]
    dispatched_ns: int
    predicted_ns: int
    wanted: Riders
    trace: object | None
    """What the observer calls the batch; ``None`` where no rider is sampled."""

    @property
    def probe(self) -> bool:
        """Whether no caller rides in it."""
        return len(self.riders) == 1 and self.riders[0].probe


def board(batch: Batch, riders: Sequence[Pending], observer: EngineObserver, now: int) -> object | None:
    """Note in each sampled rider's marks that it is in ``batch``; the batch's handle, ``None`` if none is sampled."""
    sampled = [
        (rider, piece) for rider, piece in zip(riders, batch.slices, strict=True) if rider.call.trace is not None
    ]
    trace = observer.batch_dispatched(batch.id) if sampled else None
    if trace is not None:
        for rider, piece in sampled:
            rider.call.stages.boardings.append(Boarding(batch.id, batch.rows, len(piece.indexes), now, trace))
    return trace


def batch_record(flight: Flight, result: PassResult, now: int) -> BatchRecord:
    """What is told of a pass that came back at ``now``."""
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
        trace=flight.trace,
        shared_ns=result.shared_ns,
    )


def _outcome_name(outcome: Outcome) -> str:
    match outcome:
        case Succeeded(non_finite=bad):
            return "non_finite" if bad else "ok"
        case OutOfMemory():
            return "out_of_memory"
        case Failed():
            return "failed"
        case Skipped():
            return "skipped"
        case Fatal():
            return "fatal"
