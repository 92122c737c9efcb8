"""A request's marks on their way back from the engine process.

Decides which marks are the engine's: those from the queue on, rides and boardings. The clock that they are read from
(CLOCK_MONOTONIC) is the same for all processes of a host. Must never know what is made of them.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, Protocol

from embedserve.engine.stages import Boarding, Ride, Stages

__all__ = ["NoTraces", "Traces", "pack_marks", "unpack_marks"]

TRACE_BYTES: Final = 25
"""Trace id, span id and flags, as in W3C's traceparent."""
_MARKS: Final = Struct("<6q4IqHH")
_RIDE: Final = Struct("<q3I2q")
_BOARDING: Final = Struct(f"<q2Iq{TRACE_BYTES}s")


class Traces(Protocol):
    """How the handles of traces cross."""

    def pack(self, trace: object) -> bytes:
        """``TRACE_BYTES`` bytes."""

    def unpack(self, packed: bytes) -> object:
        """What ``pack`` was given."""


class NoTraces:
    """Nobody traces."""

    def pack(self, trace: object) -> bytes:  # noqa: ARG002
        """Nothing to tell."""
        return bytes(TRACE_BYTES)

    def unpack(self, packed: bytes) -> object:
        """As it came."""
        return packed


def pack_marks(stages: Stages, traces: Traces) -> bytes:
    """The engine's part of ``stages``."""
    rides, boardings = stages.rides, stages.boardings
    head = _MARKS.pack(
        stages.tokenized_ns, stages.queued_ns, stages.dequeued_ns, stages.assembled_ns, stages.computed_ns,
        stages.predicted_ns, stages.tokens, stages.bucket, stages.waiting_items, stages.waiting_tokens,
        stages.admitted_ns, len(rides), len(boardings),
    )  # fmt: skip
    if len(rides) == 1 and not boardings:
        return head + _ride(rides[0])
    return b"".join(
        [
            head,
            *map(_ride, rides),
            *[
                _BOARDING.pack(b.batch_id, b.batch_rows, b.rows, b.dispatched_ns, traces.pack(b.trace))
                for b in boardings
            ],
        ]
    )


def _ride(ride: Ride) -> bytes:
    return _RIDE.pack(ride.batch_id, ride.batch_rows, ride.batch_edge, ride.rows, ride.dequeued_ns, ride.finished_ns)


def unpack_marks(body: bytes, stages: Stages, traces: Traces, *, streamed: bool = False) -> int:
    """Set the engine's part of ``stages``; the bytes that it took.

    A whole request was admitted and tokenised here before the engine saw it; those of a stream are the engine's.
    """
    (
        tokenized, stages.queued_ns, stages.dequeued_ns, stages.assembled_ns, stages.computed_ns, stages.predicted_ns,
        stages.tokens, stages.bucket, stages.waiting_items, stages.waiting_tokens, admitted, rides, boardings,
    ) = _MARKS.unpack_from(body)  # fmt: skip
    if streamed:
        stages.admitted_ns, stages.tokenized_ns = admitted, tokenized
    at = _MARKS.size
    for _ in range(rides):
        stages.rides.append(Ride(*_RIDE.unpack_from(body, at)))
        at += _RIDE.size
    for _ in range(boardings):
        batch_id, batch_rows, rows, dispatched_ns, trace = _BOARDING.unpack_from(body, at)
        stages.boardings.append(Boarding(batch_id, batch_rows, rows, dispatched_ns, traces.unpack(trace)))
        at += _BOARDING.size
    return at
