"""What telemetry is told: every switch and limit of traces, metrics and logs.

Decides defaults and their reasons. Must never know where a value came from (file, flag, environment): the one exception
are OpenTelemetry's own ``OTEL_*`` variables, which ``setup`` and ``exporters`` read because operators expect them to
work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["DURATION_BUCKETS_S", "LogFormat", "LogRequests", "TelemetrySettings"]

LogFormat = Literal["auto", "json", "console"]
LogRequests = Literal["off", "errors", "sampled", "all"]

DURATION_BUCKETS_S: tuple[float, ...] = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
"""The bounds that the RPC conventions advise, with 1 ms and 2.5 ms added: a short text is answered in 1 to 10 ms."""


@dataclass(frozen=True, slots=True)
class TelemetrySettings:
    """Everything that telemetry can be told. ``OTEL_*`` variables win where both speak."""

    service_name: str = "embedserve"
    """``service.name``; ``OTEL_SERVICE_NAME`` wins."""
    service_version: str = ""
    service_instance_id: str = ""
    """Empty: a random UUID for each process."""
    resource_attributes: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """More of who this is, on every signal: model, revision, digest, device."""

    prometheus_enabled: bool = True
    exemplars: bool = True
    """Whether histogram buckets remember the last sampled trace that fell into them."""
    duration_buckets_s: tuple[float, ...] = DURATION_BUCKETS_S
    """Bounds of every histogram of seconds."""
    bucket_edges: tuple[int, ...] = ()
    """Length buckets of the scheduler, so that their series are there, at zero, from the first scrape."""
    has_device: bool = True
    """Whether this process has the queue and the device; one that has not shows no gauges of them."""

    trace_sample_ratio: float = 0.01
    """Share of the traces begun here that are kept; ``OTEL_TRACES_SAMPLER`` wins. A caller's decision is honoured."""
    force_trace: bool = False
    """Whether a caller may ask for a trace of a call with ``x-force-trace: 1``."""
    span_links_max: int = 1024
    """Links on a batch's span; the SDK's own default of 128 keeps the last 128 and drops the rest silently."""
    flush_timeout_ms: int = 5000
    """What the last export may cost at shutdown, whatever the collector does."""

    log_level: str = "info"
    log_levels: Mapping[str, str] = field(default_factory=dict)
    """Levels of single loggers and all below them, as in ``{"grpc": "warning"}``."""
    log_format: LogFormat = "auto"
    """``auto``: console on a terminal, JSON otherwise."""
    log_requests: LogRequests = "errors"
    """Which calls get a line; ``sampled`` means every error and ``log_requests_ratio`` of the rest."""
    log_requests_ratio: float = 0.01
