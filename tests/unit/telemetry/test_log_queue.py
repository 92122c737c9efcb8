"""Log lines over OTLP: bounded, counted, and saying no more than the line on standard error."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import structlog
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, TraceFlags

from embedserve.errors import ConfigError
from embedserve.telemetry import instruments as table
from embedserve.telemetry.instruments import Instruments
from embedserve.telemetry.log_queue import LogQueue, LogQueueLimits
from embedserve.telemetry.logs import configure_logs
from embedserve.telemetry.tracing import current_span_context

OUTCOMES = ("exported", "failed", "dropped")


class Keeping(LogRecordExporter):
    """Keeps records; waits on ``gate`` first, and says ``result``."""

    def __init__(self) -> None:
        self.records: list[ReadableLogRecord] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.result = LogRecordExportResult.SUCCESS
        self.says: str | None = None
        self.was_shut_down = threading.Event()

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        self.entered.set()
        self.gate.wait(30)
        if self.says is not None:
            logging.getLogger("opentelemetry.exporter").warning(self.says)
        self.records.extend(batch)
        return self.result

    def shutdown(self) -> None:
        self.was_shut_down.set()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


class Bench:
    """A queue over an exporter that keeps, with its counts."""

    def __init__(self, limits: LogQueueLimits) -> None:
        self.exporter = Keeping()
        self._outcomes = Instruments().counter(table.LOG_RECORDS)
        scope = InstrumentationScope("t")
        self.queue = LogQueue(self.exporter, Resource({"service.name": "t"}), scope, self._outcomes, limits)

    def counts(self) -> tuple[float, ...]:
        return tuple(self._outcomes.cell(word).value for word in OUTCOMES)

    def finish(self) -> list[ReadableLogRecord]:
        assert self.queue.close(10)
        return self.exporter.records


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(LogQueueLimits(delay_s=60))
    yield made
    made.exporter.gate.set()
    made.queue.close(10)


@pytest.fixture
def logs(bench: Bench, capfd: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    """``bench``, with all that is logged going there too."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    configure_logs(level="info", levels={}, form="json", forward=bench.queue.put)
    yield bench
    root.handlers[:] = before[0]
    root.setLevel(before[1])


def leave(text: str) -> None:
    """An exception whose frame holds a text."""
    raise ValueError(len(text))


def attributes(record: ReadableLogRecord) -> dict[str, Any]:
    return dict(record.log_record.attributes or {})


class TestLogQueue:
    def test_all_that_waits_is_sent_on_close(self, bench: Bench) -> None:
        for number in range(1500):
            bench.queue.put({"event": "e", "level": "info", "number": number})

        assert [attributes(record)["number"] for record in bench.finish()] == list(range(1500))
        assert bench.counts() == (1500, 0, 0)
        assert bench.exporter.was_shut_down.is_set()

    def test_a_stuck_collector_costs_the_oldest_and_never_the_caller(self) -> None:
        bench = Bench(LogQueueLimits(records_max=10, export_max=1, delay_s=0.001))
        bench.exporter.gate.clear()
        bench.queue.put({"event": "first", "level": "info"})
        assert bench.exporter.entered.wait(5)

        begun = time.perf_counter()
        for _ in range(1010):
            bench.queue.put({"event": "e", "level": "info"})
        took = time.perf_counter() - begun

        assert bench.counts() == (0, 0, 1000)
        assert took < 1.0
        bench.exporter.gate.set()
        assert len(bench.finish()) == 11

    def test_close_is_bounded_when_the_exporter_hangs(self, bench: Bench) -> None:
        bench.exporter.gate.clear()
        bench.queue.put({"event": "e", "level": "info"})

        begun = time.monotonic()
        assert not bench.queue.close(0.2)

        assert time.monotonic() - begun < 1.0

    def test_what_the_collector_refuses_is_counted(self, bench: Bench) -> None:
        bench.exporter.result = LogRecordExportResult.FAILURE
        bench.queue.put({"event": "e", "level": "info"})
        bench.finish()

        assert bench.counts() == (0, 1, 0)

    def test_limits_come_from_the_standard_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert LogQueueLimits() == LogQueueLimits.from_environment()
        monkeypatch.setenv("OTEL_BLRP_MAX_QUEUE_SIZE", "7")
        monkeypatch.setenv("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", "3")
        monkeypatch.setenv("OTEL_BLRP_SCHEDULE_DELAY", "250")
        assert LogQueueLimits(7, 3, 0.25) == LogQueueLimits.from_environment()
        monkeypatch.setenv("OTEL_BLRP_SCHEDULE_DELAY", "soon")
        with pytest.raises(ConfigError, match="OTEL_BLRP_SCHEDULE_DELAY = soon"):
            LogQueueLimits.from_environment()


class TestRecords:
    def test_a_line_is_a_record_of_the_same_words(self, logs: Bench, capfd: pytest.CaptureFixture[str]) -> None:
        token = current_span_context.set(SpanContext(0xABC, 0xDEF, False, TraceFlags(1)))
        structlog.get_logger("embedserve.access").warning("rpc", status="INTERNAL", text_count=3, by_reason={"a": 1})
        current_span_context.reset(token)
        logging.getLogger("foreign").error("all is %s", "lost")

        ours, foreign = logs.finish()
        line = json.loads(capfd.readouterr().err.splitlines()[0])
        record = ours.log_record
        assert (record.body, record.event_name, record.severity_text) == ("rpc", "rpc", "WARNING")
        assert (record.trace_id, record.span_id, record.trace_flags) == (0xABC, 0xDEF, 1)
        told = {key: line[key] for key in ("status", "text_count", "by_reason", "logger")}
        assert attributes(ours) == told
        assert (foreign.log_record.body, attributes(foreign)["logger"]) == ("all is lost", "foreign")
        assert foreign.log_record.severity_number is not None
        assert foreign.log_record.severity_number.value == 17
        assert foreign.log_record.trace_id == 0

    def test_nothing_that_standard_error_hides_is_in_it(self, logs: Bench) -> None:
        secret = "my very own words"
        structlog.get_logger("a").info(
            "x", texts=[secret], authorization=secret, vector=object(), nested={"text": secret}
        )
        try:
            leave(secret)
        except ValueError:
            structlog.get_logger("a").exception("failed")

        records = logs.finish()

        assert secret not in "".join(record.to_json() for record in records)
        assert attributes(records[0])["texts"] == "[redacted]"
        assert attributes(records[1])["exception.type"] == "ValueError"
        assert "test_log_queue.py" in attributes(records[1])["exception.stacktrace"]

    def test_levels_hold_for_records_too(self, logs: Bench) -> None:
        structlog.get_logger("a").debug("quiet")
        logging.getLogger("foreign").debug("quiet")

        assert logs.finish() == []

    def test_what_the_export_says_is_not_exported(self, logs: Bench, capfd: pytest.CaptureFixture[str]) -> None:
        """It would never end."""
        logs.exporter.says = "the collector is away"
        structlog.get_logger("a").info("one")

        assert [record.log_record.body for record in logs.finish()] == ["one"]
        assert "the collector is away" in capfd.readouterr().err
