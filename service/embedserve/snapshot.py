"""The facts that `/statusz` shows: plain values, taken at one moment.

Decides which facts there are and in which unit. Must never know where they come from or how they are shown: telemetry
keeps the recent ones, ``statusz.py`` puts all of them together, ``http/statusz`` renders them. Durations are seconds,
instants are seconds since 1970 (UTC), shares lie between 0 and 1. No fact holds a text or a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "Admission",
    "Batches",
    "Bucket",
    "Change",
    "Device",
    "Ended",
    "EngineFacts",
    "Figure",
    "Latency",
    "Model",
    "Policy",
    "Process",
    "Refusal",
    "Requests",
    "Resource",
    "Sizes",
    "Snapshot",
    "Stage",
    "Tokenizer",
    "Traffic",
]

History = tuple[float | None, ...]
"""Values of equal stretches of time, oldest first; ``None`` before the process began. ``Snapshot.step_s`` each."""


@dataclass(frozen=True, slots=True)
class Change:
    """A step of the lifecycle."""

    state: str
    at_s: float


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """One of several engines."""

    name: str
    device: str | None
    state: str
    """As ``/health`` has it; ``silent`` or ``lost`` where it gets nothing."""
    held_tokens: int
    """That wait or run."""
    tokens_per_s: float
    """That it does when it is busy."""
    drain_s: float
    shown: bool
    """Whether batches, queue and device of the snapshot are its."""


@dataclass(frozen=True, slots=True)
class Process:
    """Who answers, and where it is in its life."""

    state: str
    """A ``lifecycle.State`` value."""
    since_s: float
    started_s: float
    uptime_s: float
    version: str
    pid: int
    host: str
    addresses: tuple[str, ...]
    """Where gRPC listens."""
    changes: tuple[Change, ...]
    """The latest steps of the lifecycle, oldest first."""
    front_ends: tuple[str, ...] = ()
    """Processes whose calls are shown; none where calls come to this one."""
    silent: tuple[str, ...] = ()
    """Those that did not answer in time, so that their calls are missing here."""
    engines: tuple[EngineFacts, ...] = ()
    """Each engine, where there are several."""


@dataclass(frozen=True, slots=True)
class Model:
    """What is served. ``None`` where it is not known before the model is loaded."""

    name: str
    revision: str
    weights_digest: str
    tokenizer_digest: str | None
    architecture: str | None
    pooling: str | None
    dimension: int | None
    max_input_length: int
    dtype: str | None
    device: str | None
    compiled: bool | None


@dataclass(frozen=True, slots=True)
class Resource:
    """Something that can be the bottleneck."""

    name: str
    """``device``, ``tokenizer`` or ``event loop``."""
    busy: float
    """Share of the time at work, over the last ``Snapshot.now_s``."""
    history: History
    full_since_s: float | None
    """Since when it has hardly had a pause; ``None`` while it has."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Embedding calls that ended, a second, over the last ``Snapshot.now_s``, and since the start."""

    calls_per_s: float
    texts_per_s: float
    tokens_per_s: float
    """Useful tokens of passes."""
    refused_per_s: float
    failed_per_s: float
    mistaken_per_s: float
    """Calls that ended by their caller's doing: wrong, or cancelled."""
    last_mistake: str | None
    """The status of the last one."""
    calls: History
    tokens: History
    refused: History
    failed: History
    mistaken: History
    by_status: Mapping[str, int]
    """Calls since the start by gRPC status."""
    in_flight: int
    """Calls that are here now."""
    failing_since_s: float | None


@dataclass(frozen=True, slots=True)
class Latency:
    """Quantiles of durations; ``None`` without one."""

    count: int
    """How many the quantiles are taken of: a sample where there were more."""
    p50_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of unary calls."""

    name: str
    latency: Latency


@dataclass(frozen=True, slots=True)
class Bucket:
    """What waits of one length, and what calls of that length have met."""

    edge: int
    """Longest text in it, tokens."""
    items: int
    tokens: int
    oldest_s: float
    wait: Latency
    """In the queue, calls whose longest text is of this bucket."""
    total: Latency


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many passes had from ``low`` to ``high`` texts."""

    low: int
    high: int
    passes: int


@dataclass(frozen=True, slots=True)
class Batches:
    """The latest passes."""

    passes: int
    """That the figures are taken of."""
    over_s: float
    """Since the oldest of them."""
    per_s: float
    """Over the last ``Snapshot.now_s``."""
    rows: float | None
    """Texts in one, on average."""
    tokens: float | None
    efficiency: float | None
    """Useful tokens over computed ones."""
    duration: Latency
    sizes: tuple[Sizes, ...]
    max_items: int
    max_tokens: int
    outcomes: Mapping[str, int]
    """Since the start."""
    fixed_s: float
    """The cost model's price of a pass."""
    per_token_s: float
    """The cost model's price of a computed token."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that a policy decides by."""

    name: str
    value: float
    unit: str
    """``s``, ``tokens``, ``items``, ``calls``, ``share`` or ``ratio``."""
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """One rule of admission."""

    name: str
    refuses: str | None
    """Why it would refuse one short text that came now; ``None`` where it would not."""
    figures: tuple[Figure, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """What was refused for one reason."""

    policy: str
    reason: str
    recent: int
    """In the last ``Snapshot.recent_s``."""
    total: int
    """Since the start."""
    since_s: float | None
    """Since when it goes on; ``None`` where the last one was a while ago."""
    last_s: float
    last_trace_id: str | None


@dataclass(frozen=True, slots=True)
class Admission:
    """Who would be taken, and who was not."""

    accepting: bool
    state: str
    """As ``/health`` has it."""
    share: float
    """Of the calls of the last ``Snapshot.now_s``, those that were refused."""
    since_s: float | None
    """Since when calls are refused; ``None`` where none is."""
    policies: tuple[Policy, ...]
    refusals: tuple[Refusal, ...]
    """The most frequent of the last ``Snapshot.recent_s`` first."""


@dataclass(frozen=True, slots=True)
class Device:
    """Whether the device answers."""

    pass_age_s: float | None
    """Of the running pass; ``None`` while none runs."""
    last_pass_s: float | None
    """When the last pass ended; ``None`` before the first."""
    stalled: bool
    stalls: int
    last_stall_s: float | None
    stall_limit_s: float
    canary: str | None
    """What came of the last known text that was sent to a quiet device; ``None`` while there was no need."""
    canary_s: float | None
    suspect: str | None
    memory_used_bytes: int
    memory_total_bytes: int
    retry_items: int


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The pool of threads."""

    threads: int
    pending: int
    max_pending: int
    wait: Latency
    """For a thread, pieces of work."""
    pieces_per_s: float
    """Pieces of work, those on the event loop among them."""


@dataclass(frozen=True, slots=True)
class Ended:
    """One call that is over."""

    at_s: float
    method: str
    status: str
    reason: str | None
    policy: str | None
    tenant: str | None
    texts: int | None
    tokens: int | None
    duration_s: float
    longest_stage: str | None
    longest_s: float | None
    trace_id: str | None
    process: str = ""
    """Which front end took it; empty where there is one process."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Calls worth a look, each list bounded."""

    slow: tuple[Ended, ...]
    """Of the last ``Snapshot.recent_s``, the slowest first: the slowest of all, and the slowest that were traced."""
    refused: tuple[Ended, ...]
    """The latest first."""
    failed: tuple[Ended, ...]
    """The latest first."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything, at ``at_s``."""

    at_s: float
    now_s: float
    """What "now" means for rates and shares."""
    window_s: float
    """What latencies are taken of."""
    recent_s: float
    """What "recent" means for refusals and slow calls, and how far back histories go."""
    step_s: float
    process: Process
    model: Model
    resources: tuple[Resource, ...]
    traffic: Traffic
    buckets: tuple[Bucket, ...]
    running_items: int
    running_tokens: int
    max_queue_items: int
    max_queue_tokens: int
    drain_s: float
    latency: Latency
    """Whole unary calls."""
    stages: tuple[Stage, ...]
    batches: Batches
    admission: Admission
    device: Device
    tokenizer: Tokenizer
    requests: Requests = field(default_factory=lambda: Requests((), (), ()))
