"""Every limit of the scheduler core, by name and unit, with a default and its reason.

Decides nothing but whether the limits fit together. Must never know where they come from: ``config.py`` of the
application owns what a user may set and fills these in; the defaults here serve tests and simulations.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from embedserve.scheduling.item import Shape

__all__ = ["GradientSettings", "LatencyP95Settings", "SchedulerSettings", "ThroughputSettings"]

MS = 1_000_000
S = 1_000_000_000


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise ValueError(sentence)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """Limits and constants of one ``Scheduler``. Raises ``ValueError`` with a sentence if they do not fit together."""

    shape: Shape = Shape.PACKED
    """No padding: 80-100 % useful work against 15-51 % in buckets."""
    bucket_edges: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    """Powers of two: at most half of a row is padding. The last edge is the longest item that is taken."""
    max_batch_tokens: int = 16_384
    """Computed tokens of one pass; the default of text-embeddings-inference."""
    max_batch_items: int = 512
    """Rows of one pass: bounds the time to assemble and to send one batch."""
    max_batch_ns: int = 60 * S
    """Predicted time of one pass: it cannot be interrupted, and what arrives meanwhile waits for its end. Here no limit
    to speak of, so that tests count tokens; the application's default is a tenth of a second."""
    batch_sizes: tuple[int, ...] = ()
    """Row counts the device has captured shapes for (bucketed only); empty where any count runs alike, as on a CPU."""
    max_queue_items: int = 65_536
    """Items admitted and not settled; six jobs of 10,000 texts."""
    max_queue_tokens: int = 8_388_608
    """Tokens admitted and not settled: 32 MiB of token ids at 4 bytes each."""
    max_queue_delay_ns: int = 0
    """Hold to fill a batch. 0: no hold wins at any load when one device runs one model."""
    max_wait_ns: int = 500 * MS
    """After this an entitled bucket goes before full ones: half of the second that an interactive caller bears."""
    lowest_class_share: float = 0.05
    """Tokens that a lower class gets while a higher one could use them all: slow, but it moves."""
    max_tenants: int = 1_024
    """Tenants told apart at one time; further ones share one place, so that made-up names cost no memory."""
    quantum_divisor: int = 4
    """A flow's turn is ``max_batch_tokens / quantum_divisor``: four flows meet in one full batch."""

    failures_alike_max: int = 16
    """Passes in a row that fail alike before it is the device; one bad item among 512 causes 3 in a row, 8 cause 15."""
    retry_share: float = 0.25
    """Device time that passes of failed batches may take while others wait: three quarters for those others."""
    quarantine_ns: int = 10 * S
    """A tenant whose item was poison rides alone for so long, so that the next one hurts nobody else."""
    oom_cut: float = 0.5
    """What is left of ``max_batch_tokens`` after an out-of-memory: multiplicative decrease."""
    oom_rise_tokens: int = 32
    """Tokens that come back with each good pass: 256 passes from half of the default back to all."""

    initial_batch_ns: int = 2 * MS
    """First guess of a pass's fixed cost: between a GPU launch (0.3 ms) and a small CPU pass (4.5 ms)."""
    initial_token_ns: int = 10_000
    """First guess of a token's cost: 100k tokens/s, between a CPU and a GPU. The first pass corrects both."""
    cost_memory: float = 0.95
    """Weight that a pass keeps after each later one: the last 20 passes count."""
    sojourn_window_ns: int = 10 * S
    """Window of the P95 that is reported: long enough for 20 samples at 2 requests/s."""
    wait_quantile: float = 0.95
    """Which quantile of actual over predicted wait ``theta`` follows."""
    wait_quantile_step: float = 0.02
    """Relative step of ``theta``: one outlier moves it by 2 %."""
    pass_overrun_ratio: float = 2.25
    """A pass may take so many times its prediction and no admitted request misses its deadline."""
    probe_after_ns: int = 1 * S
    """An idle estimate older than this may be wrong: one request is let in to renew it."""

    def __post_init__(self) -> None:
        edges = self.bucket_edges
        _require(bool(edges) and edges[0] >= 1, "bucket_edges needs at least one edge, each at least 1")
        _require(all(low < high for low, high in pairwise(edges)), "bucket_edges must ascend")
        _require(
            self.max_batch_tokens >= edges[-1],
            f"max_batch_tokens ({self.max_batch_tokens}) is less than the last bucket edge ({edges[-1]})",
        )
        _require(self.max_batch_items >= 1 and self.max_batch_ns > 0, "max_batch_items and max_batch_ns start at 1")
        _require(self.max_queue_items >= 1, "max_queue_items must be at least 1")
        _require(self.max_queue_tokens >= edges[-1], "max_queue_tokens is less than the last bucket edge")
        _require(all(n >= 1 for n in self.batch_sizes), "batch_sizes must be at least 1 each")
        _require(all(low < high for low, high in pairwise(self.batch_sizes)), "batch_sizes must ascend")
        _require(self.max_queue_delay_ns >= 0 and self.max_wait_ns >= 0, "waits must not be negative")
        _require(0 < self.lowest_class_share < 0.5, "lowest_class_share must lie between 0 and 0.5")
        _require(self.max_tenants >= 1 and self.quantum_divisor >= 1, "max_tenants and quantum_divisor start at 1")
        _require(self.failures_alike_max >= 1, "failures_alike_max must be at least 1")
        _require(0 < self.retry_share < 1, "retry_share must lie between 0 and 1")
        _require(self.quarantine_ns >= 0, "quarantine_ns must not be negative")
        _require(0 < self.oom_cut < 1 and self.oom_rise_tokens >= 1, "oom_cut lies in (0, 1), oom_rise_tokens from 1")
        _require(self.initial_batch_ns >= 0 and self.initial_token_ns > 0, "initial cost must be positive")
        _require(0 < self.cost_memory < 1, "cost_memory must lie between 0 and 1")
        _require(self.sojourn_window_ns > 0 and self.probe_after_ns > 0, "windows must be positive")
        _require(0 < self.wait_quantile < 1 and 0 < self.wait_quantile_step < 1, "wait_quantile lies between 0 and 1")

    def turn_tokens(self, batch_tokens: int) -> int:
        """Tokens of one turn of a flow in batches of so many; at least the longest item, as fair queueing needs."""
        return max(batch_tokens // self.quantum_divisor, self.bucket_edges[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputSettings:
    """Limits of the ``throughput`` policy."""

    max_drain_ns: int = 5 * S
    """Longest time to work off all that is admitted: half of a usual 10 s deadline."""
    resume_fraction: float = 0.8
    """A refused caller is told to come back when the drain time is down to this part of the limit."""

    def __post_init__(self) -> None:
        _require(self.max_drain_ns > 0, "max_drain_ns must be positive")
        _require(0 < self.resume_fraction <= 1, "resume_fraction must lie in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyP95Settings:
    """Limits of the ``latency_p95`` policy. Needs ``soft < hard``."""

    slo_ns: int = 1 * S
    """The P95 that is promised; theta x predicted wait must stay under it."""
    soft_ns: int = 800 * MS
    """Shedding starts when the measured P95 passes this: 0.8 of the SLO."""
    hard_ns: int = 1 * S
    """Shedding reaches ``max_shed`` here: the SLO itself."""
    release_fraction: float = 0.8
    """Shedding ends below this part of soft, so that it does not flip at one value."""
    max_shed: float = 0.9
    """Some are let in even above hard: without samples nobody would see the recovery."""
    window_ns: int = 5 * S
    """Forgets a burst in 5 s; holds 20 samples from 4 requests/s on."""
    min_samples: int = 20
    """The fewest from which a 0.95 quantile is more than the maximum."""
    seed: int = 17
    """Of the coin that sheds: the same events give the same decisions."""

    def __post_init__(self) -> None:
        _require(0 < self.soft_ns < self.hard_ns, "needs 0 < soft_ns < hard_ns")
        _require(0 < self.release_fraction < 1, "release_fraction must lie between 0 and 1")
        _require(self.slo_ns > 0 and self.window_ns > 0, "slo_ns and window_ns must be positive")
        _require(0 < self.max_shed < 1, "max_shed must lie between 0 and 1: at 1 nobody would see the recovery")
        _require(self.min_samples >= 1, "min_samples must be at least 1")

    @property
    def release_ns(self) -> int:
        """Where shedding ends."""
        return int(self.soft_ns * self.release_fraction)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSettings:
    """Constants of the ``gradient`` policy; those of Gradient2 where nothing else is said."""

    max_batch_tokens: int = 16_384
    """The scheduler's: the unit of the limits."""
    max_batch_items: int = 512
    """The scheduler's: an item is this part of a pass at least."""
    tolerance: float = 1.3
    """Signal from which the limit shrinks; Gradient2 has 1.5, for a signal that is noisier."""
    batching_ratio: float = 1.6
    """Wait over the time of one's own pass when nothing queues in vain: 1.1 at 2 % load, 1.6 at 95 %, simulated."""
    smoothing: float = 0.2
    """Weight of a pass: five passes forget half and more."""
    gradient_min: float = 0.5
    """The most that one pass may shrink the limit, before smoothing."""
    headroom_batches: float = 0.5
    """What is added each time, so that the limit finds out what else is possible."""
    min_batches: float = 2.0
    """One that runs and one that waits: less would leave the device without work."""
    max_batches: float = 64.0
    """Half of what may wait by default."""

    def __post_init__(self) -> None:
        _require(self.max_batch_tokens >= 1, "max_batch_tokens must be at least 1")
        _require(self.max_batch_items >= 1, "max_batch_items must be at least 1")
        _require(self.tolerance >= 1 and self.batching_ratio > 0, "tolerance starts at 1, batching_ratio above 0")
        _require(0 < self.smoothing <= 1, "smoothing must lie in (0, 1]")
        _require(0 < self.gradient_min < 1, "gradient_min must lie between 0 and 1")
        _require(self.headroom_batches > 0, "headroom_batches must be positive")
        _require(1 <= self.min_batches <= self.max_batches, "needs 1 <= min_batches <= max_batches")

    @property
    def item_tokens(self) -> float:
        """What an item counts at least: its share of a pass that is full by items."""
        return self.max_batch_tokens / self.max_batch_items

    @property
    def headroom_tokens(self) -> float:
        """``headroom_batches`` in tokens."""
        return self.headroom_batches * self.max_batch_tokens

    @property
    def floor_tokens(self) -> float:
        """``min_batches`` in tokens."""
        return self.min_batches * self.max_batch_tokens

    @property
    def ceiling_tokens(self) -> float:
        """``max_batches`` in tokens."""
        return self.max_batches * self.max_batch_tokens
