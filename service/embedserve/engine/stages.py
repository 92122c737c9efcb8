"""When each stage of one request began and ended.

Decides which borders there are. Must never know spans, metrics or protobuf: those are built from these marks
afterwards. All marks are ``time.monotonic_ns``; a mark that was never reached is 0. Borders are shared (one stage ends
where the next begins), so that stages always add up to the total.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Boarding", "Ride", "Stages"]


class Boarding(NamedTuple):
    """That some items of a sampled request were handed to the worker in one batch, whatever became of it."""

    batch_id: int
    batch_rows: int
    """Rows of the whole batch, other requests' included."""
    rows: int
    """Rows of this request."""
    dispatched_ns: int
    trace: object
    """What ``EngineObserver.batch_dispatched`` gave for it: lets the request's spans link to the batch's."""


@dataclass(slots=True)
class Ride:
    """That a batch had the vectors of some items of a request."""

    batch_id: int
    batch_rows: int
    """Rows of the whole batch, other requests' included."""
    batch_edge: int
    rows: int
    """Rows of this request."""
    dequeued_ns: int
    finished_ns: int


@dataclass(slots=True)
class Stages:
    """The life of one request, as marks on the monotonic clock, in the order in which they are set."""

    arrived_ns: int
    """The guard interceptor saw the call."""
    validated_ns: int = 0
    """Options and limits are checked."""
    admitted_ns: int = 0
    """Early admission, on an estimate, has said yes."""
    tokenized_ns: int = 0
    """Token ids are here; includes the wait for a tokenizer thread."""
    queued_ns: int = 0
    """Exact admission has said yes and the items wait in their buckets."""
    dequeued_ns: int = 0
    """The worker took up the last batch with an item of this request."""
    assembled_ns: int = 0
    """That batch's tokens are gathered."""
    computed_ns: int = 0
    """That batch's vectors are back on the event loop."""
    responded_ns: int = 0
    """The response is built."""
    texts: int = 0
    tokens: int = 0
    bucket: int = 0
    """Bucket edge of the longest item."""
    waiting_items: int = 0
    """Items waiting when a sampled request was admitted; not counted for the others."""
    waiting_tokens: int = 0
    predicted_ns: int = 0
    """What admission predicted for queue and pass together."""
    rides: list[Ride] = field(default_factory=list)
    boardings: list[Boarding] = field(default_factory=list)
    """Of a sampled request, whose batches are traced; empty otherwise."""
