"""What a span holds, before anybody has decided how to write it down.

Decides its fields. Must never know which spans there are (``spans``), where ids and times come from (``span_tree``) or
how one is encoded (``span_wire``). OpenTelemetry's own ReadableSpan costs 13 us to make and 17 us to encode, and a call
that is sampled has eight: so what hangs below a call's span is a plain tuple each, or a part of a chain
(``span_chain``), and shares what is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from opentelemetry.trace import SpanContext, TraceState

__all__ = [
    "INTERNAL",
    "NONE_SHARED",
    "NO_ATTRIBUTES",
    "SERVER",
    "Child",
    "LinkData",
    "SharedAttributes",
    "SpanData",
    "Value",
]

ATTRIBUTE_CHARS_MAX: Final = 256
"""Of a string in a span; a caller names the model, and could name it with a megabyte."""

INTERNAL: Final = 1
SERVER: Final = 2
"""Span kinds, by OTLP's numbers."""

Value = str | bool | int | float | list[str]

NO_ATTRIBUTES: Final[Mapping[str, Value]] = {}


class SharedAttributes(dict[str, Value]):
    """Attributes that many spans share, the same object each time: whoever writes them down may keep that here."""

    __slots__ = ("written",)

    def __init__(self, attributes: Mapping[str, Value]) -> None:
        """Must not be changed any more."""
        super().__init__(attributes)
        self.written: dict[bytes, bytes] = {}


NONE_SHARED: Final = SharedAttributes({})


class LinkData(NamedTuple):
    """A link to another span."""

    context: SpanContext
    attributes: Mapping[str, Value]


class SpanData(NamedTuple):
    """A span that has ended. Times are nanoseconds of the wall clock."""

    trace_id: int
    span_id: int
    parent_id: int
    """0 for a root."""
    parent_is_remote: bool
    trace_state: TraceState | None
    name: str
    kind: int
    begin_ns: int
    end_ns: int
    attributes: Mapping[str, Value]
    links: Sequence[LinkData]
    dropped_links: int
    error: str | None
    """What makes it an error; ``None`` where it is none."""
    shared: SharedAttributes = NONE_SHARED
    """More attributes, with names of their own."""


Child = tuple[str, int, int, Mapping[str, Value], Sequence[LinkData]]
"""An INTERNAL span below another: name, begin and end on the wall clock, attributes, links."""
