"""Log lines on their way to an OTLP collector: a bounded queue, one thread, one exporter.

Decides when records are sent and what is dropped: the oldest, counted, when lines come faster than the collector takes
them. Must never know what a line says: it has passed the same redaction as the one on standard error (``logs``). An
option (``OTEL_LOGS_EXPORTER=otlp``), since standard error is there already and platforms collect it.

What the export itself has to say, such as that its collector is away, is not exported: it would never end.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import structlog
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from embedserve.telemetry.export_thread import ExportThread, whole_numbers
from embedserve.telemetry.tally import CounterTally

__all__ = ["LogQueue", "LogQueueLimits"]

_SEVERITIES: Final = {
    "debug": SeverityNumber.DEBUG,
    "info": SeverityNumber.INFO,
    "warning": SeverityNumber.WARN,
    "error": SeverityNumber.ERROR,
    "critical": SeverityNumber.FATAL,
}
_NOT_ATTRIBUTES: Final = frozenset({"event", "level", "timestamp", "trace_id", "span_id", "trace_flags", "exception"})


@dataclass(frozen=True, slots=True)
class LogQueueLimits:
    """How much waits and goes out together. The names are those of the ``OTEL_BLRP_*`` variables."""

    records_max: int = 2048
    export_max: int = 512
    delay_s: float = 1.0

    @classmethod
    def from_environment(cls) -> LogQueueLimits:
        """What ``OTEL_BLRP_MAX_QUEUE_SIZE``, ``_MAX_EXPORT_BATCH_SIZE`` and ``_SCHEDULE_DELAY`` (ms) say.

        Raises ``ConfigError`` with every one of them that is not a positive whole number.
        """
        plain = cls()
        records_max, export_max, delay_ms = whole_numbers(
            {
                "OTEL_BLRP_MAX_QUEUE_SIZE": plain.records_max,
                "OTEL_BLRP_MAX_EXPORT_BATCH_SIZE": plain.export_max,
                "OTEL_BLRP_SCHEDULE_DELAY": round(plain.delay_s * 1000),
            }
        )
        return cls(records_max=records_max, export_max=export_max, delay_s=delay_ms / 1000)


class LogQueue:
    """Takes log events from any thread and sends them."""

    def __init__(
        self,
        exporter: LogRecordExporter,
        resource: Resource,
        scope: InstrumentationScope,
        outcomes: CounterTally,
        limits: LogQueueLimits,
    ) -> None:
        """Start the thread. ``outcomes`` counts records by exported, failed and dropped."""
        self._exporter = exporter
        self._resource = resource
        self._scope = scope
        self._limits = limits
        self._exported = outcomes.cell("exported")
        self._failed = outcomes.cell("failed")
        self._dropped = outcomes.cell("dropped")
        self._events: deque[tuple[int, Mapping[str, Any]]] = deque()
        self._lock = threading.Lock()
        self._thread = ExportThread("embedserve-logs", limits.delay_s, self._send_waiting)
        self._thread.start()

    def put(self, event: Mapping[str, Any]) -> None:
        """Take ``event``, which nobody changes any more; never blocks. From any thread."""
        if self._thread.is_current:
            return
        with self._lock:
            if len(self._events) >= self._limits.records_max:
                self._dropped.value += 1
                with suppress(IndexError):  # the thread may just have taken all of them
                    self._events.popleft()
            self._events.append((time.time_ns(), event))
        self._thread.wake()
        if len(self._events) >= self._limits.export_max:
            self._thread.press()

    def close(self, timeout_s: float) -> bool:
        """Send what waits and stop, within ``timeout_s``; whether all was sent. The exporter is shut down."""
        return self._thread.close(timeout_s, self._exporter.shutdown)

    def _send_waiting(self) -> None:
        while self._events:
            batch: list[ReadableLogRecord] = []
            while self._events and len(batch) < self._limits.export_max:
                with suppress(IndexError):  # a full queue drops its oldest meanwhile
                    batch.append(self._record(*self._events.popleft()))
            self._send(batch)

    def _send(self, batch: list[ReadableLogRecord]) -> None:
        try:
            result = self._exporter.export(batch)
        except Exception:  # noqa: BLE001
            # The exporter is foreign code that the environment chooses: counted, alerted on, and logged.
            structlog.get_logger(__name__).exception("log_export_failed", records=len(batch))
            result = LogRecordExportResult.FAILURE
        outcome = self._exported if result is LogRecordExportResult.SUCCESS else self._failed
        outcome.value += len(batch)

    def _record(self, at_ns: int, event: Mapping[str, Any]) -> ReadableLogRecord:
        level = str(event.get("level", "info"))
        name = str(event.get("event", ""))
        attributes = {key: value for key, value in event.items() if key not in _NOT_ATTRIBUTES and value is not None}
        attributes.update(_exception(event.get("exception")))
        record = LogRecord(
            timestamp=at_ns,
            observed_timestamp=at_ns,
            context=_context(event),
            severity_text=level.upper(),
            severity_number=_SEVERITIES.get(level, SeverityNumber.INFO),
            body=name,
            attributes=attributes,
            event_name=name if name.isidentifier() else None,
        )
        return ReadableLogRecord(record, self._resource, self._scope)


def _context(event: Mapping[str, Any]) -> Any:
    if "trace_id" not in event:
        return set_span_in_context(NonRecordingSpan(SpanContext(0, 0, False)))
    flags = TraceFlags(int(event["trace_flags"], 16))
    span = SpanContext(int(event["trace_id"], 16), int(event["span_id"], 16), False, flags)
    return set_span_in_context(NonRecordingSpan(span))


def _exception(rendered: object) -> dict[str, str]:
    """The conventions' attributes of what ``logs`` has made of an exception: frames without a local variable."""
    if not isinstance(rendered, list) or not rendered:
        return {}
    last = rendered[0]
    frames = [f"{frame['filename']}:{frame['lineno']} in {frame['name']}" for frame in last.get("frames", ())]
    return {
        "exception.type": str(last.get("exc_type", "")),
        "exception.message": str(last.get("exc_value", "")),
        "exception.stacktrace": "\n".join(frames),
    }
