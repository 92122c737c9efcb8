"""Spans leave in bounded memory and bounded time, whatever the exporter does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import SpanContext, TraceFlags
from structlog.testing import capture_logs

from embedserve.errors import ConfigError
from embedserve.telemetry import instruments as table
from embedserve.telemetry.span_queue import LINKS_PER_EXPORT_MAX, SpanQueueLimits
from embedserve.telemetry.span_tree import SpanFactory, SpanTree
from embedserve.telemetry.spans import CallRecord
from tests.unit.telemetry.pipeline import EMBED, Pipeline, finish_pass


def one_call(pipeline: Pipeline) -> None:
    pipeline.calls.begin(EMBED, [], time.monotonic_ns(), "").end(
        status="OK", stages=None, error_type=None, attributes={}
    )


def outcome(pipeline: Pipeline, word: str) -> float:
    return pipeline.instruments.counter(table.SPANS).cell(word).value


class TestSpanQueue:
    async def test_all_that_waits_is_sent_on_close(self, pipeline: Pipeline) -> None:
        for _ in range(1000):
            one_call(pipeline)

        assert len(pipeline.finish()) == 1000
        assert tuple(outcome(pipeline, word) for word in ("exported", "failed", "dropped")) == (1000, 0, 0)
        assert pipeline.exporter.was_shut_down.is_set()

    async def test_one_export_holds_a_bounded_number_of_spans(self, make_pipeline: Callable[..., Pipeline]) -> None:
        pipeline = make_pipeline(limits=SpanQueueLimits(records_max=1000, export_spans_max=100, delay_s=60))
        for _ in range(950):
            one_call(pipeline)

        pipeline.finish()

        assert sum(pipeline.exporter.exports) == 950
        assert max(pipeline.exporter.exports) <= 100

    async def test_one_export_holds_a_bounded_number_of_links(self, pipeline: Pipeline) -> None:
        contexts = [SpanContext(1, number + 1, False, TraceFlags(1)) for number in range(1024)]
        for _ in range(20):
            finish_pass(pipeline, contexts)

        pipeline.finish()

        assert len(pipeline.exporter.exports) >= 20 * 1024 / LINKS_PER_EXPORT_MAX

    async def test_a_stuck_exporter_costs_the_oldest_and_never_the_caller(
        self, make_pipeline: Callable[..., Pipeline]
    ) -> None:
        pipeline = make_pipeline(limits=SpanQueueLimits(records_max=10, export_spans_max=1, delay_s=0.001))
        pipeline.exporter.gate.clear()
        one_call(pipeline)
        assert pipeline.exporter.entered.wait(5)

        begun = time.perf_counter()
        for _ in range(1010):
            one_call(pipeline)
        took = time.perf_counter() - begun

        assert outcome(pipeline, "dropped") == 1000
        assert took < 1.0
        pipeline.exporter.gate.set()
        assert len(pipeline.finish()) == 11

    async def test_close_is_bounded_when_the_exporter_hangs(self, pipeline: Pipeline) -> None:
        pipeline.exporter.gate.clear()
        one_call(pipeline)

        begun = time.monotonic()
        assert not pipeline.queue.close(0.2)

        assert time.monotonic() - begun < 1.0
        assert pipeline.exporter.was_shut_down.wait(5)

    @pytest.mark.parametrize("raises", [True, False])
    async def test_an_export_that_fails_is_counted_and_the_next_one_is_tried(
        self, make_pipeline: Callable[..., Pipeline], raises: bool
    ) -> None:
        pipeline = make_pipeline(limits=SpanQueueLimits(records_max=100, export_spans_max=1, delay_s=0.001))
        if raises:
            pipeline.exporter.broken = ValueError("the exporter's own fault")
        else:
            pipeline.exporter.result = SpanExportResult.FAILURE
        one_call(pipeline)
        deadline = time.monotonic() + 5
        while not outcome(pipeline, "failed") and time.monotonic() < deadline:  # noqa: ASYNC110 - another thread counts
            await asyncio.sleep(0.001)
        pipeline.exporter.broken, pipeline.exporter.result = None, SpanExportResult.SUCCESS
        one_call(pipeline)
        pipeline.finish()

        assert (outcome(pipeline, "failed"), outcome(pipeline, "exported")) == (1, 1)

    async def test_a_record_that_cannot_be_built_is_counted_and_logged_once_and_the_rest_is_sent(
        self, pipeline: Pipeline
    ) -> None:
        class Faulty(NamedTuple):
            span_count: int = 3

            def tree(self, factory: SpanFactory) -> SpanTree:
                raise ZeroDivisionError("what a caller sent")

        with capture_logs() as lines:
            for _ in range(2):
                one_call(pipeline)
                pipeline.queue.put(Faulty())
            one_call(pipeline)
            assert len(pipeline.finish()) == 3

        assert tuple(outcome(pipeline, word) for word in ("exported", "failed", "dropped", "unbuilt")) == (3, 0, 0, 6)
        (line,) = lines
        assert (line["event"], line["log_level"], line["error"]) == ("span_build_failed", "error", "ZeroDivisionError")
        assert line["at"].startswith("test_span_queue.py:")
        assert "caller" not in str(line)

    async def test_a_fault_between_two_exports_does_not_end_the_thread(
        self, make_pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipeline = make_pipeline(limits=SpanQueueLimits(records_max=100, export_spans_max=1, delay_s=0.001))
        with monkeypatch.context() as patched:
            patched.setattr(CallRecord, "tree", property())  # as if a release of ours had broken all of them
            one_call(pipeline)
            deadline = time.monotonic() + 5
            while not outcome(pipeline, "unbuilt") and time.monotonic() < deadline:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.001)
        one_call(pipeline)

        assert len(pipeline.finish()) == 1
        assert outcome(pipeline, "unbuilt") == 1

    def test_limits_come_from_the_standard_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert SpanQueueLimits() == SpanQueueLimits.from_environment()
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "7")
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "3")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "250")
        assert SpanQueueLimits(7, 3, 0.25) == SpanQueueLimits.from_environment()


class TestEnvironmentThatIsWrong:
    """A variable that is no number stops the start with a sentence, not a traceback."""

    def test_every_wrong_variable_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "many")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "0")
        with pytest.raises(ConfigError) as caught:
            SpanQueueLimits.from_environment()

        assert caught.value.problems == (
            "OTEL_BSP_MAX_QUEUE_SIZE = many: must be a positive whole number",
            "OTEL_BSP_SCHEDULE_DELAY = 0: must be a positive whole number",
        )
