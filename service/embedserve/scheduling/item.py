"""The nouns of the scheduler: what goes in, what runs, what comes out.

Decides nothing. Must never know tokens' values, texts, tensors, clocks or callers: an item is a number of tokens with
an arrival, a deadline and a flow. All times are integer nanoseconds of one monotonic clock that the caller reads; no
code in ``scheduling`` reads a clock itself. What is made for each request or batch is a named tuple: half the price of
a frozen dataclass, and immutable too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from types import MappingProxyType
from typing import NamedTuple

__all__ = [
    "Admitted",
    "Batch",
    "Depth",
    "Failed",
    "Fatal",
    "OutOfMemory",
    "Outcome",
    "Priority",
    "Rejection",
    "Settled",
    "Settlement",
    "Shape",
    "Skipped",
    "Slice",
    "Submission",
    "Succeeded",
    "Verdict",
]


class Priority(IntEnum):
    """Strict classes; a lower number goes first, and the lowest class keeps a minimum share."""

    INTERACTIVE = 0
    DEFAULT = 1
    BULK = 2


class Shape(Enum):
    """How a batch is laid out for the forward pass."""

    BUCKETED = "bucketed"
    """Rows padded to one bucket edge."""
    PACKED = "packed"
    """Tokens of all rows laid end to end, no padding."""


class Submission(NamedTuple):
    """Items that are submitted together: one unary request, or one window of a stream."""

    id: int
    """Unique among all submissions of this process."""
    flow: int
    """Who shares with whom: the request. Windows of one stream have one flow."""
    tokens: Sequence[int]
    """Length of item ``i`` in tokens, special tokens included; each at least 1."""
    arrived_ns: int
    deadline_ns: int | None = None
    """No item starts after this; ``None`` means that the caller set none."""
    priority: Priority = Priority.DEFAULT
    tenant: str = ""
    continuation: bool = False
    """A later window of an admitted stream: only hard limits judge it, no policy."""
    whole_tokens: int = 0
    """About how many tokens the request has that this is a part of; 0: this is all of it."""
    probe: bool = False
    """The engine's own, to see whether all is well: judged as a continuation is, and no policy learns from its wait."""


class Admitted(NamedTuple):
    """All items of the submission are waiting."""

    predicted_wait_ns: int
    """Expected time until the last item is done, at admission."""


class Rejection(NamedTuple):
    """None of the items was taken."""

    policy: str
    """``queue``, ``deadline``, ``throughput``, ``latency_p95``, ``gradient``, ``draining`` or ``too_large``."""
    reason: str
    """Stable SCREAMING_SNAKE word, such as ``DRAIN_TIME_EXCEEDED``."""
    retry_after_ms: int | None
    """When it is worth trying again, before jitter; ``None`` means never."""
    figures: Mapping[str, float] = MappingProxyType({})
    """The numbers that decided, for traces and logs."""


class Slice(NamedTuple):
    """Some items of one submission, by their indexes, ascending."""

    submission_id: int
    indexes: tuple[int, ...]


class Batch(NamedTuple):
    """One forward pass. Row ``r`` of its result is the ``r``-th index of ``slices``, read in order."""

    id: int
    slices: tuple[Slice, ...]
    shape: Shape
    edge: int
    """Bucket edge that rows are padded to when bucketed; the longest row when packed."""
    rows: int
    tokens: int
    """Useful tokens."""
    padded_tokens: int
    """Tokens that are computed: ``rows * edge`` when bucketed, ``tokens`` when packed."""
    oldest_ns: int
    """Arrival of the oldest item in it."""
    attempt: int = 0
    """0 for first runs; how many passes its items have been through otherwise."""


class Succeeded(NamedTuple):
    """The pass ended; rows in ``non_finite`` hold NaN or infinity."""

    elapsed_ns: int
    """Device time of the pass: never hand-over, never idle, never time that an earlier pass had too."""
    non_finite: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """The device had no memory for it; nothing was computed."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The pass raised something that an item may have caused."""


@dataclass(frozen=True, slots=True)
class Fatal:
    """The worker, device or an invariant is gone; nothing more will run."""

    why: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """The device never began with it: every submission in it was cancelled or past its deadline by then."""


Outcome = Succeeded | OutOfMemory | Failed | Skipped | Fatal


class Verdict(Enum):
    """How an item ended. Each item gets exactly one."""

    DONE = "done"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    ITEM_ERROR = "item_error"
    NON_FINITE = "non_finite"
    OUT_OF_MEMORY = "out_of_memory"
    ENGINE_FAILED = "engine_failed"


class Settled(NamedTuple):
    """Items of one submission that ended alike."""

    submission_id: int
    indexes: tuple[int, ...]
    verdict: Verdict
    rows: tuple[int, ...] = ()
    """With DONE: the row of the batch's result for each index; empty otherwise."""


class Settlement(NamedTuple):
    """What ``complete`` decided: who is settled, how many items wait again, whether the process must end."""

    settled: tuple[Settled, ...]
    requeued: int = 0
    fatal: str | None = None


class Depth(NamedTuple):
    """What is waiting and running now."""

    waiting_items: int
    waiting_tokens: int
    running_items: int
    running_tokens: int
    oldest_arrived_ns: int | None
    waiting_by_bucket: Mapping[int, int]
    """Bucket edge to waiting items, all edges present."""
