"""Spans on their way out: a bounded queue, one thread, one exporter.

Decides when spans are sent and what is dropped. Must never know what a span tells. The event loop only appends to a
deque; spans are built, encoded and sent in the thread. Not the SDK's BatchSpanProcessor (1.45): it ignores the timeouts
of export and flush (opentelemetry-python#4555, #4568), logs a warning for every span that it drops, counts none, and
wants finished spans.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import structlog
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from embedserve.errors import ConfigError
from embedserve.telemetry.spans import SpanFactory
from embedserve.telemetry.tally import CounterTally

__all__ = ["SpanQueue", "SpanQueueLimits", "SpanRecord"]

LINKS_PER_EXPORT_MAX: Final = 8192
"""Links in one request, about 0.8 MB encoded: collectors refuse messages over 4 MiB by default."""


class SpanRecord(Protocol):
    """What was noted on the hot path, and turns into spans here."""

    def spans(self, factory: SpanFactory) -> Sequence[ReadableSpan]:
        """One span or more."""


@dataclass(frozen=True, slots=True)
class SpanQueueLimits:
    """How much waits and goes out together. The names and defaults are those of the ``OTEL_BSP_*`` variables."""

    records_max: int = 2048
    """Requests and batches that wait to be sent; the oldest is dropped to make room."""
    export_spans_max: int = 512
    delay_s: float = 5.0
    """How long a record waits for company."""

    @classmethod
    def from_environment(cls) -> SpanQueueLimits:
        """What ``OTEL_BSP_MAX_QUEUE_SIZE``, ``_MAX_EXPORT_BATCH_SIZE`` and ``_SCHEDULE_DELAY`` (ms) say.

        Raises ``ConfigError`` with every one of them that is not a positive whole number.
        """
        defaults = {
            "OTEL_BSP_MAX_QUEUE_SIZE": "2048",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "512",
            "OTEL_BSP_SCHEDULE_DELAY": "5000",
        }
        given = {name: os.environ.get(name) or default for name, default in defaults.items()}
        wrong = {name: text for name, text in given.items() if not (text.isdecimal() and int(text) > 0)}
        if wrong:
            raise ConfigError([f"{name} = {text}: must be a positive whole number" for name, text in wrong.items()])
        records_max, export_spans_max, delay_ms = map(int, given.values())
        return cls(records_max=records_max, export_spans_max=export_spans_max, delay_s=delay_ms / 1000)


class SpanQueue:
    """Takes records from the event loop and sends their spans."""

    def __init__(
        self, exporter: SpanExporter, factory: SpanFactory, outcomes: CounterTally, limits: SpanQueueLimits
    ) -> None:
        """Start the thread. ``outcomes`` counts spans by exported, failed and (records) dropped."""
        self._exporter = exporter
        self._factory = factory
        self._limits = limits
        self._exported = outcomes.cell("exported")
        self._failed = outcomes.cell("failed")
        self._dropped = outcomes.cell("dropped")
        self._records: deque[SpanRecord] = deque()
        self._wake_records = max(1, min(limits.records_max // 2, limits.export_spans_max // 8))
        self._filled = threading.Event()
        self._pressing = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="embedserve-spans", daemon=True)
        self._thread.start()

    def put(self, record: SpanRecord) -> None:
        """Take ``record``; never blocks. Called from the event loop only."""
        waiting = len(self._records)
        if waiting >= self._limits.records_max:
            try:
                self._records.popleft()
                self._dropped.value += 1
            except IndexError:
                pass  # the thread has just taken all of them
        self._records.append(record)
        if waiting == 0:
            self._filled.set()
        elif waiting + 1 >= self._wake_records and not self._pressing.is_set():
            self._pressing.set()

    def close(self, timeout_s: float) -> bool:
        """Send what waits and stop, within ``timeout_s``; whether all was sent. The exporter is shut down."""
        ends = time.monotonic() + timeout_s
        self._closing = True
        self._pressing.set()
        self._filled.set()
        self._thread.join(timeout_s)
        sent = not self._thread.is_alive()
        # Shutting the exporter down wakes an export that waits for a dead collector; it may wait itself.
        stopper = threading.Thread(target=self._exporter.shutdown, name="embedserve-spans-stop", daemon=True)
        stopper.start()
        stopper.join(max(0.0, ends - time.monotonic()))
        return sent

    def _run(self) -> None:
        while not self._closing:
            self._filled.wait()
            self._pressing.wait(self._limits.delay_s)
            self._filled.clear()
            self._pressing.clear()
            self._send_waiting()
        self._send_waiting()

    def _send_waiting(self) -> None:
        spans: list[ReadableSpan] = []
        links = 0
        self._factory.set_clock()
        while self._records:
            for span in self._records.popleft().spans(self._factory):
                spans.append(span)
                links += len(span.links)
            if len(spans) >= self._limits.export_spans_max or links >= LINKS_PER_EXPORT_MAX:
                self._send(spans)
                spans, links = [], 0
        if spans:
            self._send(spans)

    def _send(self, spans: list[ReadableSpan]) -> None:
        try:
            result = self._exporter.export(spans)
        except Exception:  # noqa: BLE001
            # The exporter is foreign code that the environment chooses. Its fault must not end tracing, nor hide: it
            # is counted, alerted on, and logged with its traceback.
            structlog.get_logger(__name__).exception("span_export_failed", spans=len(spans))
            result = SpanExportResult.FAILURE
        outcome = self._exported if result is SpanExportResult.SUCCESS else self._failed
        outcome.value += len(spans)
