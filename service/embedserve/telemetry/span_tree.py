"""A span with all that hangs below it, with ids and on the wall clock.

Decides ids, the wall clock and what is cut. Must never know which spans there are (``spans``) or how one is encoded
(``span_wire``).
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from opentelemetry.trace import SpanContext

from embedserve.telemetry.span_chain import Chain
from embedserve.telemetry.span_data import (
    INTERNAL,
    NO_ATTRIBUTES,
    NONE_SHARED,
    Child,
    LinkData,
    SharedAttributes,
    SpanData,
    Value,
)

__all__ = ["SpanFactory", "SpanTree"]


class SpanTree(NamedTuple):
    """A span and all that hangs directly below it."""

    root: SpanData
    children: Sequence[Child] | Chain
    ids: bytes
    """8 a child."""
    links_max: int

    @property
    def links(self) -> int:
        """Of all its spans, some left out of account: they are a bound for the size of a request."""
        children = self.children
        below = len(children.links) if type(children) is Chain else sum([len(child[4]) for child in children])
        return len(self.root.links) + below

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

    def tree(self, root: SpanData, children: Sequence[Child] | Chain) -> SpanTree:
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
        shared: SharedAttributes = NONE_SHARED,
    ) -> SpanData:
        """A finished span; times are monotonic nanoseconds."""
        dropped = max(0, len(links) - self.links_max)
        parent_id, remote = (0, False) if parent is None else (parent.span_id, parent.is_remote)
        offset = self.offset_ns
        return SpanData(
            context.trace_id, context.span_id, parent_id, remote, context.trace_state, name, kind, begin_ns + offset,
            end_ns + offset, attributes, links[: self.links_max] if dropped else links, dropped, error, shared,
        )  # fmt: skip
