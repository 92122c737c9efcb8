"""Every event of the engine moves the metrics that it should."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from opentelemetry.trace import SpanContext

from embedserve.engine.observer import EngineObserver
from embedserve.engine.stages import Stages
from embedserve.scheduling.item import Rejection, Verdict
from embedserve.telemetry import instruments as table
from embedserve.telemetry.instruments import Instrument
from embedserve.telemetry.tally import HistogramCell
from tests.unit.telemetry.pipeline import MS, Pipeline, finish_pass, record_of, stages_of


def count(pipeline: Pipeline, instrument: Instrument, *labels: str) -> float:
    return pipeline.instruments.counter(instrument).cell(*labels).value


def histogram(pipeline: Pipeline, instrument: Instrument, *labels: str) -> tuple[int, float]:
    cell: HistogramCell = pipeline.instruments.histogram(instrument).cell(*labels)
    point = cell.point(0)
    return point.count, point.sum


class TestEngineObserver:
    def test_it_is_one(self, pipeline: Pipeline) -> None:
        observer: EngineObserver = pipeline.engine
        assert all(hasattr(observer, name) for name in vars(EngineObserver) if not name.startswith("_"))

    def test_tokenizing(self, pipeline: Pipeline) -> None:
        pipeline.engine.tokenized(3, 30, 2 * MS, 5 * MS)

        assert (1, pytest.approx(0.002)) == histogram(pipeline, table.TOKENIZER_WAIT)
        assert (1, pytest.approx(0.005)) == histogram(pipeline, table.TOKENIZER_DURATION)
        assert (count(pipeline, table.TOKENIZER_TEXTS), count(pipeline, table.TOKENIZER_TOKENS)) == (3, 30)

    def test_admission(self, pipeline: Pipeline) -> None:
        pipeline.engine.admitted(2, 20)
        rejection = Rejection("throughput", "DRAIN_TIME_EXCEEDED", 10)
        pipeline.engine.rejected(rejection, stage="estimate")

        assert count(pipeline, table.DECISIONS, "admitted", "none", "none", "exact") == 1
        assert count(pipeline, table.DECISIONS, "rejected", "throughput", "DRAIN_TIME_EXCEEDED", "estimate") == 1
        assert (count(pipeline, table.ITEMS_ADMITTED), count(pipeline, table.TOKENS_ADMITTED)) == (2, 20)
        assert [(rejection, "estimate")] == pipeline.rejections

    @pytest.mark.parametrize("outcome", table.OUTCOMES)
    def test_a_pass(self, pipeline: Pipeline, outcome: str) -> None:
        pipeline.engine.batch_finished(record_of([None, None], outcome=outcome))

        computed = outcome in {"ok", "non_finite"}
        assert (1, pytest.approx(0.007)) == histogram(pipeline, table.BATCH_DURATION, outcome)
        ran = int(outcome != "skipped")
        assert histogram(pipeline, table.BATCH_ITEMS) == (ran, 2 * ran)
        assert histogram(pipeline, table.BATCH_TOKENS) == (ran, 20 * ran)
        assert histogram(pipeline, table.BATCH_PADDED_TOKENS) == (ran, 32 * ran)
        assert (ran, pytest.approx(ran * 20 / 32)) == histogram(pipeline, table.BATCH_EFFICIENCY)
        assert pytest.approx(0.005 if computed else 0) == count(pipeline, table.DEVICE_BUSY)
        assert (int(computed), pytest.approx(0.5 * computed)) == histogram(pipeline, table.BATCH_PREDICTION)
        for stage in table.PASS_STAGES:
            assert (int(computed), pytest.approx(0.001 * computed)) == histogram(
                pipeline, table.BATCH_STAGE_DURATION, stage
            )

    @pytest.mark.parametrize("kept", [True, False])
    def test_a_slow_pass_leads_to_its_own_trace(self, make_pipeline: Callable[..., Pipeline], kept: bool) -> None:
        pipeline = make_pipeline(exemplars=kept)
        context = SpanContext(1, 2, is_remote=False)
        trace = finish_pass(pipeline, [context, None])
        finish_pass(pipeline, [None])

        assert isinstance(trace, SpanContext)
        for cell in (
            pipeline.instruments.histogram(table.BATCH_DURATION).cell("ok"),
            pipeline.instruments.histogram(table.BATCH_STAGE_DURATION).cell("forward"),
        ):
            point = cell.point(0)
            assert point.count == 2
            assert [e.trace_id for e in point.exemplars] == [trace.trace_id] * kept

    def test_a_pass_that_runs_texts_again(self, pipeline: Pipeline) -> None:
        record = record_of([None])
        pipeline.engine.batch_finished(record)
        first = count(pipeline, table.BATCH_RETRIES), count(pipeline, table.RETRY_BUSY)
        pipeline.engine.batch_finished(record._replace(batch=record.batch._replace(attempt=1)))

        assert first == (0, 0)
        assert count(pipeline, table.BATCH_RETRIES) == 1
        assert pytest.approx(0.005) == count(pipeline, table.RETRY_BUSY) == count(pipeline, table.DEVICE_BUSY) / 2

    def test_stalls_and_canaries(self, pipeline: Pipeline) -> None:
        pipeline.engine.stalled()
        for outcome in table.CANARY_OUTCOMES:
            pipeline.engine.canary(outcome)

        assert count(pipeline, table.STALLS) == 1
        assert [count(pipeline, table.CANARIES, outcome) for outcome in table.CANARY_OUTCOMES] == [1, 1, 1, 1]

    def test_a_compiled_model_takes_over(self, pipeline: Pipeline) -> None:
        pipeline.engine.model_swapped("compiled", 25.0, cached=False)
        pipeline.engine.model_swapped("compiled", 0.75, cached=True)
        pipeline.engine.model_swapped("eager", 0.0, cached=False)
        pipeline.engine.compile_failed(3.0)

        assert [count(pipeline, table.MODEL_SWAPS, variant) for variant in table.VARIANTS] == [1, 2]
        assert [histogram(pipeline, table.MODEL_COMPILE_DURATION, outcome) for outcome in table.COMPILE_OUTCOMES] == [
            (1, 25.0), (1, 0.75), (1, 3.0),
        ]  # fmt: skip

    @pytest.mark.parametrize("verdict", [verdict.value for verdict in Verdict])
    def test_verdicts(self, pipeline: Pipeline, verdict: str) -> None:
        before = len(pipeline.instruments.counter(table.ITEMS_SETTLED).cells())

        pipeline.engine.settled(verdict, 3)

        assert count(pipeline, table.ITEMS_SETTLED, verdict) == 3
        assert before == len(pipeline.instruments.counter(table.ITEMS_SETTLED).cells())

    def test_a_request_that_was_answered(self, pipeline: Pipeline) -> None:
        pipeline.engine.request_finished(stages_of(MS), verdict="done")

        assert count(pipeline, table.REQUESTS, "done") == 1
        assert (1, pytest.approx(0.002)) == histogram(pipeline, table.QUEUE_WAIT, "16")
        assert (1, pytest.approx(0.5)) == histogram(pipeline, table.WAIT_PREDICTION)
        assert (1, pytest.approx(0.008)) == histogram(pipeline, table.WAIT_PREDICTED)
        assert (1, pytest.approx(0.004)) == histogram(pipeline, table.WAIT_ACTUAL)

    def test_a_request_that_expired_in_the_queue_has_waited_too(self, pipeline: Pipeline) -> None:
        now = time.monotonic_ns()
        pipeline.engine.request_finished(Stages(now - 9 * MS, queued_ns=now - 8 * MS, bucket=32), verdict="expired")

        waits, seconds = histogram(pipeline, table.QUEUE_WAIT, "32")
        assert waits == 1
        assert seconds >= 0.008
        assert histogram(pipeline, table.WAIT_PREDICTION) == (0, 0)

    @pytest.mark.parametrize(("longest", "label"), [(0, "16"), (3, "16"), (16, "16"), (17, "32"), (33, "_OTHER")])
    def test_a_packed_passs_longest_row_counts_in_its_bucket(
        self, pipeline: Pipeline, longest: int, label: str
    ) -> None:
        before = len(pipeline.instruments.histogram(table.QUEUE_WAIT).cells())
        stages = stages_of(MS)
        stages.bucket = longest

        pipeline.engine.request_finished(stages, verdict="done")

        assert histogram(pipeline, table.QUEUE_WAIT, label)[0] == 1
        assert before == len(pipeline.instruments.histogram(table.QUEUE_WAIT).cells())

    def test_a_request_that_was_refused_has_not_waited(self, pipeline: Pipeline) -> None:
        pipeline.engine.request_finished(Stages(time.monotonic_ns()), verdict="rejected")

        assert count(pipeline, table.REQUESTS, "rejected") == 1
        assert all(cell.point(0).count == 0 for cell in pipeline.instruments.histogram(table.QUEUE_WAIT).cells())
