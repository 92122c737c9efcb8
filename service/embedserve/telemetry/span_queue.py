"""Spans on their way out: a bounded queue, one thread, one sender.

Decides when spans are sent and what is dropped. Must never know what a span tells. The event loop only appends to a
deque; spans are built, encoded and sent in the thread. Not the SDK's BatchSpanProcessor (1.45): it ignores the timeouts
of export and flush (opentelemetry-python#4555, #4568), logs a warning for every span that it drops, counts none, and
wants finished spans.

The thread holds the interpreter while it builds and encodes, and the event loop, woken meanwhile, would wait for the
switch interval of 5 ms: so it sleeps for a moment after each few spans.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import structlog

from embedserve.telemetry.export_thread import ExportThread, whole_numbers
from embedserve.telemetry.span_senders import SpanSender
from embedserve.telemetry.span_tree import SpanFactory, SpanTree
from embedserve.telemetry.tally import CounterTally

__all__ = ["SpanQueue", "SpanQueueLimits", "SpanRecord"]

LINKS_PER_EXPORT_MAX: Final = 8192
"""Links in one request, about 0.8 MB encoded: collectors refuse messages over 4 MiB by default."""


RECORD_SPANS: Final = 10
"""Of a call that went through all stages, with its part of a pass: what waits when it is sent fills one export."""
BREATH_SPANS: Final = 256
"""Spans that are built and encoded at a stretch: under half a millisecond..."""
BREATH_S: Final = 0.0002
"""... and the sleep after them, in which whoever waits for the interpreter gets it."""


class SpanRecord(Protocol):
    """What was noted on the hot path, and turns into spans here."""

    @property
    def span_count(self) -> int:
        """Spans that it will be, about: for counting those that are dropped unbuilt."""

    def tree(self, factory: SpanFactory) -> SpanTree:
        """Its spans."""


@dataclass(frozen=True, slots=True)
class SpanQueueLimits:
    """How much waits and goes out together: the ``OTEL_BSP_*`` variables, with their defaults but for one."""

    records_max: int = 2048
    """Requests and batches that wait to be sent; the oldest is dropped to make room."""
    export_spans_max: int = 2048
    """About 0.4 MB. Four times the variable's default, 53 calls' worth: an export costs 0.3 ms, whatever is in it."""
    delay_s: float = 5.0
    """How long a record waits for company."""

    @classmethod
    def from_environment(cls) -> SpanQueueLimits:
        """What ``OTEL_BSP_MAX_QUEUE_SIZE``, ``_MAX_EXPORT_BATCH_SIZE`` and ``_SCHEDULE_DELAY`` (ms) say.

        Raises ``ConfigError`` with every one of them that is not a positive whole number.
        """
        plain = cls()
        records_max, export_spans_max, delay_ms = whole_numbers(
            {
                "OTEL_BSP_MAX_QUEUE_SIZE": plain.records_max,
                "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": plain.export_spans_max,
                "OTEL_BSP_SCHEDULE_DELAY": round(plain.delay_s * 1000),
            }
        )
        return cls(records_max=records_max, export_spans_max=export_spans_max, delay_s=delay_ms / 1000)


class SpanQueue:
    """Takes records from the event loop and sends their spans."""

    def __init__(
        self, sender: SpanSender, factory: SpanFactory, outcomes: CounterTally, limits: SpanQueueLimits
    ) -> None:
        """Start the thread. ``outcomes`` counts spans by exported, failed, dropped and unbuilt."""
        self._sender = sender
        self._factory = factory
        self._limits = limits
        self._exported = outcomes.cell("exported")
        self._failed = outcomes.cell("failed")
        self._dropped = outcomes.cell("dropped")
        self._unbuilt = outcomes.cell("unbuilt")
        self._faults: set[type[Exception]] = set()
        self._records: deque[SpanRecord] = deque()
        self._wake_records = max(1, min(limits.records_max // 2, limits.export_spans_max // RECORD_SPANS))
        self._thread = ExportThread("embedserve-spans", limits.delay_s, self._send_waiting)
        self._thread.start()

    def put(self, record: SpanRecord) -> None:
        """Take ``record``; never blocks. Called from the event loop only."""
        waiting = len(self._records)
        if waiting >= self._limits.records_max:
            with suppress(IndexError):  # the thread may just have taken all of them
                self._dropped.value += self._records.popleft().span_count
        self._records.append(record)
        if waiting == 0:
            self._thread.wake()
        elif waiting + 1 >= self._wake_records and not self._thread.is_pressed:
            self._thread.press()

    def close(self, timeout_s: float) -> bool:
        """Send what waits and stop, within ``timeout_s``; whether all was sent. The sender is shut down."""
        return self._thread.close(timeout_s, self._sender.shutdown)

    def _send_waiting(self) -> None:
        ready = links = unrested = 0
        self._factory.set_clock()
        while self._records:
            tree = self._built(self._records.popleft())
            if tree is None:
                continue
            spans = 1 + len(tree.children)
            ready += spans
            unrested += spans
            links += tree.links
            if ready >= self._limits.export_spans_max or links >= LINKS_PER_EXPORT_MAX:
                self._send(ready)
                ready = links = unrested = 0
            elif unrested >= BREATH_SPANS and not self._thread.closing:
                time.sleep(BREATH_S)
                unrested = 0
        if ready:
            self._send(ready)

    def _built(self, record: SpanRecord) -> SpanTree | None:
        """The spans of ``record``, ready to be sent; ``None`` where they cannot be."""
        try:
            tree = record.tree(self._factory)
            self._sender.add(tree)
        except Exception as error:  # noqa: BLE001
            # One record that nobody foresaw must not end tracing for all that come after it, nor hide: it is counted
            # and alerted on, and each kind of fault is logged once, since a thousand calls a second may have it. Its
            # message is left out: it may quote what a caller has sent.
            self._unbuilt.value += record.span_count
            self._log_fault(error)
            return None
        return tree

    def _log_fault(self, error: Exception) -> None:
        if type(error) in self._faults:
            return
        self._faults.add(type(error))
        (*_, last) = traceback.extract_tb(error.__traceback__)
        at = f"{Path(last.filename).name}:{last.lineno}"
        structlog.get_logger(__name__).error("span_build_failed", error=type(error).__name__, at=at)

    def _send(self, spans: int) -> None:
        try:
            sent = self._sender.send()
        except Exception:  # noqa: BLE001
            # The exporter is foreign code that the environment chooses. Its fault must not end tracing, nor hide: it
            # is counted, alerted on, and logged with its traceback.
            structlog.get_logger(__name__).exception("span_export_failed", spans=spans)
            sent = False
        (self._exported if sent else self._failed).value += spans
