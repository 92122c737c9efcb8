"""One RPC, watched from arrival to its final status.

Decides whether a call is sampled, before anything is built for it, and hands what is noted of a sampled call to the
span queue. Must never know gRPC: the API calls ``begin`` and ``end``. A call that is not sampled costs a context
lookup, two clock readings and its metrics; a sampled one is turned into spans later, in another thread (``spans``).

A batch is traced if and only if a call in it is (``observers``): the sampler that looks at links is thus the sampler of
calls, asked once.

We make our own SERVER span rather than use ``opentelemetry-instrumentation-grpc``: its aio interceptor (0.66b2) breaks
health Watch and records wrong statuses, which ``tests/integration/telemetry/test_stock_interceptor.py`` reproduces. A
user who starts the process under ``opentelemetry-instrument`` would get both; ``setup_telemetry`` therefore takes the
stock patch off ``grpc.aio.server`` before the server is made, and says so in the log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import NamedTuple

from opentelemetry.sdk.trace.sampling import Sampler
from opentelemetry.trace import SpanContext

from embedserve.api.observer import Metadata
from embedserve.engine.stages import Stages
from embedserve.telemetry import instruments as table
from embedserve.telemetry import semconv
from embedserve.telemetry.bulk_count import S_PER_NS
from embedserve.telemetry.call_figures import StageFigures, answered_calls
from embedserve.telemetry.head_sampling import HeadSampling
from embedserve.telemetry.instruments import Instruments
from embedserve.telemetry.loop_lag import LoopLag
from embedserve.telemetry.pending import Columns
from embedserve.telemetry.propagation import Propagation, asks_for_a_trace
from embedserve.telemetry.segments import marks_of
from embedserve.telemetry.span_queue import SpanQueue
from embedserve.telemetry.spans import CallRecord, error_kind
from embedserve.telemetry.tally import CounterCell, HistogramCell, observe

__all__ = ["CallEnd", "RequestTracer", "current_span_context"]

current_span_context: ContextVar[SpanContext | None] = ContextVar("embedserve_span_context", default=None)
"""The call that this task serves, for log lines. Each RPC is a task of its own, so that it is only ever set."""

LogCall = Callable[["CallEnd"], None]


class CallEnd(NamedTuple):
    """What an access log may say of a call."""

    method: str
    status: str
    duration_ns: int
    error_type: str | None
    peer: str
    attributes: Mapping[str, str | int | float | bool]
    tokens: int = 0
    """Of all its texts; 0 where it ended before they were counted."""
    trace: SpanContext | None = None
    """Of its span, or of the caller's where it has none."""


class _Method:
    """All series of one method, found once."""

    __slots__ = ("active", "answered", "durations", "name")

    def __init__(self, name: str, instruments: Instruments) -> None:
        self.name = name
        self.active: CounterCell = instruments.counter(table.ACTIVE_CALLS).cell(name)
        duration = instruments.histogram(table.RPC_DURATION)
        declared = {status for method, status in table.RPC_DURATION.declared() if method == name}
        self.durations: dict[str, HistogramCell] = {status: duration.cell(name, status) for status in declared}
        self.answered = answered_calls(instruments, duration.cell(name, "OK"))


class RequestTracer:
    """Implements ``CallObserver``: metrics for every call, spans for sampled ones, a log line where wanted."""

    def __init__(
        self,
        instruments: Instruments,
        *,
        sampler: Sampler | None,
        spans: SpanQueue | None,
        exemplars: bool,
        log_call: LogCall | None,
        force_trace: bool = False,
    ) -> None:
        """``sampler`` and ``spans`` are both given or both ``None``: without an exporter nothing is sampled.

        ``force_trace`` lets a caller have one of its calls traced whatever the sampler says.
        """
        self._instruments = instruments
        self._sampling = None if sampler is None else HeadSampling(sampler)
        self._spans = spans
        self._exemplars = exemplars
        self._log_call = log_call
        self._force = force_trace and spans is not None
        self._propagation = Propagation()
        self._methods = {name: _Method(name, instruments) for name in semconv.METHODS}
        self._other: _Method | None = None
        self._stages = StageFigures(instruments)
        self._unanswered = instruments.pending.rows(self._count_unanswered)
        retries = instruments.counter(table.RETRIES)
        self._retries = {attempt: retries.cell(str(attempt)) for attempt in range(2, 6)}
        self._active = 0
        self.lag = LoopLag(instruments.histogram(table.LOOP_LAG).cell(), lambda: self._active > 0)

    def begin(self, method: str, metadata: Metadata, arrived_ns: int, peer: str) -> _Call:
        """A call arrived. Must run on the event loop, in the task that serves the call."""
        known = self._methods.get(method) or self._unknown()
        known.active.value += 1
        self._active += 1
        if not self.lag.armed:
            self.lag.arm()
        parent = self._propagation.extract(metadata)
        sampling = self._sampling
        context = sampling.sampled(known.name, parent) if sampling is not None else None
        forced = self._force and asks_for_a_trace(metadata)
        if forced and context is None and sampling is not None:
            context = sampling.forced(parent)
        current_span_context.set(context or parent)
        return _Call(self, known, context, parent, arrived_ns, peer, forced=forced)

    def _unknown(self) -> _Method:
        """What the conventions call a method that the server does not have."""
        if self._other is None:
            self._other = _Method(semconv.OTHER, self._instruments)
        return self._other

    def ended(
        self,
        call: _Call,
        status: str,
        stages: Stages | None,
        error_type: str | None,
        attributes: Mapping[str, str | int | float | bool],
    ) -> None:
        """Record ``call``; called by it, once."""
        ended_ns = time.monotonic_ns()
        method, context = call.method, call.context
        method.active.value -= 1
        self._active -= 1
        traced = context if self._exemplars else None
        marks = None if stages is None else marks_of(stages)
        if status == "OK" and marks is not None and 0 not in marks:
            method.answered.add((call.arrived_ns, *marks, ended_ns, traced))
        else:
            # The series is found now, since it may be a new one: a scrape that counts these rows has listed them all.
            duration = method.durations.get(status) or self._new_duration(method, status)
            wall_ns = 0 if traced is None else time.time_ns()
            self._unanswered.add((duration, call.arrived_ns, marks, ended_ns, traced, wall_ns, status == "OK"))
        if "attempt" in attributes:
            self._retries[int(attributes["attempt"])].value += 1
        if status != "OK":
            self._count_error(method, status, error_type, attributes)
        if context is not None and self._spans is not None:
            self._spans.put(
                CallRecord(
                    context, call.parent, method.name, call.peer, call.arrived_ns, ended_ns, status, error_type,
                    attributes, marks, stages, call.forced,
                )
            )  # fmt: skip
        if self._log_call is not None:
            tokens = stages.tokens if stages is not None else 0
            took_ns = ended_ns - call.arrived_ns
            trace = context or call.parent
            self._log_call(CallEnd(method.name, status, took_ns, error_type, call.peer, attributes, tokens, trace))

    def _new_duration(self, method: _Method, status: str) -> HistogramCell:
        name = status if status in semconv.STATUSES else "UNKNOWN"
        found = method.durations[name] = self._instruments.histogram(table.RPC_DURATION).cell(method.name, name)
        return found

    def _count_unanswered(self, columns: Columns) -> None:
        """Calls that were not answered, or that did not go through all stages, one by one but in a row."""
        for duration, arrived_ns, marks, ended_ns, traced, wall_ns, answered in zip(*columns, strict=True):
            observe(duration, (ended_ns - arrived_ns) * S_PER_NS, traced, wall_ns)
            if marks is not None:
                self._stages.count(arrived_ns, marks, ended_ns, traced, wall_ns, answered=answered)

    def _count_error(
        self, method: _Method, status: str, error_type: str | None, attributes: Mapping[str, str | int | float | bool]
    ) -> None:
        kind = error_kind(status, error_type, attributes)
        self._instruments.counter(table.RPC_ERRORS).cell(method.name, kind).value += 1


class _Call:
    """Implements ``CallTrace``."""

    __slots__ = ("_tracer", "arrived_ns", "context", "forced", "method", "parent", "peer", "trace_id")

    def __init__(
        self,
        tracer: RequestTracer,
        method: _Method,
        context: SpanContext | None,
        parent: SpanContext | None,
        arrived_ns: int,
        peer: str,
        *,
        forced: bool,
    ) -> None:
        self._tracer = tracer
        self.forced = forced
        self.method = method
        self.context = context
        self.trace_id = None if context is None else f"{context.trace_id:032x}"
        """32 hex digits, asked for several times; ``None`` when the call is not sampled."""
        self.parent = parent
        self.arrived_ns = arrived_ns
        self.peer = peer

    def end(
        self,
        *,
        status: str,
        stages: Stages | None,
        error_type: str | None,
        attributes: Mapping[str, str | int | float | bool],
    ) -> None:
        """The call is over; see ``CallTrace``."""
        self._tracer.ended(self, status, stages, error_type, attributes)
