"""From settings to parts: how each section of the configuration becomes what a part takes.

Decides nothing that a setting does not say, but for the settings that mean "chosen for the machine or the model". Must
never start anything: ``app.py`` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from embedserve import __version__
from embedserve.api.embedding import ServicerSettings
from embedserve.api.server import ServerOptions
from embedserve.api.validation import RequestLimits
from embedserve.config import Config
from embedserve.engine.canary import CanarySettings
from embedserve.engine.engine import Engine, EngineSettings
from embedserve.engine.observer import EngineObserver
from embedserve.engine.surface import EngineSurface
from embedserve.engine.tokenization import TokenizerSettings
from embedserve.engine.watchdog import StallLimits
from embedserve.errors import ConfigError
from embedserve.model.backend import Backend, BackendFactory, DeviceReport
from embedserve.model.checkpoint import Checkpoint, load_checkpoint
from embedserve.model.cores import core_count
from embedserve.scheduling.admission import Policy
from embedserve.scheduling.admission.gradient import GradientPolicy
from embedserve.scheduling.admission.latency_p95 import LatencyP95Policy
from embedserve.scheduling.admission.throughput import ThroughputPolicy
from embedserve.scheduling.item import Shape
from embedserve.scheduling.scheduler import Scheduler
from embedserve.scheduling.settings import (
    GradientSettings,
    LatencyP95Settings,
    SchedulerSettings,
    ThroughputSettings,
)
from embedserve.telemetry.settings import TelemetrySettings

__all__ = [
    "EngineMaker",
    "bucket_edges",
    "build_engine",
    "build_scheduler",
    "gradient_settings",
    "latency_p95_settings",
    "prepare_environment",
    "read_checkpoint",
    "server_options",
    "servicer_settings",
    "stall_limits",
    "telemetry_settings",
    "throughput_settings",
    "tokenizer_settings",
    "torch_backend",
]

MS = 1_000_000
"""Nanoseconds in a millisecond."""


def prepare_environment() -> None:
    """Set what native libraries read when torch is loaded, unless the user has. To be called before that."""
    # How long an OpenMP thread spins for its partners before it sleeps. libgomp's 300,000 rounds made a pass 50 times
    # slower beside one busy process; no spinning (OMP_WAIT_POLICY=PASSIVE) costs a lone short text 11.9 ms against 6.9.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Our pool decides about threads; the tokenizer's own would fight with it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def server_options(config: Config) -> ServerOptions:
    """The transport's limits."""
    server = config.server
    return ServerOptions(
        so_reuseport=server.so_reuseport,
        max_receive_message_bytes=server.max_receive_message_bytes,
        max_send_message_bytes=server.max_send_message_bytes,
        max_metadata_bytes=server.max_metadata_bytes,
        max_concurrent_streams=server.max_concurrent_streams,
        max_pending_calls=server.max_pending_calls,
        keepalive_time_ms=server.keepalive_time_ms,
        keepalive_timeout_ms=server.keepalive_timeout_ms,
        keepalive_permit_without_calls=server.keepalive_permit_without_calls,
        min_ping_interval_ms=server.min_ping_interval_ms,
        max_connection_idle_ms=server.max_connection_idle_ms,
        max_connection_age_ms=server.max_connection_age_ms,
        max_connection_age_grace_ms=server.max_connection_age_grace_ms,
    )


def servicer_settings(config: Config) -> ServicerSettings:
    """The API's limits."""
    return ServicerSettings(
        limits=RequestLimits(
            max_texts=config.limits.max_texts,
            max_text_bytes=config.limits.max_text_bytes,
            max_send_message_bytes=config.server.max_send_message_bytes,
            max_tenant_bytes=config.limits.max_tenant_bytes,
        ),
        max_request_ms=config.server.max_request_ms,
        stream_message_bytes=config.server.stream_message_bytes,
        stream_stall_ms=config.server.stream_stall_ms,
    )


def bucket_edges(config: Config, checkpoint: Checkpoint) -> tuple[int, ...]:
    """The configured edges under the model's limit, and the limit itself: every text has a bucket."""
    limit = checkpoint.max_input_length
    return (*(edge for edge in config.scheduling.bucket_edges if edge < limit), limit)


def device_name(config: Config) -> str:
    """The device of this process; what ``auto`` means as far as it can be told without loading torch."""
    (named, *_) = (*config.model.devices, config.model.device)
    if named != "auto":
        return named
    return "cuda:0" if os.path.exists("/dev/nvidia0") else "cpu"  # noqa: PTH110 - a device node, not a file


def build_scheduler(config: Config, checkpoint: Checkpoint) -> Scheduler:
    """The core with its policies. Raises ``ConfigError`` when the model's longest text fits no batch."""
    settings = config.scheduling
    batch_tokens = settings.batch_tokens(device_name(config), checkpoint.max_input_length)
    queue_tokens = settings.queue_tokens(batch_tokens)
    _fits(checkpoint, {"scheduling.max_batch_tokens": batch_tokens, "scheduling.max_queue_tokens": queue_tokens})
    shape = settings.shape
    if shape == "auto":
        shape = "packed" if checkpoint.packs else "bucketed"
    return Scheduler(
        SchedulerSettings(
            shape=Shape(shape),
            bucket_edges=bucket_edges(config, checkpoint),
            max_batch_tokens=batch_tokens,
            max_batch_items=settings.max_batch_items,
            max_batch_ns=settings.max_batch_ms * MS,
            max_queue_items=settings.max_queue_items,
            max_queue_tokens=queue_tokens,
            max_queue_delay_ns=settings.max_queue_delay_ms * MS,
            max_wait_ns=settings.max_wait_ms * MS,
            lowest_class_share=settings.lowest_class_share,
            max_tenants=config.limits.max_tenants,
            quantum_divisor=settings.quantum_divisor,
            failures_alike_max=settings.failures_alike_max,
            retry_share=settings.retry_share,
            quarantine_ns=settings.quarantine_ms * MS,
            oom_cut=settings.oom_cut,
            oom_rise_tokens=settings.oom_rise_tokens,
            cost_memory=settings.cost_memory,
            sojourn_window_ns=settings.report_window_ms * MS,
            wait_quantile=config.admission.wait_quantile,
            wait_quantile_step=config.admission.wait_quantile_step,
            probe_after_ns=config.admission.probe_after_ms * MS,
            pass_overrun_ratio=config.admission.pass_overrun_ratio,
        ),
        _policies(config, batch_tokens),
    )


def _fits(checkpoint: Checkpoint, limits: Mapping[str, int]) -> None:
    """Raise ``ConfigError`` with every setting of ``limits`` that the model's longest text is over."""
    longest = checkpoint.max_input_length
    too_small = {name: tokens for name, tokens in limits.items() if tokens < longest}
    if too_small:
        advice = f"the model takes texts of up to {longest} tokens: raise it, or lower model.max_input_length"
        raise ConfigError([f"{name} = {tokens}, but {advice}" for name, tokens in too_small.items()])


def _policies(config: Config, batch_tokens: int) -> list[Policy]:
    made: dict[str, Callable[[], Policy]] = {
        "throughput": lambda: ThroughputPolicy(throughput_settings(config)),
        "latency_p95": lambda: LatencyP95Policy(latency_p95_settings(config)),
        "gradient": lambda: GradientPolicy(gradient_settings(config, batch_tokens)),
    }
    return [made[name]() for name in config.admission.policies]


def throughput_settings(config: Config) -> ThroughputSettings:
    """What the ``throughput`` policy takes."""
    throughput = config.admission.throughput
    return ThroughputSettings(max_drain_ns=throughput.max_drain_ms * MS, resume_fraction=throughput.resume_fraction)


def latency_p95_settings(config: Config) -> LatencyP95Settings:
    """What the ``latency_p95`` policy takes."""
    latency = config.admission.latency_p95
    return LatencyP95Settings(
        slo_ns=latency.slo_ms * MS,
        soft_ns=latency.soft_ms * MS,
        hard_ns=latency.hard_ms * MS,
        release_fraction=latency.release_fraction,
        max_shed=latency.max_shed,
        window_ns=latency.window_ms * MS,
        min_samples=latency.min_samples,
    )


def gradient_settings(config: Config, batch_tokens: int) -> GradientSettings:
    """What the ``gradient`` policy takes."""
    return GradientSettings(
        max_batch_tokens=batch_tokens,
        max_batch_items=config.scheduling.max_batch_items,
        **config.admission.gradient.model_dump(),
    )


def torch_backend(config: Config, checkpoint: Checkpoint) -> BackendFactory:
    """Builds the torch backend in the thread that will own it."""

    def build() -> Backend:
        from embedserve.model.torch_backend import TorchBackend  # noqa: PLC0415 - torch takes seconds to import

        return TorchBackend(
            checkpoint,
            device=device_name(config),
            dtype=config.model.dtype,
            threads=config.model.threads,
            control_tokens=tuple(config.model.control_tokens),
            compiled=config.model.compile,
            compile_cache=Path(config.model.compile_cache) if config.model.compile_cache else None,
            nice=config.model.compute_nice,
            cuda=config.cuda.settings(config.scheduling.max_batch_items),
        )

    return build


def tokenizer_settings(config: Config) -> TokenizerSettings:
    """The tokenizer pool's limits."""
    tokenizer = config.tokenizer
    return TokenizerSettings(
        threads=tokenizer.thread_count(core_count()),
        max_pending=tokenizer.max_pending,
        inline_chars=tokenizer.inline_chars,
        chunk_texts=tokenizer.chunk_texts,
        chunk_chars=tokenizer.chunk_chars,
        max_request_ns=tokenizer.max_request_ms * MS,
        nice=config.model.compute_nice,
    )


def read_checkpoint(config: Config) -> Checkpoint:
    """What ``model.source`` names, without its weights. Raises ``StartupError``."""
    model = config.model
    return load_checkpoint(
        model.source,
        name=model.name,
        revision=model.revision,
        max_input_length=model.max_input_length,
        allow_download=model.allow_download,
    )


class EngineMaker(Protocol):
    """Makes the engine of a process; ``build_engine`` but for its backend."""

    def __call__(
        self,
        config: Config,
        checkpoint: Checkpoint,
        observer: EngineObserver,
        on_fatal: Callable[[str], None],
        *,
        on_stall: Callable[[int], None],
        on_recovery: Callable[[int], None],
        on_compilation: Callable[[DeviceReport], None],
    ) -> EngineSurface:
        """An engine that has not started yet."""


def stall_limits(config: Config) -> StallLimits:
    """How long the device, or the process that has it, may be silent."""
    return StallLimits(stall_ns=config.health.stall_ms * MS, hang_ns=config.health.hang_ms * MS)


def build_engine(
    config: Config,
    checkpoint: Checkpoint,
    observer: EngineObserver,
    on_fatal: Callable[[str], None],
    *,
    on_stall: Callable[[int], None] = lambda _age_ns: None,
    on_recovery: Callable[[int], None] = lambda _lasted_ns: None,
    on_compilation: Callable[[DeviceReport], None] = lambda _report: None,
    make_backend: Callable[[Checkpoint], BackendFactory] | None = None,
) -> Engine:
    """An engine that has not started yet."""
    scheduling, health = config.scheduling, config.health
    return Engine(
        factory=make_backend(checkpoint) if make_backend else torch_backend(config, checkpoint),
        tokenizer=checkpoint.tokenizer(),
        max_input_length=checkpoint.max_input_length,
        scheduler=build_scheduler(config, checkpoint),
        settings=EngineSettings(
            tokenizer=tokenizer_settings(config),
            max_requests_in_flight=config.limits.max_requests_in_flight,
            batches_in_flight=scheduling.batches_in_flight,
            prepare_ahead_ns=scheduling.prepare_ahead_us * 1000,
            overlap_ahead_ns=scheduling.overlap_ahead_us * 1000,
            warm_up_tokens=scheduling.batch_tokens(device_name(config), checkpoint.max_input_length),
            stream_window_items=config.server.stream_window_items,
            stall=stall_limits(config),
            canary=CanarySettings(interval_ns=health.canary_interval_ms * MS, timeout_ns=health.canary_timeout_ms * MS),
        ),
        observer=observer,
        on_fatal=on_fatal,
        on_stall=on_stall,
        on_recovery=on_recovery,
        on_compilation=on_compilation,
        include_prompt=checkpoint.include_prompt,
    )


def telemetry_settings(
    config: Config, checkpoint: Checkpoint, role: str = "", *, has_device: bool = True
) -> TelemetrySettings:
    """Everything that telemetry is told. ``role``: which of several processes this is."""
    telemetry = config.telemetry
    return TelemetrySettings(
        service_name=telemetry.service_name,
        service_version=__version__,
        resource_attributes={
            "embedserve.model.name": checkpoint.name,
            "embedserve.model.revision": checkpoint.revision,
            "embedserve.model.weights_digest": checkpoint.weights_digest,
            **({"process.role": role} if role else {}),
        },
        prometheus_enabled=telemetry.prometheus and config.operations.enabled,
        exemplars=telemetry.exemplars,
        bucket_edges=bucket_edges(config, checkpoint),
        has_device=has_device,
        trace_sample_ratio=telemetry.trace_sample_ratio,
        span_links_max=telemetry.span_links_max,
        flush_timeout_ms=config.shutdown.telemetry_flush_ms,
        log_level=telemetry.log_level,
        log_levels=telemetry.log_levels,
        log_format=telemetry.log_format,
        force_trace=telemetry.force_trace,
        log_requests=telemetry.log_requests,
        log_requests_ratio=telemetry.log_requests_ratio,
    )
