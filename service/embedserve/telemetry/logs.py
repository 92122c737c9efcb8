"""Log lines: JSON for machines, colours for people, always on standard error.

Decides the form of a line, which level each logger has, and what may never stand in one. Must never know what is
logged. Standard output belongs to the ready line and the CLI. Lines of our own go through structlog without the
standard library (6 us instead of 23); lines of grpc, asyncio, transformers and the like come in through one
``ProcessorFormatter`` and look the same.

Nothing that a caller sent stands in a log: values under the names in ``REDACTED`` are blanked, anything that is not a
plain value is shown as its type, and tracebacks carry no local variables (structlog's own default does, and they hold
texts and vectors).
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, BinaryIO, Final, TextIO, cast

import orjson
import structlog
from opentelemetry.trace import SpanContext
from structlog.processors import ExceptionRenderer
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

from embedserve.telemetry.log_stream import Line, LogStream
from embedserve.telemetry.settings import LogFormat
from embedserve.telemetry.tracing import current_span_context

__all__ = ["REDACTED", "Forward", "LineLogger", "configure_logs", "flush_lines", "line_logger", "name_process"]

Forward = Callable[[Mapping[str, Any]], None]

REDACTED: Final = frozenset(
    {
        "api_key", "authorization", "cookie", "credentials", "embedding", "embeddings", "password", "prompt", "secret",
        "text", "texts", "token", "token_ids", "vector", "vectors",
    }
)  # fmt: skip
"""Keys whose value is never written. Counts of texts and tokens have other names (``text_count``, ``tokens``)."""
VALUE_CHARS_MAX: Final = 2048
"""Of one string in a line; the rest is cut, with a sign that it was."""
HOLD_S: Final = 0.01
"""How long lines of which there is one a call are gathered. A process that is killed loses that much of them."""
_PLAIN: Final = (str, int, float, bool, type(None))


class NamedLogger:
    """A logger that knows its name: what ``structlog.get_logger(__name__)`` gives once logs are configured.

    Not structlog's own: that one holds a lock while it writes, and the stream may have something to log itself.
    """

    def __init__(self, stream: LogStream | BinaryIO, name: str = "") -> None:
        """Write to ``stream``, which is safe to use from any thread."""
        self._stream = stream
        self.name = name

    def msg(self, line: bytes) -> None:
        """Write a line that is rendered and has no newline yet."""
        self._stream.write(line + b"\n")
        self._stream.flush()

    debug = info = warning = error = critical = msg


class LineLogger:
    """Writes the lines of which there is one a call: the same lines as structlog's, for a third of the time.

    For JSON alone, and for fields whose names and values are known to be plain: nothing is redacted.
    """

    def __init__(self, stream: LogStream | BinaryIO, name: str, level: int) -> None:
        """Lines below ``level`` are dropped."""
        self._stream = stream
        self._name = name
        self._level = level

    def info(self, event: str, **fields: object) -> None:
        """Write a line at info."""
        if self._level <= logging.INFO:
            self._write(event, "info", fields)

    def warning(self, event: str, **fields: object) -> None:
        """Write a line at warning."""
        if self._level <= logging.WARNING:
            self._write(event, "warning", fields)

    def later(self, event: str, level: str, make: Callable[[], dict[str, object]], context: SpanContext | None) -> None:
        """Write a line whose fields are made when it goes out, with others; ``context`` is whose line it is."""
        if self._level > _number(level):
            return
        self._hold(partial(self._made, event, level, make, context, time.time()))

    def _write(self, event: str, level: str, fields: dict[str, object]) -> None:
        self._hold(self._made(event, level, lambda: fields, current_span_context.get(), time.time()))

    def _made(
        self,
        event: str,
        level: str,
        make: Callable[[], dict[str, object]],
        context: SpanContext | None,
        at_s: float,
    ) -> bytes:
        fields = make()
        for key, value in fields.items():
            if type(value) is str and len(value) > VALUE_CHARS_MAX:
                fields[key] = _safe(value)
        fields["event"] = event
        fields["logger"] = self._name
        fields.update(_process)
        if context is not None:
            _name_trace(context, fields)
        fields["level"] = level
        fields["timestamp"] = datetime.fromtimestamp(at_s, UTC).isoformat(timespec="microseconds")[:-6] + "Z"
        return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)

    def _hold(self, line: Line) -> None:
        stream = self._stream
        if not isinstance(stream, LogStream):
            stream.write(line if isinstance(line, bytes) else line())
        elif stream.hold(line):
            try:
                asyncio.get_running_loop().call_later(HOLD_S, stream.flush)
            except RuntimeError:  # no event loop runs here
                stream.flush()


class _Text:
    """A stream of text over one of bytes, for the standard library's handler, which writes a whole line at once."""

    def __init__(self, stream: LogStream | BinaryIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text.encode("utf-8", "backslashreplace"))

    def flush(self) -> None:
        self._stream.flush()


_line_target: tuple[LogStream | BinaryIO, _LevelByLogger] | None = None
"""Where ``LineLogger`` writes; ``None`` where lines have another form, or go somewhere else too."""


_process: dict[str, str] = {}
"""What every line says of this process. Not a context variable: threads of libraries have none of ours."""


def name_process(role: str) -> None:
    """Say in every line from now on which of several processes wrote it."""
    _process["process"] = role


def flush_lines() -> None:
    """Write what ``line_logger``'s lines still wait for: before the process ends."""
    if _line_target is not None:
        _line_target[0].flush()


def line_logger(name: str) -> Any:
    """A logger with ``info`` and ``warning`` for very many lines: the fast one where logs are plain JSON."""
    if _line_target is None:
        return structlog.get_logger(name).bind()
    stream, levels = _line_target
    return LineLogger(stream, name, levels.level(name))


def configure_logs(
    *,
    level: str,
    levels: Mapping[str, str],
    form: LogFormat,
    stream: TextIO | None = None,
    forward: Forward | None = None,
) -> LogStream | None:
    """Set up structlog and the standard library's root logger, replacing what was there.

    ``levels`` maps a logger's name to its level, for it and all below it. ``stream`` defaults to standard error.
    ``forward`` is given every line that is written, as it is written but for an exception, whose frames are a list.
    Returns what lines go through, where they go to a descriptor: it counts them.
    """
    out = stream or sys.stderr
    target = _target(out)
    on_terminal = out is not None and out.isatty()
    console = form == "console" or (form == "auto" and on_terminal)
    by_logger = {name: _number(word) for name, word in levels.items()}
    lowest = min(_number(level), *by_logger.values()) if by_logger else _number(level)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_process,
        _add_trace,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _redact,
    ]
    forwarding: list[Processor] = [] if forward is None else [_Forwarding(forward)]
    levels_by_logger = _LevelByLogger(_number(level), by_logger)
    global _line_target  # noqa: PLW0603 - as structlog's own configuration is
    _line_target = None if console or forward is not None else (target, levels_by_logger)
    structlog.configure(
        processors=[
            levels_by_logger,
            *shared,
            *forwarding,
            _exceptions(console=console),
            _render(console=console, colors=on_terminal, as_bytes=True),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(lowest),
        logger_factory=lambda *name: NamedLogger(target, *name),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(_Text(target))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _foreign_name, *forwarding],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _exceptions(console=console),
                _render(console=console, colors=on_terminal, as_bytes=False),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_number(level))
    for name, number in by_logger.items():
        logging.getLogger(name).setLevel(number)
    logging.captureWarnings(capture=True)
    return target if isinstance(target, LogStream) else None


class _Forwarding:
    """Gives a copy of each line to somebody else, without what the formatter has put beside it."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._render_exception = _exceptions(console=False)

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        copy = {key: value for key, value in event.items() if key not in {"_record", "_from_structlog"}}
        self._forward(cast("EventDict", self._render_exception(logger, method, copy)))
        return event


class _LevelByLogger:
    """Drops what is below its logger's level. structlog itself filters by one level only."""

    def __init__(self, default: int, levels: Mapping[str, int]) -> None:
        self._default = default
        self._levels = dict(levels)

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        name = getattr(logger, "name", "")
        if name:
            event["logger"] = name
        if logging.getLevelNamesMapping().get(method.upper(), logging.ERROR) < self.level(name):
            raise structlog.DropEvent
        return event

    def level(self, name: str) -> int:
        """The number of the lowest level that ``name`` writes."""
        while name and self._levels:
            if name in self._levels:
                return self._levels[name]
            name = name.rpartition(".")[0]
        return self._default


def _add_process(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event.update(_process)
    return event


def _add_trace(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The ids of OpenTelemetry's log data model, where the line belongs to a call with a trace."""
    context = current_span_context.get()
    if context is not None:
        _name_trace(context, event)
    return event


def _name_trace(context: SpanContext, event: MutableMapping[str, Any]) -> None:
    event["trace_id"] = f"{context.trace_id:032x}"
    event["span_id"] = f"{context.span_id:016x}"
    event["trace_flags"] = f"{context.trace_flags:02x}"


def _redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if key.lower() in REDACTED:
            event[key] = "[redacted]"
        elif key not in {"exc_info", "_record", "_from_structlog"}:
            event[key] = _safe(value)
    return event


def _safe(value: object) -> object:
    if isinstance(value, str) and len(value) > VALUE_CHARS_MAX:
        return f"{value[:VALUE_CHARS_MAX]}... ({len(value)} characters)"
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(key): "[redacted]" if str(key).lower() in REDACTED else _safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and len(value) <= 16 and all(isinstance(item, _PLAIN) for item in value):
        return [_safe(item) for item in value]
    return f"<{type(value).__name__}>"


def _foreign_name(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event["logger"] = event["_record"].name
    return event


def _exceptions(*, console: bool) -> Processor:
    if console:
        return lambda _logger, _method, event: event  # ConsoleRenderer formats exceptions itself
    return ExceptionRenderer(ExceptionDictTransformer(show_locals=False))


def _render(*, console: bool, colors: bool, as_bytes: bool) -> Processor:
    if console:
        renderer = structlog.dev.ConsoleRenderer(
            colors=colors, exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
        )
        return _encoded(renderer) if as_bytes else cast("Processor", renderer)
    serialise: Callable[..., str | bytes] = _json if as_bytes else _json_text
    return structlog.processors.JSONRenderer(serializer=serialise)


def _encoded(renderer: Callable[[WrappedLogger, str, EventDict], str]) -> Processor:
    return lambda logger, method, event: renderer(logger, method, event).encode()


def _json(event: Mapping[str, object], **_: object) -> bytes:
    return orjson.dumps(event, default=lambda value: f"<{type(value).__name__}>", option=orjson.OPT_NON_STR_KEYS)


def _json_text(event: Mapping[str, object], **_: object) -> str:
    return _json(event).decode()


def _number(word: str) -> int:
    return logging.getLevelNamesMapping()[word.upper()]


def _target(stream: TextIO | None) -> LogStream | BinaryIO:
    """Where bytes go: never waited for where there is a descriptor, as it is where there is none."""
    if stream is None:  # standard error was closed before we came
        return LogStream(None)
    try:
        descriptor = stream.fileno()
    except (OSError, AttributeError):
        return stream.buffer
    return LogStream(descriptor, _tell_of_loss)


def _tell_of_loss(lines: int) -> None:
    log = structlog.get_logger("embedserve.log")
    log.warning("log_lines_dropped", lines=lines)
