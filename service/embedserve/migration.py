"""Where the settings of the systems that embedserve replaces have gone.

Decides what each of their names means here. Must never read a value: a name that is set is worth a hint,
never an error, since other programs use names like ``GRPC_PORT`` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["MIGRATION", "Replaced", "hints"]

PY_GPU_INFERENCE = "py-gpu-inference"
EMBEDEER = "embedeer"


@dataclass(frozen=True, slots=True)
class Replaced:
    """One of their settings."""

    system: str
    name: str
    """An environment variable, or a flag with its dashes."""
    path: str | None
    """Our setting, or ``None`` where there is no equivalent."""
    note: str
    """What differs; with ``path`` ``None``, why there is none and what to do."""


MIGRATION = (
    Replaced(
        PY_GPU_INFERENCE,
        "MODEL_PATH",
        "model.source",
        "The checkpoint's own pooling, prompts and length limit are honoured.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "MODEL_CACHE_DIR",
        None,
        "because the hub library has its own: set HF_HOME.",
    ),
    Replaced(PY_GPU_INFERENCE, "DEVICE", "model.device", "Documented there but never read; here it decides."),
    Replaced(
        PY_GPU_INFERENCE,
        "MAX_BATCH_SIZE",
        "scheduling.max_batch_items",
        "Here a larger request is split, not run whole.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "MAX_TOKENS_PER_BATCH",
        "scheduling.max_batch_tokens",
        "Counts computed tokens: with padding when bucketed, without when packed.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "DEADLINE_WAIT_MS",
        "scheduling.max_wait_ms",
        "Age at which a bucket goes first, whatever its length; the oldest first among those.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "MIN_ITEM_DELAY_MS",
        "scheduling.max_queue_delay_ms",
        "Hold for a fuller batch. Leave it at 0: no hold wins at any load.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "MAX_WAIT_TIME_S",
        "server.max_request_ms",
        "Has no effect there; here it bounds every call. In milliseconds.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "GPU_QUEUE_MAXSIZE",
        "scheduling.batches_in_flight",
        "Counts the running batch too; batches are decided late, so 2 suffices.",
    ),
    Replaced(PY_GPU_INFERENCE, "GRPC_HOST", "server.address", "Host and port are one setting; Unix sockets work too."),
    Replaced(PY_GPU_INFERENCE, "GRPC_PORT", "server.address", "Host and port are one setting; Unix sockets work too."),
    Replaced(
        PY_GPU_INFERENCE,
        "GRPC_MAX_WORKERS",
        None,
        "because calls share one event loop instead of threads. limits.max_requests_in_flight bounds them.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "HTTP_HEALTH_PORT",
        "operations.address",
        "Bound to loopback unless set; there to every address.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "BACKPRESSURE_THROUGHPUT_ENABLED",
        "admission.policies",
        "List throughput. Its thresholds are settings under admission.throughput and scheduling.max_queue_tokens.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "BACKPRESSURE_LATENCY_ENABLED",
        "admission.policies",
        "List latency_p95; both policies may be on. Its thresholds are settings under admission.latency_p95.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "METRICS_ENABLED",
        "telemetry.prometheus",
        "For OTLP set OTEL_EXPORTER_OTLP_ENDPOINT, or OTEL_METRICS_EXPORTER=none to turn it off.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "METRICS_NAMESPACE",
        "telemetry.service_name",
        "Metric names are fixed, so that dashboards fit; the service's name tells deployments apart.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "METRICS_REGION",
        None,
        "because metrics go to CloudWatch through an OpenTelemetry collector, which has its region.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "METRICS_FLUSH_INTERVAL_S",
        None,
        "because OpenTelemetry has its own: set OTEL_METRIC_EXPORT_INTERVAL, in milliseconds.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "METRICS_MAX_BATCH_SIZE",
        None,
        "because metrics are aggregated in place and never sent one by one.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "METRICS_ENQUEUE_WARN_THRESHOLD",
        None,
        "because metrics are aggregated in place: no queue of them can grow.",
    ),
    Replaced(
        PY_GPU_INFERENCE,
        "METRICS_MAX_ENQUEUE_BUFFER_SIZE",
        None,
        "because metrics are aggregated in place: no queue of them can grow.",
    ),
    Replaced(EMBEDEER, "--model", "model.source", "A sentence-transformers checkpoint, not an ONNX export."),
    Replaced(EMBEDEER, "--address", "server.address", "The same; several addresses by commas."),
    Replaced(EMBEDEER, "--socket", "server.address", "unix:/path, speaking gRPC instead of JSON lines."),
    Replaced(
        EMBEDEER, "--pooling", None, "because the checkpoint says how it is pooled; any other way gives wrong vectors."
    ),
    Replaced(
        EMBEDEER,
        "--normalize",
        None,
        "because each request may say (EmbedRequest.normalize); the checkpoint's way is the default.",
    ),
    Replaced(EMBEDEER, "--dtype", "model.dtype", "fp32 is float32, fp16 is float16; quantised weights are not served."),
    Replaced(EMBEDEER, "--device", "model.device", "gpu is cuda here."),
    Replaced(EMBEDEER, "--provider", "model.device", "cuda chooses CUDA; DirectML is not supported."),
    Replaced(
        EMBEDEER,
        "--token",
        None,
        "because a secret does not belong on a command line: set HF_TOKEN, with model.allow_download.",
    ),
    Replaced(EMBEDEER, "--cache-dir", None, "because the hub library has its own: set HF_HOME."),
    Replaced(EMBEDEER, "--idle-timeout", None, "because the model stays loaded, so that no caller waits for a reload."),
    Replaced(
        EMBEDEER,
        "EMBEDEER_GRPC_ADDRESS",
        None,
        "because it is the client's: clients take a gRPC target, as embedserve embed --server does.",
    ),
)


def hints(env: Mapping[str, str]) -> tuple[str, ...]:
    """A sentence for each variable of theirs that ``env`` sets; embedserve reads none of them."""
    return tuple(_hint(replaced) for replaced in MIGRATION if replaced.name in env)


def _hint(replaced: Replaced) -> str:
    what = (
        f"its place is {replaced.path}. {replaced.note}" if replaced.path else f"it has no equivalent, {replaced.note}"
    )
    return f"{replaced.name}, a setting of {replaced.system}, is not read here: {what}"
