"""What a span holds, before anybody has decided how to write it down.

Decides ids, the wall clock and what is cut. Must never know which spans there are (``spans``) or how one is encoded
(``span_wire``). OpenTelemetry's own ReadableSpan costs 13 us to make and 17 us to encode, and a call that is sampled
has eight: so what hangs below a call's span is a plain tuple each, and shares what is the same for all of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from opentelemetry.trace import SpanContext, TraceState

__all__ = [
    "INTERNAL",
    "NO_ATTRIBUTES",
    "SERVER",
    "Child",
    "LinkData",
    "SharedAttributes",
    "SpanData",
    "SpanFactory",
    "SpanTree",
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


_NONE_SHARED: Final = SharedAttributes({})


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
    shared: SharedAttributes = _NONE_SHARED
    """More attributes, with names of their own."""


Child = tuple[str, int, int, Mapping[str, Value], Sequence[LinkData]]
"""An INTERNAL span below another: name, begin and end on the wall clock, attributes, links."""


class SpanTree(NamedTuple):
    """A span and all that hangs directly below it."""

    root: SpanData
    children: Sequence[Child]
    ids: bytes
    """8 a child."""
    links_max: int

    @property
    def links(self) -> int:
        """Of all its spans, some left out of account: they are a bound for the size of a request."""
        return len(self.root.links) + sum([len(child[4]) for child in self.children])

    def spans(self) -> list[SpanData]:
        """Each span by itself."""
        root, found = self.root, [self.root]
        for number, (name, begin_ns, end_ns, attributes, links) in enumerate(self.children):
            own_id = int.from_bytes(self.ids[8 * number : 8 * number + 8])
            dropped = max(0, len(links) - self.links_max)
            found.append(
                SpanData(
                    root.trace_id, own_id, root.span_id, False, root.trace_state, name, INTERNAL, begin_ns, end_ns,
                    attributes, links[: self.links_max] if dropped else links, dropped, None,
                )
            )  # fmt: skip
        return found


class SpanFactory:
    """Gives spans their ids and puts them on the wall clock. For one thread."""

    def __init__(self, *, links_max: int) -> None:
        """``links_max`` links on one span; the first are kept, and how many were not is told."""
        self.links_max = links_max
        self._random = random.Random()  # noqa: S311 - ids must differ, not be secret
        self.offset_ns = 0
        """From the monotonic to the wall clock."""
        self.set_clock()

    def set_clock(self) -> None:
        """Take the wall clock's distance from the monotonic one: before each export, since it may be stepped."""
        self.offset_ns = time.time_ns() - time.monotonic_ns()

    def tree(self, root: SpanData, children: Sequence[Child]) -> SpanTree:
        """``root`` with spans below it, whose times are ``offset_ns`` ahead of the monotonic clock."""
        size = len(children)
        return SpanTree(root, children, self._random.getrandbits(64 * size).to_bytes(8 * size), self.links_max)

    def span(
        self,
        context: SpanContext,
        parent: SpanContext | None,
        name: str,
        begin_ns: int,
        end_ns: int,
        *,
        kind: int = INTERNAL,
        attributes: Mapping[str, Value] = NO_ATTRIBUTES,
        links: Sequence[LinkData] = (),
        error: str | None = None,
        shared: SharedAttributes = _NONE_SHARED,
    ) -> SpanData:
        """A finished span; times are monotonic nanoseconds."""
        dropped = max(0, len(links) - self.links_max)
        parent_id, remote = (0, False) if parent is None else (parent.span_id, parent.is_remote)
        offset = self.offset_ns
        return SpanData(
            context.trace_id, context.span_id, parent_id, remote, context.trace_state, name, kind, begin_ns + offset,
            end_ns + offset, attributes, links[: self.links_max] if dropped else links, dropped, error, shared,
        )  # fmt: skip
