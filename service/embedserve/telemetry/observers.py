"""The engine, watched.

Decides which metric each event of the engine moves, and when a batch is traced: when a request in it is. Must never
know gRPC or how metrics and spans leave the process. Every series is looked up once; what each call and pass measures
is counted together (``engine_figures``), what is rare one by one.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence

from opentelemetry.trace import SpanContext

from embedserve.engine.observer import BatchRecord
from embedserve.engine.stages import Stages
from embedserve.model.backend import PassTimes
from embedserve.scheduling.item import Rejection
from embedserve.telemetry import instruments as table
from embedserve.telemetry.bulk_count import S_PER_NS
from embedserve.telemetry.engine_figures import answered_requests, computed_passes, tokenizer_work
from embedserve.telemetry.head_sampling import new_context
from embedserve.telemetry.instruments import Instruments
from embedserve.telemetry.semconv import OTHER
from embedserve.telemetry.span_queue import SpanQueue
from embedserve.telemetry.spans import BatchTrace, CompileTrace
from embedserve.telemetry.tally import observe

__all__ = ["TelemetryEngineObserver"]


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
        histogram, counter = instruments.histogram, instruments.counter
        self._edges = sorted(bucket_edges)
        self._tokenizer_work = tokenizer_work(instruments)
        self._answered_requests = answered_requests(instruments, self._edges)
        self._computed_passes = computed_passes(instruments)
        self._tokenizer_texts = counter(table.TOKENIZER_TEXTS).cell()
        self._tokenizer_tokens = counter(table.TOKENIZER_TOKENS).cell()
        self._decisions = counter(table.DECISIONS)
        self._admitted = self._decisions.cell("admitted", "none", "none", "exact")
        self._items_admitted = counter(table.ITEMS_ADMITTED).cell()
        self._tokens_admitted = counter(table.TOKENS_ADMITTED).cell()
        self._settled = counter(table.ITEMS_SETTLED)
        self._requests = counter(table.REQUESTS)
        self._done = self._requests.cell("done")
        # What lies beyond the last edge, and everything where the edges are not known.
        self._queue_waits = [histogram(table.QUEUE_WAIT).cell(word) for word in (*map(str, self._edges), OTHER)]
        self._retries = counter(table.BATCH_RETRIES).cell()
        self._retry_busy = counter(table.RETRY_BUSY).cell()
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
        self._tokenizer_work.add((waited_ns, elapsed_ns))
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
        return None if self._spans is None else new_context()

    def batch_finished(self, record: BatchRecord) -> None:
        """A pass ended."""
        batch, trace, times = record.batch, record.trace, record.times
        assert trace is None or isinstance(trace, SpanContext)
        traced = trace if self._exemplars else None
        if self._spans is not None and trace is not None:
            sampled = [member for member in record.members if member.trace is not None]
            kept = record._replace(members=(), error=None)
            self._spans.put(BatchTrace(trace, kept, len(record.members), sampled))
        if record.outcome == "ok" and times is not None and batch.padded_tokens > 0 and record.predicted_ns > 0:
            busy_ns = self._busy(times, record.shared_ns, again=batch.attempt > 0)
            self._computed_passes.add((
                record.dispatched_ns, times.start_ns, times.assembled_ns, times.copied_in_ns, times.forward_ns,
                times.pooled_ns, times.copied_out_ns, record.returned_ns, batch.rows, batch.tokens,
                batch.padded_tokens, busy_ns, record.predicted_ns, traced,
            ))  # fmt: skip
        else:
            self._count_one(record, traced)

    def _count_one(self, record: BatchRecord, traced: SpanContext | None) -> None:
        """A pass that did not end well, or that nothing was predicted of."""
        batch = record.batch
        now_ns = 0 if traced is None else time.time_ns()
        took_ns = record.returned_ns - record.dispatched_ns
        observe(self._batch_duration.cell(record.outcome), took_ns * S_PER_NS, traced, now_ns)
        if record.outcome == "skipped":  # nothing was computed
            return
        self._batch_items.observe(batch.rows)
        self._batch_tokens.observe(batch.tokens)
        self._batch_padded_tokens.observe(batch.padded_tokens)
        if batch.padded_tokens > 0:
            self._batch_efficiency.observe(batch.tokens / batch.padded_tokens)
        if record.times is None:
            self._retries.value += batch.attempt > 0
            return
        self._observe_stages(record.times, traced, now_ns)
        busy_ns = self._busy(record.times, record.shared_ns, again=batch.attempt > 0)
        if record.predicted_ns > 0:
            self._batch_prediction.observe(busy_ns / record.predicted_ns)

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
            took_ns = int(compile_s / S_PER_NS)
            self._spans.put(CompileTrace(new_context(), time.monotonic_ns(), took_ns, outcome))

    def request_finished(self, stages: Stages, *, verdict: str) -> None:
        """A request left the engine."""
        queued_ns, dequeued_ns = stages.queued_ns, stages.dequeued_ns
        if verdict == "done":
            self._done.value += 1
            if queued_ns and dequeued_ns and stages.predicted_ns > 0:
                self._answered_requests.add(
                    (stages.bucket, queued_ns, dequeued_ns, stages.computed_ns, stages.predicted_ns)
                )
                return
        else:
            self._requests.cell(verdict).value += 1
        if queued_ns:
            # A request that expires in the queue has waited too; leaving it out would make an overload look short.
            waited_ns = max(0, (dequeued_ns or time.monotonic_ns()) - queued_ns)
            # A packed pass has no edges and gives the longest row instead: any number, and so no label.
            self._queue_waits[bisect_left(self._edges, stages.bucket)].observe(waited_ns * S_PER_NS)

    def _observe_stages(self, times: PassTimes, traced: SpanContext | None, now_ns: int) -> None:
        marks = (
            times.start_ns, times.assembled_ns, times.copied_in_ns, times.forward_ns, times.pooled_ns,
            times.copied_out_ns,
        )  # fmt: skip
        for cell, begin_ns, end_ns in zip(self._pass_stages, marks, marks[1:], strict=False):
            observe(cell, (end_ns - begin_ns) * S_PER_NS, traced, now_ns)

    def _busy(self, times: PassTimes, shared_ns: int, *, again: bool) -> int:
        """Count the device's time in a pass."""
        busy_ns = times.copied_out_ns - times.start_ns - shared_ns
        self._device_busy.value += busy_ns * S_PER_NS
        if again:
            self._retries.value += 1
            self._retry_busy.value += busy_ns * S_PER_NS
        return busy_ns
