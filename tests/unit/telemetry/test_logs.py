"""One line an event, on standard error, that a machine can read and that holds nothing a caller sent."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar

import numpy as np
import orjson
import pytest
import structlog
from opentelemetry.trace import SpanContext, TraceFlags

from embedserve.scheduling.item import Rejection
from embedserve.telemetry import logs
from embedserve.telemetry.call_log import SHED_INTERVAL_S, CallLog, ShedLog
from embedserve.telemetry.logs import VALUE_CHARS_MAX, LineLogger, configure_logs, line_logger
from embedserve.telemetry.settings import LogRequests
from embedserve.telemetry.tracing import CallEnd, current_span_context
from tests.unit.telemetry.pipeline import EMBED, Pipeline

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Capture:
    """Where the lines go, and what they say."""

    def __init__(self) -> None:
        self.raw = io.BytesIO()
        self.text = io.TextIOWrapper(self.raw, write_through=True)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.raw.getvalue().splitlines()]


@pytest.fixture
def capture() -> Iterator[Capture]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield Capture()
    root.handlers[:], level = before
    root.setLevel(level)
    for name in ("grpc", "embedserve", "embedserve.engine", "noisy"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    logging.captureWarnings(capture=False)


def configure(capture: Capture, level: str = "info", **levels: str) -> None:
    configure_logs(
        level=level, levels={k.replace("_", "."): v for k, v in levels.items()}, form="json", stream=capture.text
    )


class TestLines:
    def test_a_line_of_ours(self, capture: Capture) -> None:
        configure(capture)
        structlog.get_logger("embedserve.app").info("serving", port=1, model="m")

        (line,) = capture.lines
        assert {
            "event": "serving",
            "level": "info",
            "logger": "embedserve.app",
            "port": 1,
            "model": "m",
        }.items() <= line.items()
        assert line["timestamp"].endswith("Z")

    def test_a_line_of_the_standard_library_looks_the_same(self, capture: Capture) -> None:
        configure(capture)
        logging.getLogger("grpc._cython").warning("port %d is taken", 5)

        (line,) = capture.lines
        assert {"event": "port 5 is taken", "level": "warning", "logger": "grpc._cython"}.items() <= line.items()
        assert "timestamp" in line

    def test_warnings_come_in_too(self, capture: Capture) -> None:
        configure(capture)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old thing", stacklevel=1)

        assert "old thing" in capture.lines[0]["event"]

    def test_lines_of_a_call_carry_its_trace(self, capture: Capture, pipeline: Pipeline) -> None:
        configure(capture)

        async def serve() -> None:
            call = pipeline.calls.begin(EMBED, [("traceparent", f"00-{TRACE}-{SPAN}-01")], 0, "")
            structlog.get_logger("a").info("inside")
            logging.getLogger("b").warning("inside")
            call.end(status="OK", stages=None, error_type=None, attributes={})

        asyncio.run(serve())
        structlog.get_logger("a").info("outside")

        assert [line.get("trace_id") for line in capture.lines] == [TRACE, TRACE, None]
        assert all(len(line["span_id"]) == 16 for line in capture.lines[:2])

    def test_context_variables_are_shown(self, capture: Capture) -> None:
        configure(capture)
        with structlog.contextvars.bound_contextvars(tenant="t1"):
            structlog.get_logger("a").info("x")
        assert capture.lines[0]["tenant"] == "t1"

    def test_console_lines_are_for_people(self, capture: Capture) -> None:
        configure_logs(level="info", levels={}, form="console", stream=capture.text)
        structlog.get_logger("embedserve.app").info("serving", port=1)
        logging.getLogger("grpc").warning("hello")

        text = capture.raw.getvalue().decode()
        assert "serving" in text
        assert "port=1" in text
        assert "hello" in text
        assert not text.startswith("{")

    def test_a_stream_that_is_no_terminal_gets_json(self, capture: Capture) -> None:
        configure_logs(level="info", levels={}, form="auto", stream=capture.text)
        structlog.get_logger("a").info("x")
        assert capture.lines[0]["event"] == "x"

    def test_standard_output_stays_empty(self) -> None:
        code = (
            "from embedserve.telemetry.setup import setup_telemetry;"
            "from embedserve.telemetry.settings import TelemetrySettings;"
            "import logging, structlog; t = setup_telemetry(TelemetrySettings());"
            "structlog.get_logger('a').error('ours'); logging.getLogger('b').error('theirs'); t.shutdown(1)"
        )
        environment = {"PYTHONPATH": "service", "OTEL_TRACES_EXPORTER": "console", "OTEL_METRICS_EXPORTER": "console"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout == ""
        assert '"ours"' in done.stderr
        assert '"theirs"' in done.stderr


class TestLevels:
    def test_below_the_level_nothing_is_written(self, capture: Capture) -> None:
        configure(capture, "warning")
        structlog.get_logger("a").info("x")
        logging.getLogger("b").info("x")
        assert capture.lines == []

    def test_a_logger_may_have_its_own_level_for_itself_and_below(self, capture: Capture) -> None:
        configure(capture, "info", embedserve_engine="debug", noisy="error")
        for name in ("embedserve.engine.driver", "embedserve.api", "noisy.part"):
            structlog.get_logger(name).debug("debug")
            structlog.get_logger(name).warning("warning")
            logging.getLogger(name).debug("debug")
            logging.getLogger(name).warning("warning")

        found = [(line["logger"], line["event"]) for line in capture.lines]
        ours, api = "embedserve.engine.driver", "embedserve.api"
        assert [(ours, "debug"), (ours, "warning")] * 2 + [(api, "warning")] * 2 == found


class TestNothingOfACallerIsWritten:
    SECRET = "correct horse battery staple"

    @pytest.mark.parametrize(
        "key", ["text", "texts", "vector", "authorization", "Authorization", "token_ids", "password"]
    )
    def test_under_these_names(self, capture: Capture, key: str) -> None:
        configure(capture)
        structlog.get_logger("a").info("x", **{key: self.SECRET})
        structlog.get_logger("a").info("x", headers={key: self.SECRET})
        logging.getLogger("b").warning("x", extra={key: self.SECRET})

        assert self.SECRET.encode() not in capture.raw.getvalue()
        assert len(capture.lines) == 3

    @pytest.mark.parametrize(
        "value", [np.ones(384), b"bytes", ["long list"] * 100, object()], ids=lambda v: type(v).__name__
    )
    def test_nor_anything_that_is_not_a_plain_value(self, capture: Capture, value: object) -> None:
        configure(capture)
        structlog.get_logger("a").info("x", shown=value)
        assert f"<{type(value).__name__}>" == capture.lines[0]["shown"]

    def test_nor_the_local_variables_of_a_traceback(self, capture: Capture) -> None:
        def fail() -> None:
            texts = [self.SECRET[::-1][::-1]]
            raise ValueError(len(texts))

        for form in ("json", "console"):
            configure_logs(level="info", levels={}, form=form, stream=capture.text)  # type: ignore[arg-type]
            try:
                fail()
            except ValueError:
                structlog.get_logger("a").exception("failed")
                logging.getLogger("b").exception("failed")

        written = capture.raw.getvalue()
        assert written.count(b"ValueError") >= 4
        assert self.SECRET.encode() not in written

    def test_a_megabyte_is_cut(self, capture: Capture) -> None:
        configure(capture)
        structlog.get_logger("a").info("x", model="y" * 1_000_000)
        assert len(capture.raw.getvalue()) < 3000


class _Lines:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append(("info", event, fields))

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append(("warning", event, fields))


class TestCallLog:
    @pytest.mark.parametrize(("which", "ok", "failed"), [("errors", 0, 50), ("all", 50, 50), ("sampled", 50, 50)])
    def test_errors_always_have_a_line_and_the_rest_by_setting(self, which: LogRequests, ok: int, failed: int) -> None:
        lines = _Lines()
        log = CallLog(lines, which, ratio=1.0)
        for status in ("OK", "INTERNAL"):
            for _ in range(50):
                log(
                    CallEnd(
                        EMBED, status, 1_500_000, None if status == "OK" else "ItemFailed", "ipv4:1:2", {"texts": 1}
                    )
                )

        assert (ok, failed) == tuple(sum(line[0] == level for line in lines.lines) for level in ("info", "warning"))
        assert {"method": EMBED, "duration_ms": 1.5, "text_count": 1}.items() <= lines.lines[-1][2].items()

    @pytest.mark.parametrize(("status", "kind"), [("INVALID_ARGUMENT", "expected"), ("INTERNAL", "unexpected")])
    def test_a_fault_of_ours_is_told_from_what_a_caller_did(self, status: str, kind: str) -> None:
        lines = _Lines()
        CallLog(lines, "errors", 0.0)(CallEnd(EMBED, status, 1, "SomeError", "", {"tenant": "t", "texts": 1}, tokens=9))

        ((_, _, fields),) = lines.lines
        assert (fields["error_kind"], fields["tenant"], fields["tokens"]) == (kind, "t", 9)

    @pytest.mark.parametrize(("which", "expected"), [("errors", 0), ("sampled", 0), ("all", 50)])
    def test_calls_that_were_shed_are_left_to_the_summary(self, which: LogRequests, expected: int) -> None:
        """Thousands a second under overload: a line each would cost more than the refusal."""
        lines = _Lines()
        log = CallLog(lines, which, ratio=1.0)
        for _ in range(50):
            log(CallEnd(EMBED, "RESOURCE_EXHAUSTED", 1, "QUEUE_FULL", "", {"policy": "queue", "texts": 1}))

        assert len(lines.lines) == expected

    def test_a_ratio_of_the_calls_that_are_well_has_a_line(self) -> None:
        lines = _Lines()
        log = CallLog(lines, "sampled", ratio=0.25)
        for _ in range(4000):
            log(CallEnd(EMBED, "OK", 1, None, "", {}))
        # 1000 expected with a deviation of 27
        assert 810 < len(lines.lines) < 1190

    def test_only_known_fields_are_written(self) -> None:
        lines = _Lines()
        CallLog(lines, "all", 1.0)(
            CallEnd(EMBED, "OK", 1, None, "", {"texts": 2, "first_text": "secret", "drain_ns": 3.0})
        )
        assert {"method", "status", "duration_ms", "peer", "text_count"} == set(lines.lines[0][2])


class TestShedLog:
    def test_thousands_of_refusals_are_one_line_a_second(self) -> None:
        lines = _Lines()
        due: list[Callable[[], None]] = []

        def schedule(delay_s: float, callback: Callable[[], None]) -> None:
            assert delay_s == SHED_INTERVAL_S
            due.append(callback)

        log = ShedLog(lines, schedule)
        for _ in range(1000):
            log(Rejection("throughput", "DRAIN_TIME_EXCEEDED", 5), "estimate")
        assert [fields["requests"] for _, _, fields in lines.lines] == [1]

        due.pop()()
        assert [fields["requests"] for _, _, fields in lines.lines] == [1, 999]
        assert lines.lines[-1][2]["by_reason"] == {"throughput/DRAIN_TIME_EXCEEDED/estimate": 999}

        due.pop()()  # nothing came: no line, and no timer either
        assert (due, len(lines.lines)) == ([], 2)

        log(Rejection("queue", "QUEUE_FULL", 5), "exact")
        assert len(lines.lines) == 3

    def test_what_was_counted_last_is_written_at_the_end(self) -> None:
        lines = _Lines()
        log = ShedLog(lines, lambda _delay_s, _callback: None)
        for _ in range(3):
            log(Rejection("queue", "QUEUE_FULL", 5), "exact")
        log.flush()
        log.flush()
        assert [fields["requests"] for _, _, fields in lines.lines] == [1, 2]

    async def test_the_running_loop_is_the_clock(self) -> None:
        begun = time.monotonic()
        ShedLog(_Lines())(Rejection("queue", "QUEUE_FULL", 5), "exact")
        assert time.monotonic() - begun < SHED_INTERVAL_S


class TestLinesByTheThousand:
    """A line a call is written without structlog's ways, and looks the same."""

    FIELDS: ClassVar[dict[str, Any]] = {
        "method": "M/Embed",
        "duration_ms": 1.25,
        "tenant": "x" * 3000,
        "tokens": 7,
        "late": None,
    }

    @pytest.mark.parametrize("level", ["info", "warning"])
    @pytest.mark.parametrize("traced", [False, True])
    def test_they_are_structlogs_own(self, capture: Capture, level: str, traced: bool) -> None:
        configure(capture)
        quick = line_logger("embedserve.access")
        assert isinstance(quick, LineLogger)
        context = SpanContext(int(TRACE, 16), int(SPAN, 16), is_remote=False, trace_flags=TraceFlags(1))
        token = current_span_context.set(context if traced else None)
        try:
            getattr(quick, level)("rpc", **self.FIELDS)
            getattr(structlog.get_logger("embedserve.access"), level)("rpc", **self.FIELDS)
        finally:
            current_span_context.reset(token)

        ours, theirs = capture.lines
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", ours["timestamp"])
        assert list(ours) == list(theirs)
        assert {**ours, "timestamp": 0} == {**theirs, "timestamp": 0}
        assert len(ours["tenant"]) < VALUE_CHARS_MAX + 50
        assert ("trace_id" in ours) is traced

    @pytest.mark.parametrize("status", ["OK", "INTERNAL"])
    def test_a_line_that_is_made_later_says_what_was_so_at_the_calls_end(
        self, capture: Capture, monkeypatch: pytest.MonkeyPatch, status: str
    ) -> None:
        configure(capture)
        context = SpanContext(int(TRACE, 16), int(SPAN, 16), is_remote=False, trace_flags=TraceFlags(1))
        call = CallEnd(EMBED, status, 1_500_000, None, "ipv4:1:2", {"texts": 1, "tenant": "x" * 3000}, 7, context)
        held: list[Callable[[], bytes]] = []
        quick = line_logger("embedserve.access")
        monkeypatch.setattr(quick, "_hold", held.append)
        before = datetime.now(UTC)
        CallLog(quick, "all", 1.0)(call)
        after = datetime.now(UTC)
        token = current_span_context.set(None)
        try:
            late = orjson.loads(held[0]())
        finally:
            current_span_context.reset(token)
        CallLog(structlog.get_logger("embedserve.access").bind(), "all", 1.0)(call)
        (at_once,) = capture.lines

        assert before <= datetime.fromisoformat(late.pop("timestamp")) <= after
        assert (late.pop("trace_id"), late.pop("span_id"), late.pop("trace_flags")) == (TRACE, SPAN, "01")
        assert {**late, "timestamp": 0} == {**at_once, "timestamp": 0}

    @pytest.mark.parametrize(
        ("levels", "written"),
        [({}, ["info", "warning"]), ({"embedserve_access": "warning"}, ["warning"]), ({"embedserve": "error"}, [])],
    )
    def test_they_keep_to_their_loggers_level(
        self, capture: Capture, levels: dict[str, str], written: list[str]
    ) -> None:
        configure(capture, **levels)
        quick = line_logger("embedserve.access")
        quick.info("rpc")
        quick.warning("rpc")

        assert [line["level"] for line in capture.lines] == written

    def test_other_forms_and_lines_that_go_elsewhere_too_take_the_ordinary_way(self, capture: Capture) -> None:
        forwarded: list[Mapping[str, Any]] = []
        configure_logs(level="info", levels={}, form="console", stream=capture.text)
        line_logger("embedserve.access").info("rpc", method="M/Embed")
        configure_logs(level="info", levels={}, form="json", stream=capture.text, forward=forwarded.append)
        line_logger("embedserve.access").info("rpc", method="M/Embed")

        assert [line["method"] for line in forwarded] == ["M/Embed"]
        assert b"M/Embed" in capture.raw.getvalue().splitlines()[0]


class TestProcess:
    """Which of several processes wrote a line."""

    def test_every_way_of_writing_says_it(self, capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        """From any thread: a library's has no context of ours."""
        monkeypatch.setattr(logs, "_process", {})
        logs.name_process("frontend-1")
        configure(capture)

        def write() -> None:
            line_logger("embedserve.access").info("rpc")
            structlog.get_logger("embedserve.app").info("served")
            logging.getLogger("foreign").warning("late")

        write()
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        assert [line["event"] for line in capture.lines] == ["rpc", "served", "late"] * 2
        assert {line["process"] for line in capture.lines} == {"frontend-1"}

    def test_one_process_alone_says_nothing(self, capture: Capture) -> None:
        configure(capture)
        line_logger("embedserve.access").info("rpc")
        assert "process" not in capture.lines[0]
