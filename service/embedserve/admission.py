"""The settings of admission: which policies may refuse a request, and every number that they decide by.

Decides what can be set. Must never know how a policy works; that is in ``scheduling/admission``. ``config.py`` is where
all settings are read from; this part of the tree has a file of its own because it is long.
"""

from __future__ import annotations

from typing import Annotated

from embedserve.kinds import HOUR_MS, Policies, Section, between

__all__ = ["Admission", "Gradient", "LatencyP95", "Throughput"]


class Throughput(Section):
    """Admission by the time that the work already here will take."""

    max_drain_ms: Annotated[int, between(1, HOUR_MS)] = 2000
    """Refuse what would make queued and running work take longer. Few callers of an embedding wait more."""
    resume_fraction: Annotated[float, between(0.01, 1)] = 0.8
    """Who is refused is told to come back when that time is down to this part. Room for those who come then."""


class LatencyP95(Section):
    """Admission by the 95th percentile of recent latency, timeouts included."""

    slo_ms: Annotated[int, between(1, HOUR_MS)] = 500
    """Refuse what is predicted to take longer. Half a second is where an answer stops feeling prompt."""
    soft_ms: Annotated[int, between(1, HOUR_MS)] = 250
    """P95 at which refusals begin, more of them towards hard_ms. Half of it: a ramp needs room."""
    hard_ms: Annotated[int, between(1, HOUR_MS)] = 500
    """P95 at which max_shed of the calls are refused. The objective itself."""
    release_fraction: Annotated[float, between(0.01, 0.99)] = 0.8
    """Refusals end when the P95 is below this part of soft_ms. A gap, so that nothing flips at one value."""
    max_shed: Annotated[float, between(0.01, 0.99)] = 0.9
    """The largest part that is refused for past latency. Without the tenth nobody would see the recovery."""
    window_ms: Annotated[int, between(100, HOUR_MS)] = 10_000
    """How far back latencies count. Long enough for min_samples at 2 calls/s, short enough to forget a burst."""
    min_samples: Annotated[int, between(1, 100_000)] = 20
    """Fewer latencies than this decide nothing: below 20, the P95 is just the largest."""


class Gradient(Section):
    """Admission by tokens in flight, with a limit that finds itself. The limits are in full batches."""

    tolerance: Annotated[float, between(1, 100)] = 1.3
    """Waits over this many times the usual shrink the limit. Lower than Gradient2's 1.5: the signal is steadier."""
    batching_ratio: Annotated[float, between(0.1, 100)] = 1.6
    """Usual wait, in passes of the call's own batch. Simulated: 1.1 at 2 % load, 1.6 at 95 %."""
    smoothing: Annotated[float, between(0.001, 1)] = 0.2
    """Weight of one pass in the limit. Gradient2's: five passes make two thirds of a change."""
    gradient_min: Annotated[float, between(0.01, 0.99)] = 0.5
    """The most that one pass may shrink the limit, before smoothing. Gradient2's."""
    headroom_batches: Annotated[float, between(0.01, 100)] = 0.5
    """What the limit grows by, before smoothing, while nothing waits in vain. Less finds the limit more slowly."""
    min_batches: Annotated[float, between(1, 10_000)] = 2.0
    """The limit's floor. One batch that runs and one that waits: less would starve the device."""
    max_batches: Annotated[float, between(1, 10_000)] = 64.0
    """The limit's ceiling. Half of what may wait by default."""


class Admission(Section):
    """Which policies may refuse a request; each one alone suffices."""

    policies: Policies = ("throughput",)
    """Policies in force. Drain time needs no tuning; limits and deadlines hold with none, too."""
    pass_overrun_ratio: Annotated[float, between(1, 100)] = 2.25
    """A pass may take so many times its prediction before an admitted call is late. 2.25 costs 3 % of load."""
    wait_quantile: Annotated[float, between(0.5, 0.999)] = 0.95
    """Quantile of actual over predicted wait that predictions are corrected by. The one that objectives name."""
    wait_quantile_step: Annotated[float, between(0.0001, 0.5)] = 0.02
    """How far one call moves that correction. 2 %: an outlier hardly shows, a hundred calls do."""
    probe_after_ms: Annotated[int, between(1, HOUR_MS)] = 1000
    """An idle server whose last pass is older lets one call in that it would refuse. A wrong estimate ends so."""
    throughput: Throughput = Throughput()
    latency_p95: LatencyP95 = LatencyP95()
    gradient: Gradient = Gradient()
