"""Every metric, once: name, kind, unit, labels, buckets and what it tells.

Decides which metrics there are and which label values are declared, so that all of them are there, at zero, from the
first scrape. Must never know how a value is measured (``observers``, ``tracing``) or read (``gauges`` for what is
looked up at a scrape). OPERATIONS.md, the dashboards and the alerts are made from ``INSTRUMENTS``.
"""

from __future__ import annotations

from itertools import product
from typing import Final

from embedserve.scheduling.item import Verdict
from embedserve.telemetry import semconv
from embedserve.telemetry.instrument import Instrument, Kind, Label, prometheus_label, prometheus_name
from embedserve.telemetry.pending import Pending
from embedserve.telemetry.settings import DURATION_BUCKETS_S
from embedserve.telemetry.tally import CounterTally, HistogramTally

__all__ = ["INSTRUMENTS", "Instrument", "Instruments", "Kind", "Label", "prometheus_label", "prometheus_name"]


_EMBEDDING_STATUSES: Final = (
    "OK", "CANCELLED", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE",
)  # fmt: skip
_INFORMATION_STATUSES: Final = ("OK", "CANCELLED", "DEADLINE_EXCEEDED", "NOT_FOUND", "INTERNAL", "UNAVAILABLE")
_METHOD: Final = Label(semconv.RPC_METHOD, semconv.METHODS)

STAGES: Final = ("receive", "validate", "admit", "tokenize", "queue", "assemble", "forward", "respond")
PASS_STAGES: Final = ("assemble", "copy_in", "forward", "pool", "copy_out")
OUTCOMES: Final = ("ok", "out_of_memory", "failed", "non_finite", "fatal", "skipped")
CANARY_OUTCOMES: Final = ("ok", "timed_out", "refused", "wrong")
VERDICTS: Final = tuple(verdict.value for verdict in Verdict)
REQUEST_VERDICTS: Final = ("done", "expired", "cancelled", "failed", "rejected")
STATES: Final = ("starting", "warming", "serving", "stalled", "draining", "stopped", "failed")
POLICIES: Final = ("throughput", "latency_p95", "gradient")
ADMISSION_STAGES: Final = ("unread", "estimate", "exact")
REFUSALS: Final = (
    *product(("queue",), ("QUEUE_FULL",), ADMISSION_STAGES),
    *product(("too_large",), ("SUBMISSION_EXCEEDS_QUEUE", "ITEM_EXCEEDS_BATCH"), ("estimate", "exact")),
    *product(("deadline",), ("DEADLINE_PASSED",), ("estimate", "exact")),
    *product(("deadline",), ("DEADLINE_TOO_SHORT", "DEADLINE_UNREACHABLE"), ADMISSION_STAGES),
    *product(("throughput",), ("DRAIN_TIME_EXCEEDED",), ADMISSION_STAGES),
    *product(("latency_p95",), ("PREDICTED_WAIT_EXCEEDS_SLO", "P95_EXCEEDED"), ADMISSION_STAGES),
    *product(("gradient",), ("TOKENS_IN_FLIGHT_EXCEEDED",), ADMISSION_STAGES),
    ("in_flight", "TOO_MANY_REQUESTS_IN_FLIGHT", "estimate"),
    ("memory", "FRONTEND_MEMORY_FULL", "estimate"),
    ("tokenizer", "TOKENIZER_QUEUE_FULL", "estimate"),
    ("tokenizer", "TOKENIZER_TIME_EXCEEDED", "estimate"),
    *product(("draining",), ("DRAINING", "ENGINE_FAILED"), ("estimate", "exact")),
)
"""Policy, reason and stage of every refusal that the scheduler knows; the tally takes a few that are not here."""

EXPORT_OUTCOMES: Final = ("exported", "failed", "dropped")
SPAN_OUTCOMES: Final = (*EXPORT_OUTCOMES, "unbuilt")
VARIANTS: Final = ("eager", "compiled")
COMPILE_OUTCOMES: Final = ("compiled", "cached", "failed")

_COMPILE_BUCKETS: Final = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Seconds: a cached model is read in one, a small encoder takes half a minute to compile, a large one many."""
_RATIO_BUCKETS: Final = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
_EFFICIENCY_BUCKETS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_ITEM_BUCKETS: Final = tuple(float(1 << power) for power in range(11))
_TOKEN_BUCKETS: Final = tuple(float(1 << power) for power in range(4, 18))


def _counter(
    name: str, unit: str, description: str, *labels: Label, series: tuple[tuple[str, ...], ...] | None = None
) -> Instrument:
    return Instrument(name, Kind.COUNTER, unit, description, labels, series)


def _gauge(name: str, unit: str, description: str, *labels: Label) -> Instrument:
    return Instrument(name, Kind.GAUGE, unit, description, labels)


def _histogram(
    name: str, unit: str, description: str, *labels: Label, buckets: tuple[float, ...] = DURATION_BUCKETS_S
) -> Instrument:
    return Instrument(name, Kind.HISTOGRAM, unit, description, labels, buckets=buckets)


RPC_DURATION: Final = Instrument(
    semconv.RPC_DURATION,
    Kind.HISTOGRAM,
    "s",
    "Duration of calls, from arrival to the answer, health and reflection left out.",
    (_METHOD, Label(semconv.RPC_STATUS_CODE, _EMBEDDING_STATUSES)),
    (
        *product(semconv.EMBEDDING_METHODS, _EMBEDDING_STATUSES),
        *product(semconv.INFORMATION_METHODS, _INFORMATION_STATUSES),
    ),
    DURATION_BUCKETS_S,
    ((semconv.RPC_SYSTEM_NAME, semconv.GRPC),),
)
ACTIVE_CALLS: Final = _gauge("embedserve.rpc.active_calls", "{call}", "Calls that have arrived and not ended.", _METHOD)
RETRIES: Final = _counter(
    "embedserve.rpc.retries",
    "{call}",
    "Calls that are retries of a gRPC client, by attempt; 5: the fifth, or what it says is not believed.",
    Label("attempt", ("2", "3", "4", "5")),
)
RPC_ERRORS: Final = _counter(
    "embedserve.rpc.errors",
    "{call}",
    "Calls that were not OK. expected: wrong, refused, too late or given up by the caller; unexpected: our fault.",
    _METHOD, Label("kind", semconv.ERROR_KINDS),
)  # fmt: skip
STAGE_DURATION: Final = _histogram(
    "embedserve.stage.duration", "s",
    "Time of a call in each stage, once a call and stage that it reached; the stages of a call add up to its duration.",
    Label("stage", STAGES),
)  # fmt: skip
REQUESTS: Final = _counter(
    "embedserve.requests",
    "{request}",
    "Requests that left the engine, by what became of them.",
    Label("verdict", REQUEST_VERDICTS),
)
ITEMS_ADMITTED: Final = _counter("embedserve.items.admitted", "{item}", "Texts that were let into the queue.")
TOKENS_ADMITTED: Final = _counter("embedserve.tokens.admitted", "{token}", "Tokens that were let into the queue.")
ITEMS_SETTLED: Final = _counter(
    "embedserve.items.settled",
    "{item}",
    "Texts that left the scheduler, by what became of them.",
    Label("verdict", VERDICTS),
)
DECISIONS: Final = _counter(
    "embedserve.admission.decisions",
    "{request}",
    "Admission decisions. stage=unread is judged on the headers, estimate before tokenising, exact on real tokens.",
    Label("decision", ("admitted", "rejected")), Label("policy"), Label("reason"),
    Label("stage", ADMISSION_STAGES),
    series=(("admitted", "none", "none", "exact"), *(("rejected", *refusal) for refusal in REFUSALS)),
)  # fmt: skip
QUEUE_WAIT: Final = _histogram(
    "embedserve.queue.wait", "s", "Time from the queue to the worker, by bucket of the longest text, expired ones too.",
    Label("bucket"),
)  # fmt: skip
WAIT_PREDICTED: Final = _histogram(
    "embedserve.wait.predicted", "s", "Time in queue and pass that admission predicted of requests that were answered."
)
WAIT_ACTUAL: Final = _histogram("embedserve.wait.actual", "s", "Time in queue and pass that these requests took.")
WAIT_PREDICTION: Final = _histogram(
    "embedserve.wait.prediction", "1", "Actual over predicted time in queue and pass; above 1: admission too hopeful.",
    buckets=_RATIO_BUCKETS,
)  # fmt: skip
TOKENIZER_WAIT: Final = _histogram("embedserve.tokenizer.wait", "s", "Wait for a tokenizer thread.")
TOKENIZER_DURATION: Final = _histogram("embedserve.tokenizer.duration", "s", "Time of a tokenizer thread at work.")
TOKENIZER_THREADS: Final = _gauge("embedserve.tokenizer.threads", "{thread}", "Tokenizer threads.")
TOKENIZER_BUSY: Final = _gauge("embedserve.tokenizer.busy", "{thread}", "Tokenizer threads that are at work.")
TOKENIZER_QUEUE: Final = _gauge("embedserve.tokenizer.queue", "{request}", "Requests that wait for a tokenizer thread.")
TOKENIZER_TEXTS: Final = _counter("embedserve.tokenizer.texts", "{text}", "Texts that were tokenised.")
TOKENIZER_TOKENS: Final = _counter("embedserve.tokenizer.tokens", "{token}", "Tokens that came out of the tokenizer.")
BATCH_DURATION: Final = _histogram(
    "embedserve.batch.duration", "s", "Time of a pass, from the hand-over to the worker until the loop has the result.",
    Label("outcome", OUTCOMES),
)  # fmt: skip
BATCH_STAGE_DURATION: Final = _histogram(
    "embedserve.batch.stage.duration", "s", "Time of the worker in each stage of a pass.", Label("stage", PASS_STAGES)
)
BATCH_ITEMS: Final = _histogram("embedserve.batch.items", "{item}", "Rows of a pass.", buckets=_ITEM_BUCKETS)
BATCH_TOKENS: Final = _histogram(
    "embedserve.batch.tokens", "{token}", "Useful tokens of a pass.", buckets=_TOKEN_BUCKETS
)
BATCH_PADDED_TOKENS: Final = _histogram(
    "embedserve.batch.padded_tokens",
    "{token}",
    "Tokens of a pass that are computed, padding included.",
    buckets=_TOKEN_BUCKETS,
)
BATCH_EFFICIENCY: Final = _histogram(
    "embedserve.batch.efficiency", "1", "Useful over computed tokens of a pass.", buckets=_EFFICIENCY_BUCKETS
)
BATCH_PREDICTION: Final = _histogram(
    "embedserve.batch.prediction", "1", "Actual over predicted device time of a pass.", buckets=_RATIO_BUCKETS
)
BATCH_RETRIES: Final = _counter("embedserve.batch.retries", "{batch}", "Passes that ran texts of a failed pass again.")
RETRY_BUSY: Final = _counter(
    "embedserve.batch.retry.busy", "s", "Device time of such passes, as far as they ended well."
)
DEVICE_BUSY: Final = _counter(
    "embedserve.device.busy", "s", "Time in which the device worked; its rate is the busy fraction."
)

STALLS: Final = _counter(
    "embedserve.stalls", "{stall}", "Times that the device was silent for longer than a pass may take."
)
CANARIES: Final = _counter(
    "embedserve.canaries", "{canary}",
    "Known texts that were sent through the whole path, by what came back. refused: the queue was full.",
    Label("outcome", CANARY_OUTCOMES),
)  # fmt: skip

QUEUE_ITEMS: Final = _gauge("embedserve.queue.items", "{item}", "Texts that wait, by length bucket.", Label("bucket"))
QUEUE_TOKENS: Final = _gauge("embedserve.queue.tokens", "{token}", "Tokens that wait, by bucket.", Label("bucket"))
QUEUE_OLDEST: Final = _gauge(
    "embedserve.queue.oldest_age", "s", "Age of the oldest text that waits in each bucket; 0 when none does.",
    Label("bucket"),
)  # fmt: skip
RETRY_ITEMS: Final = _gauge("embedserve.batch.retry.items", "{item}", "Texts of failed passes that wait to run again.")
RETRY_BUDGET: Final = _gauge(
    "embedserve.batch.retry.budget", "s",
    "Device time that retries of failures may take now; at 0 and below they wait for texts that never failed.",
)  # fmt: skip
QUARANTINE: Final = _gauge(
    "embedserve.quarantine.tenants",
    "{tenant}",
    "Tenants that ride in batches of their own since a text of theirs failed.",
)
RUNNING_ITEMS: Final = _gauge("embedserve.running.items", "{item}", "Texts in passes that run or are prepared.")
RUNNING_TOKENS: Final = _gauge("embedserve.running.tokens", "{token}", "Tokens in passes that run or are prepared.")
PASS_AGE: Final = _gauge("embedserve.pass.age", "s", "How long the running pass has been at work; 0 while none runs.")
SERVICE_RATE: Final = _gauge(
    "embedserve.service.rate", "{token}/s", "Tokens that the device computes in a second of work, smoothed."
)
DRAIN_TIME: Final = _gauge("embedserve.drain.estimated", "s", "Time until what waits and runs would be done.")
LATENCY_P95: Final = _gauge(
    "embedserve.latency.p95", "s", "P95 over the sliding window of the latency policy, timeouts included."
)
SHED_PROBABILITY: Final = _gauge(
    "embedserve.admission.shed_probability", "1", "Share of requests that the latency policy refuses now."
)
THETA: Final = _gauge(
    "embedserve.admission.theta", "1", "0.95 quantile of actual over predicted wait; scales the prediction."
)
ADMISSION_POLICY: Final = _gauge(
    "embedserve.admission.policy", "{policy}", "1 for each admission policy that is selected.",
    Label("policy", POLICIES),
)  # fmt: skip
ADMISSION_LIMIT: Final = _gauge(
    "embedserve.admission.limit", "{token}", "Tokens that may wait or run, as the gradient policy finds; 0 without it."
)
ADMISSION_SIGNAL: Final = _gauge(
    "embedserve.admission.signal", "1", "What moves that limit: wait over what batching explains; about 1 when well."
)
MAX_BATCH_TOKENS: Final = _gauge(
    "embedserve.batch.max_tokens",
    "{token}",
    "Token budget of a pass now; falls where one would take too long, or memory ran out.",
)
COST_FIXED: Final = _gauge("embedserve.cost.fixed", "s", "Cost model: time of an empty pass (a of a + b * tokens).")
COST_PER_TOKEN: Final = _gauge(
    "embedserve.cost.per_token", "s", "Cost model: time that one more token adds (b of a + b * tokens)."
)
LIFECYCLE: Final = _gauge(
    "embedserve.lifecycle.state", "{state}", "1 for the state that the process is in.", Label("state", STATES)
)
ACCEPTING: Final = _gauge("embedserve.accepting", "{process}", "1 while a request sent now would be taken.")
DEVICE_MEMORY_USED: Final = _gauge("embedserve.device.memory.used", "By", "Device memory in use; 0 where unknown.")
DEVICE_MEMORY_TOTAL: Final = _gauge("embedserve.device.memory.total", "By", "Device memory; 0 where unknown.")
MODEL_VARIANT: Final = _gauge(
    "embedserve.model.variant", "{model}", "1 for the form of the model that passes run through now.",
    Label("variant", VARIANTS),
)  # fmt: skip
MODEL_SWAPS: Final = _counter(
    "embedserve.model.swaps", "{swap}", "Times that another form of the model took over, by which one did.",
    Label("variant", VARIANTS),
)  # fmt: skip
MODEL_COMPILE_DURATION: Final = _histogram(
    "embedserve.model.compile.duration", "s", "Time to make a compiled model: anew, from a cache, or in vain.",
    Label("outcome", COMPILE_OUTCOMES), buckets=_COMPILE_BUCKETS,
)  # fmt: skip
WARM_UP: Final = _gauge(
    "embedserve.model.warm_up", "s", "How long loading and warm-up took, until the first text was answered; 0 before."
)
GRAPHS_PLANNED: Final = _gauge(
    "embedserve.graphs.planned", "{graph}", "CUDA graphs that the settings ask for; 0 where there is no GPU."
)
GRAPHS_CAPTURED: Final = _gauge(
    "embedserve.graphs.captured", "{graph}", "CUDA graphs that there are; fewer than planned: under way, or given up."
)
GRAPHS_CAPTURE_DURATION: Final = _gauge(
    "embedserve.graphs.capture.duration", "s", "How long the capture of all CUDA graphs took together."
)
GRAPHS_MEMORY: Final = _gauge("embedserve.graphs.memory", "By", "Device memory that all CUDA graphs share.")
GRAPHS_PASSES: Final = _counter(
    "embedserve.graphs.passes", "{batch}", "Packed passes on a GPU that replayed a CUDA graph (hit), or ran without.",
    Label("outcome", ("hit", "miss")),
)  # fmt: skip
MODEL_INFO: Final = _gauge(
    "embedserve.model.info", "{model}", "1; its labels say which model is served.",
    Label("name"), Label("revision"), Label("weights_digest"), Label("dtype"), Label("device"), Label("pooling"),
    Label("dimension"),
)  # fmt: skip
FRONT_END_SILENT: Final = _gauge(
    "embedserve.frontend.silent", "{process}",
    "1 for each front end that did not answer the last scrape, which is without its series; none in one process.",
    Label("frontend"),
)  # fmt: skip
ENGINE_SILENT: Final = _gauge(
    "embedserve.engine.silent", "{process}",
    "1 for each engine process that a front end sends nothing, since it is silent or gone; none in one process.",
    Label("engine"),
)  # fmt: skip
LOOP_LAG: Final = _histogram(
    "embedserve.event_loop.lag", "s", "How late the event loop runs a timer, sampled while calls are active."
)
SPANS: Final = _counter(
    "embedserve.telemetry.spans", "{span}",
    "Spans: exported, failed (the exporter gave up), dropped (queue full) or unbuilt (a fault of ours, in the log).",
    Label("outcome", SPAN_OUTCOMES),
)  # fmt: skip
LOG_RECORDS: Final = _counter(
    "embedserve.telemetry.log_records", "{record}", "Log records over OTLP, as spans; 0 unless that is asked for.",
    Label("outcome", EXPORT_OUTCOMES),
)  # fmt: skip
METRIC_EXPORTS: Final = _counter(
    "embedserve.telemetry.metric_exports", "{export}", "Pushes of all metrics over OTLP.",
    Label("outcome", ("exported", "failed")),
)  # fmt: skip
LOG_LINES: Final = _counter(
    "embedserve.telemetry.log_lines", "{line}",
    "Log lines: written to standard error, or dropped because it took none (full pipe or disk).",
    Label("outcome", ("written", "dropped")),
)  # fmt: skip
PROCESS_MEMORY: Final = _gauge("process.memory.usage", "By", "Resident memory.")
PROCESS_CPU: Final = _counter("process.cpu.time", "s", "CPU time.", Label("cpu.mode", ("user", "system")))
PROCESS_FDS: Final = _gauge("process.unix.file_descriptor.count", "{file_descriptor}", "Open file descriptors.")
PROCESS_UPTIME: Final = _gauge("process.uptime", "s", "Time since telemetry was set up.")
PROCESS_START: Final = _gauge(
    "process.start_time", "s", "Unix time at which telemetry was set up; another value is another process."
)

INSTRUMENTS: Final[tuple[Instrument, ...]] = tuple(
    value for value in list(globals().values()) if isinstance(value, Instrument)
)
"""All of the above, in their order."""


class Instruments:
    """The counters and histograms, ready to be written to. One for each process; made at wiring."""

    def __init__(
        self, duration_buckets_s: tuple[float, ...] = DURATION_BUCKETS_S, bucket_edges: tuple[int, ...] = ()
    ) -> None:
        """``duration_buckets_s`` bound all durations but compiling; ``bucket_edges`` are the scheduler's."""
        self.counters: dict[str, CounterTally] = {}
        self.histograms: dict[str, HistogramTally] = {}
        self.pending = Pending()
        """What is measured and not counted yet; reading a histogram counts it."""
        for instrument in INSTRUMENTS:
            labels = [label.name for label in instrument.labels]
            declared = instrument.declared()
            if instrument is QUEUE_WAIT:
                declared = tuple((str(edge),) for edge in (*bucket_edges, semconv.OTHER))
            if instrument.kind is Kind.COUNTER or instrument is ACTIVE_CALLS:
                self.counters[instrument.name] = CounterTally(labels, declared, dict(instrument.constant))
            elif instrument.kind is Kind.HISTOGRAM:
                bounds = duration_buckets_s if instrument.buckets is DURATION_BUCKETS_S else instrument.buckets
                self.histograms[instrument.name] = HistogramTally(
                    labels, declared, dict(instrument.constant), bounds, self.pending
                )

    def counter(self, instrument: Instrument) -> CounterTally:
        """The tally of a counter of the table."""
        return self.counters[instrument.name]

    def histogram(self, instrument: Instrument) -> HistogramTally:
        """The tally of a histogram of the table."""
        return self.histograms[instrument.name]
