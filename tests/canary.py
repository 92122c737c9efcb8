"""A pytest plugin: no text that any test sends may come out anywhere but in its own answer.

Decides what counts as sent (every text of a request through a generated stub), where it is looked for (log records at
any level, output of this process and of servers, exported spans, metrics pages, error messages and details, item
errors) and what counts as found: ``WINDOW_BYTES`` of a text on end. A leak fails the session, whatever the tests say.

Texts are remembered rather than marked, because a mark would change their tokens and with them what tests expect. Texts
are kept as windows of bytes at steps of their own length, outputs are looked at from every byte on, so that any
``2 * WINDOW_BYTES - 1`` bytes of a text are found. Shorter texts than a window are left out: they are words that a log
may use as well. ``tests/security/test_canary.py`` sends a word of its own that nothing else has.
"""

from __future__ import annotations

import http.client
import logging
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import grpc._channel
import grpc.aio
import numpy as np
import numpy.typing as npt
import pytest
import structlog
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub

__all__ = ["WATCH", "Watch"]

WINDOW_BYTES: Final = 16
DISTINCT_MIN: Final = 7
"""Different bytes in a window; fewer are runs and repetitions, which a digest or a ruler has too."""
TEXTS_MAX: Final = 64
"""Texts of one request that are remembered, spread over it: requests of 16384 texts repeat a few."""
WINDOWS_MAX: Final = 16
"""Windows of one text, spread over it."""
SCAN_BYTES: Final = 4 << 20
"""Output is looked through in pieces of this size."""
_FACTORS: Final = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))


def _spread(sequence: Sequence[Any], most: int) -> Iterable[Any]:
    step = -(-len(sequence) // most) or 1
    return sequence[::step]


def _hashes(data: bytes) -> npt.NDArray[np.uint64]:
    """A hash of each window of ``data``, at every byte."""
    count = len(data) - WINDOW_BYTES + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    low = np.ndarray((count,), "<u8", data, 0, (1,))
    high = np.ndarray((count,), "<u8", data, 8, (1,))
    mixed: npt.NDArray[np.uint64] = low * _FACTORS[0] ^ high * _FACTORS[1]
    return mixed


class Watch:
    """What was sent, what came out, and where the two meet."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.test = ""
        self.leaks: list[str] = []
        self.sent = 0
        self.seen_bytes = 0
        self._windows: set[bytes] = set()
        self._outputs: list[tuple[str, str, bytes]] = []
        self._waiting_bytes = 0
        self._lock = threading.Lock()

    def send(self, texts: Sequence[str]) -> None:
        """Remember the texts of a request."""
        with self._lock:
            for text in _spread(texts, TEXTS_MAX):
                raw = text[: 1 << 20].encode("utf-8", "replace")
                starts = range(0, len(raw) - WINDOW_BYTES + 1, WINDOW_BYTES)
                windows = (raw[start : start + WINDOW_BYTES] for start in _spread(starts, WINDOWS_MAX))
                self._windows.update(window for window in windows if len(set(window)) >= DISTINCT_MIN)
            self.sent += len(texts)

    def saw(self, way: str, output: object) -> None:
        """Something came out by ``way``."""
        raw = output if isinstance(output, bytes) else str(output).encode("utf-8", "replace")
        if len(raw) < WINDOW_BYTES:
            return
        with self._lock:
            self._outputs.append((self.test, way, raw))
            self._waiting_bytes += len(raw)
            self.seen_bytes += len(raw)
            if self._waiting_bytes >= SCAN_BYTES:
                self._scan()

    def finish(self) -> list[str]:
        """Look through what is left; returns every leak."""
        with self._lock:
            self._scan()
        return self.leaks

    def _scan(self) -> None:
        outputs, self._outputs, self._waiting_bytes = self._outputs, [], 0
        if not self._windows or not outputs:
            return
        known = np.zeros(1 << 24, np.bool_)
        known[_hashes(b"".join(self._windows))[::WINDOW_BYTES] >> np.uint64(40)] = True
        for test, way, raw in outputs:
            for start in np.flatnonzero(known[_hashes(raw) >> np.uint64(40)]).tolist():
                if (window := raw[start : start + WINDOW_BYTES]) in self._windows:
                    around = raw[max(0, start - 80) : start + 80].decode("utf-8", "replace")
                    self.leaks.append(f"{window!r} through {way} in {test}: ...{around}...")
                    break


WATCH = Watch()


# ------------------------------------------------------------------------------------------------------------ the ways


class _Watched:
    """A channel whose calls remember their texts and show their item errors."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def unary_unary(self, method: str, *args: Any, **how: Any) -> Any:
        return self._channel.unary_unary(method, *args, **_watched(how))

    def unary_stream(self, method: str, *args: Any, **how: Any) -> Any:
        return self._channel.unary_stream(method, *args, **_watched(how))


def _watched(how: dict[str, Any]) -> dict[str, Any]:
    serialize, parse = how["request_serializer"], how["response_deserializer"]

    def sending(message: Any) -> Any:
        if texts := getattr(message, "texts", None):
            WATCH.send(texts)
        return serialize(message)

    def receiving(raw: bytes) -> Any:
        message = parse(raw)
        for error in getattr(message, "errors", ()):
            WATCH.saw("an item error", error.message)
        return message

    return {**how, "request_serializer": sending, "response_deserializer": receiving}


def _before(target: Any, name: str, tell: Callable[..., None]) -> None:
    """Call ``tell`` with the arguments of each call of ``target.name``, before it."""
    original = getattr(target, name)

    def told(*args: Any, **how: Any) -> Any:
        tell(*args, **how)
        return original(*args, **how)

    setattr(target, name, told)


def _record(_logger: Any, record: logging.LogRecord) -> None:
    WATCH.saw("a log record", record.getMessage())
    if record.exc_info and record.exc_info[1] is not None:
        WATCH.saw("a log record's traceback", "".join(traceback.format_exception(record.exc_info[1])))


def _event(_logger: Any, method: str, event: Any, values: dict[str, Any]) -> None:
    WATCH.saw("a structured log line", f"{method} {event} {values!r}")
    if isinstance(error := values.get("exc_info"), BaseException):
        WATCH.saw("a structured log line's traceback", "".join(traceback.format_exception(error)))


def _aio_error(_error: Any, *args: Any, **how: Any) -> None:
    WATCH.saw("a gRPC error", f"{args} {how}")


def _sync_error(_error: Any, state: Any) -> None:
    WATCH.saw("a gRPC error", f"{state.details} {state.debug_error_string} {state.trailing_metadata}")


def _spans(_exporter: Any, spans: Any) -> None:
    for span in spans:
        WATCH.saw("a span", span.to_json())


def _listen() -> None:
    init, read = EmbeddingServiceStub.__init__, http.client.HTTPResponse.read

    def watched_init(self: Any, channel: Any) -> None:
        init(self, _Watched(channel))

    def watched_read(self: Any, amt: int | None = None) -> bytes:
        page = read(self, amt)
        WATCH.saw("a page over HTTP", page)
        return page

    EmbeddingServiceStub.__init__ = watched_init
    http.client.HTTPResponse.read = watched_read  # type: ignore[method-assign]
    _before(logging.Logger, "handle", _record)
    _before(structlog._base.BoundLoggerBase, "_process_event", _event)
    _before(grpc.aio.AioRpcError, "__init__", _aio_error)
    _before(grpc._channel._InactiveRpcError, "__init__", _sync_error)
    _before(InMemorySpanExporter, "export", _spans)


# ----------------------------------------------------------------------------------------------------- pytest's hooks


def pytest_configure() -> None:
    _listen()


def pytest_runtest_logstart(nodeid: str) -> None:
    WATCH.test = nodeid


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Standard output and standard error of each phase of a test."""
    for name, content in report.sections:
        if name.startswith("Captured std"):
            WATCH.saw(name.lower(), content)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if WATCH.finish() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if WATCH.leaks:
        terminalreporter.section("texts of callers came out", red=True)
        for leak in WATCH.leaks[:20]:
            terminalreporter.write_line(leak)
    elif WATCH.sent:
        terminalreporter.write_line(f"no text came out: {WATCH.sent} sent, {WATCH.seen_bytes} bytes of output read")
