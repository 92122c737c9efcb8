"""The engine, watched.

Decides which metric each event of the engine moves, and when a batch is traced: when a request in it is. Must never
know gRPC or how metrics and spans leave the process. Every series is looked up once, here; an event costs additions and
bisections.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Final

from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanContext, TraceFlags

from embedserve.engine.observer import BatchRecord
from embedserve.engine.stages import Stages
from embedserve.model.backend import PassTimes
from embedserve.scheduling.item import Rejection
from embedserve.telemetry import instruments as table
from embedserve.telemetry.instruments import Instruments
from embedserve.telemetry.semconv import OTHER
from embedserve.telemetry.span_queue import SpanQueue
from embedserve.telemetry.spans import BatchTrace, CompileTrace
from embedserve.telemetry.tally import observe

__all__ = ["TelemetryEngineObserver"]

_S_PER_NS: Final = 1e-9

LogRejection = Callable[[Rejection, str], None]


class TelemetryEngineObserver:
    """Implements ``EngineObserver``. Event loop only."""

    def __init__(
        self,
        instruments: Instruments,
        spans: SpanQueue | None,
        log_rejection: LogRejection,
        bucket_edges: Sequence[int] = (),
        *,
        exemplars: bool = False,
    ) -> None:
        """Without ``spans`` no batch is traced. ``log_rejection(rejection, stage)`` must not block."""
        self._exemplars = exemplars
        self._spans = spans
        self._log_rejection = log_rejection
        self._ids = RandomIdGenerator()
        histogram, counter = instruments.histogram, instruments.counter
        self._tokenizer_wait = histogram(table.TOKENIZER_WAIT).cell()
        self._tokenizer_duration = histogram(table.TOKENIZER_DURATION).cell()
        self._tokenizer_texts = counter(table.TOKENIZER_TEXTS).cell()
        self._tokenizer_tokens = counter(table.TOKENIZER_TOKENS).cell()
        self._decisions = counter(table.DECISIONS)
        self._admitted = self._decisions.cell("admitted", "none", "none", "exact")
        self._items_admitted = counter(table.ITEMS_ADMITTED).cell()
        self._tokens_admitted = counter(table.TOKENS_ADMITTED).cell()
        self._settled = counter(table.ITEMS_SETTLED)
        self._requests = counter(table.REQUESTS)
        self._edges = sorted(bucket_edges)
        # What lies beyond the last edge, and everything where the edges are not known.
        self._queue_waits = [histogram(table.QUEUE_WAIT).cell(word) for word in (*map(str, self._edges), OTHER)]
        self._wait_predicted = histogram(table.WAIT_PREDICTED).cell()
        self._wait_actual = histogram(table.WAIT_ACTUAL).cell()
        self._retries = counter(table.BATCH_RETRIES).cell()
        self._retry_busy = counter(table.RETRY_BUSY).cell()
        self._wait_prediction = histogram(table.WAIT_PREDICTION).cell()
        self._batch_duration = histogram(table.BATCH_DURATION)
        stages = histogram(table.BATCH_STAGE_DURATION)
        self._pass_stages = tuple(stages.cell(name) for name in table.PASS_STAGES)
        self._batch_items = histogram(table.BATCH_ITEMS).cell()
        self._batch_tokens = histogram(table.BATCH_TOKENS).cell()
        self._batch_padded_tokens = histogram(table.BATCH_PADDED_TOKENS).cell()
        self._batch_efficiency = histogram(table.BATCH_EFFICIENCY).cell()
        self._batch_prediction = histogram(table.BATCH_PREDICTION).cell()
        self._device_busy = counter(table.DEVICE_BUSY).cell()
        self._stalls = counter(table.STALLS).cell()
        self._canaries = counter(table.CANARIES)
        self._swaps = counter(table.MODEL_SWAPS)
        self._compiles = histogram(table.MODEL_COMPILE_DURATION)

    def tokenized(self, texts: int, tokens: int, waited_ns: int, elapsed_ns: int) -> None:
        """A tokenizer thread has finished some texts."""
        self._tokenizer_wait.observe(waited_ns * _S_PER_NS)
        self._tokenizer_duration.observe(elapsed_ns * _S_PER_NS)
        self._tokenizer_texts.value += texts
        self._tokenizer_tokens.value += tokens

    def admitted(self, items: int, tokens: int) -> None:
        """A request waits in its buckets."""
        self._admitted.value += 1
        self._items_admitted.value += items
        self._tokens_admitted.value += tokens

    def rejected(self, rejection: Rejection, *, stage: str) -> None:
        """A request was refused."""
        self._decisions.cell("rejected", rejection.policy, rejection.reason, stage).value += 1
        self._log_rejection(rejection, stage)

    def batch_dispatched(self, batch_id: int) -> object | None:  # noqa: ARG002
        """A batch with a sampled request in it is on its way; the context of its span."""
        return None if self._spans is None else self._new_trace()

    def batch_finished(self, record: BatchRecord) -> None:
        """A pass ended."""
        batch, trace = record.batch, record.trace
        assert trace is None or isinstance(trace, SpanContext)
        traced = trace if self._exemplars else None
        now_ns = 0 if traced is None else time.time_ns()
        took_ns = record.returned_ns - record.dispatched_ns
        observe(self._batch_duration.cell(record.outcome), took_ns * _S_PER_NS, traced, now_ns)
        if self._spans is not None and trace is not None:
            sampled = [member for member in record.members if member.trace is not None]
            kept = record._replace(members=(), error=None)
            self._spans.put(BatchTrace(trace, kept, len(record.members), sampled))
        if record.outcome == "skipped":  # nothing was computed
            return
        self._batch_items.observe(batch.rows)
        self._batch_tokens.observe(batch.tokens)
        self._batch_padded_tokens.observe(batch.padded_tokens)
        if batch.padded_tokens > 0:
            self._batch_efficiency.observe(batch.tokens / batch.padded_tokens)
        if batch.attempt:
            self._retries.value += 1
        if record.times is not None:
            self._observe_stages(record.times, traced, now_ns)
            self._pass_ended(record.times, record.shared_ns, record.predicted_ns, again=batch.attempt > 0)

    def settled(self, verdict: str, items: int) -> None:
        """Items ended."""
        self._settled.cell(verdict).value += items

    def stalled(self) -> None:
        """The device is silent."""
        self._stalls.value += 1

    def canary(self, outcome: str) -> None:
        """A known text has come back, or has not."""
        self._canaries.cell(outcome).value += 1

    def model_swapped(self, variant: str, compile_s: float, *, cached: bool) -> None:
        """Another form of the model runs."""
        self._swaps.cell(variant).value += 1
        if compile_s > 0:
            self._compile_ended("cached" if cached else "compiled", compile_s)

    def compile_failed(self, compile_s: float) -> None:
        """There will be no compiled model."""
        self._compile_ended("failed", compile_s)

    def _compile_ended(self, outcome: str, compile_s: float) -> None:
        self._compiles.cell(outcome).observe(compile_s)
        if self._spans is not None:
            took_ns = int(compile_s / _S_PER_NS)
            self._spans.put(CompileTrace(self._new_trace(), time.monotonic_ns(), took_ns, outcome))

    def _new_trace(self) -> SpanContext:
        return SpanContext(
            self._ids.generate_trace_id(), self._ids.generate_span_id(), False, TraceFlags(TraceFlags.SAMPLED)
        )

    def request_finished(self, stages: Stages, *, verdict: str) -> None:
        """A request left the engine."""
        self._requests.cell(verdict).value += 1
        if not stages.queued_ns:
            return
        # A request that expires in the queue has waited too; leaving it out would make an overload look short.
        taken_ns = stages.dequeued_ns or time.monotonic_ns()
        # A packed pass has no edges and gives the longest row instead: any number, and so no label.
        cell = self._queue_waits[bisect_left(self._edges, stages.bucket)]
        cell.observe(max(0, taken_ns - stages.queued_ns) * _S_PER_NS)
        if verdict == "done" and stages.predicted_ns > 0:
            took_ns = max(0, stages.computed_ns - stages.queued_ns)
            self._wait_predicted.observe(stages.predicted_ns * _S_PER_NS)
            self._wait_actual.observe(took_ns * _S_PER_NS)
            self._wait_prediction.observe(took_ns / stages.predicted_ns)

    def _observe_stages(self, times: PassTimes, traced: SpanContext | None, now_ns: int) -> None:
        marks = (
            times.start_ns, times.assembled_ns, times.copied_in_ns, times.forward_ns, times.pooled_ns,
            times.copied_out_ns,
        )  # fmt: skip
        for cell, begin_ns, end_ns in zip(self._pass_stages, marks, marks[1:], strict=False):
            observe(cell, (end_ns - begin_ns) * _S_PER_NS, traced, now_ns)

    def _pass_ended(self, times: PassTimes, shared_ns: int, predicted_ns: int, *, again: bool) -> None:
        busy_ns = times.copied_out_ns - times.start_ns - shared_ns
        self._device_busy.value += busy_ns * _S_PER_NS
        if again:
            self._retry_busy.value += busy_ns * _S_PER_NS
        if predicted_ns > 0:
            self._batch_prediction.observe(busy_ns / predicted_ns)
