"""A pipeline that keeps its spans, and marks of a call and a pass that are easy to add up."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from embedserve.engine.observer import BatchRecord, Member
from embedserve.engine.stages import Stages
from embedserve.model.backend import PassTimes
from embedserve.scheduling.item import Batch, Rejection, Shape, Slice
from embedserve.telemetry import instruments as table
from embedserve.telemetry.instruments import Instruments
from embedserve.telemetry.observers import TelemetryEngineObserver
from embedserve.telemetry.span_queue import SpanQueue, SpanQueueLimits
from embedserve.telemetry.span_senders import ReadableSender
from embedserve.telemetry.span_tree import SpanFactory
from embedserve.telemetry.tracing import CallEnd, RequestTracer
from tests.canary import WATCH

EMBED = "embedserve.v1.EmbeddingService/Embed"
MS = 1_000_000
PATIENT = SpanQueueLimits(records_max=100_000, delay_s=60)


class KeepingExporter(SpanExporter):
    """Keeps what it is given; waits on ``gate`` first, and fails while ``broken``."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []
        self.exports: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.broken: Exception | None = None
        self.result = SpanExportResult.SUCCESS
        self.was_shut_down = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.entered.set()
        self.gate.wait(30)
        if self.broken is not None:
            raise self.broken
        for span in spans:
            WATCH.saw("a span", span.to_json())
        self.exports.append(len(spans))
        self.spans.extend(spans)
        return self.result

    def shutdown(self) -> None:
        self.was_shut_down.set()


@dataclass
class Pipeline:
    """A tracer and an engine observer over one span queue, with the exporter at its end."""

    instruments: Instruments
    exporter: KeepingExporter
    queue: SpanQueue
    calls: RequestTracer
    engine: TelemetryEngineObserver
    ended: list[CallEnd] = field(default_factory=list)
    rejections: list[tuple[Rejection, str]] = field(default_factory=list)

    def finish(self) -> list[ReadableSpan]:
        """Flush; all spans in the order in which they were exported."""
        assert self.queue.close(10)
        return self.exporter.spans


def make_pipeline(
    sampler: Sampler | None = None,
    *,
    exemplars: bool = True,
    links_max: int = 1024,
    limits: SpanQueueLimits = PATIENT,
    force_trace: bool = False,
) -> Pipeline:
    """A pipeline that samples everything unless told otherwise."""
    instruments = Instruments(bucket_edges=(16, 32))
    exporter = KeepingExporter()
    sender = ReadableSender(exporter, Resource({"service.name": "t"}), InstrumentationScope("t"))
    queue = SpanQueue(sender, SpanFactory(links_max=links_max), instruments.counter(table.SPANS), limits)
    ended: list[CallEnd] = []
    rejections: list[tuple[Rejection, str]] = []
    calls = RequestTracer(
        instruments,
        sampler=sampler or ParentBased(ALWAYS_ON),
        spans=queue,
        exemplars=exemplars,
        log_call=ended.append,
        force_trace=force_trace,
    )
    engine = TelemetryEngineObserver(
        instruments,
        queue,
        lambda rejection, stage: rejections.append((rejection, stage)),
        (16, 32),
        exemplars=exemplars,
    )
    return Pipeline(instruments, exporter, queue, calls, engine, ended, rejections)


def stages_of(begun_ns: int) -> Stages:
    """A call of 10 ms that was answered."""
    return Stages(
        arrived_ns=begun_ns,
        validated_ns=begun_ns + 1 * MS,
        admitted_ns=begun_ns + 2 * MS,
        tokenized_ns=begun_ns + 4 * MS,
        queued_ns=begun_ns + 5 * MS,
        dequeued_ns=begun_ns + 7 * MS,
        assembled_ns=begun_ns + 8 * MS,
        computed_ns=begun_ns + 9 * MS,
        responded_ns=begun_ns + 10 * MS,
        texts=2,
        tokens=20,
        bucket=16,
        waiting_items=3,
        waiting_tokens=30,
        predicted_ns=8 * MS,
    )


def finish_pass(pipeline: Pipeline, traces: Sequence[object | None], **of: Any) -> object | None:
    """A pass with one row for each trace comes and goes; its handle."""
    trace = pipeline.engine.batch_dispatched(7) if any(trace is not None for trace in traces) else None
    pipeline.engine.batch_finished(record_of(traces, **of)._replace(trace=trace))
    return trace


def record_of(traces: Sequence[object | None], *, outcome: str = "ok", begun_ns: int = 0) -> BatchRecord:
    """A pass with one row of ten tokens for each trace, of 1 ms a stage."""
    rows = len(traces)
    batch = Batch(
        id=7,
        slices=tuple(Slice(number, (0,)) for number in range(rows)),
        shape=Shape.BUCKETED,
        edge=16,
        rows=rows,
        tokens=10 * rows,
        padded_tokens=16 * rows,
        oldest_ns=begun_ns,
    )
    members = [Member(trace, first_index=n, rows=1, tokens=10, queued_ns=begun_ns) for n, trace in enumerate(traces)]
    at = [begun_ns + step * MS for step in range(8)]
    times = PassTimes(*at[1:7]) if outcome in {"ok", "non_finite"} else None
    return BatchRecord(batch, members, outcome, at[0], times, at[7], predicted_ns=10 * MS)
