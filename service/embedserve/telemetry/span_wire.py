"""Spans as OTLP's bytes.

Decides how a span is written (opentelemetry-proto 1.x, ``trace.proto``). Must never know where it goes. The library's
encoder makes a message object for every attribute, 17 us a span; joining bytes takes 1 us. Both give the same message,
which ``tests/unit/telemetry/test_span_wire.py`` holds to arbitrary spans.

What protobuf lets one choose is chosen for speed: fields come in the order in which spans of one call share most.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import partial
from typing import Final

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, TraceState

from embedserve.telemetry.attribute_wire import CACHED_MAX, AttributeEncoder, field
from embedserve.telemetry.chain_wire import ChainLayout
from embedserve.telemetry.span_chain import Chain, ChainForm
from embedserve.telemetry.span_data import INTERNAL, LinkData, SpanData
from embedserve.telemetry.span_tree import SpanTree
from embedserve.varint import varint

__all__ = ["SpanEncoder"]

_IDS: Final = struct.Struct("<2s16s2s8s")
_TIMES: Final = struct.Struct("<cQcQ")
_BELOW: Final = struct.Struct("<2s16s2s8s6s2s2s")
_OWN: Final = struct.Struct("<8scQcQ")
_LINK: Final = struct.Struct("<2s16s2s8s5s")
_NO_FLAGS: Final = b"\x85\x01\x00\x01\x00\x00"
_REMOTE_FLAGS: Final = b"\x85\x01\x00\x03\x00\x00"
"""Span.flags, field 16: whether the parent is remote is known (0x100), and that it is (0x200)."""
_LINK_FLAGS: Final = {False: b"\x35\x00\x01\x00\x00", True: b"\x35\x00\x03\x00\x00"}


class SpanEncoder:
    """Writes spans of one resource and scope. For one thread."""

    def __init__(self, resource: Resource, scope: InstrumentationScope) -> None:
        """Every request begins with ``resource`` and ``scope``."""
        (like,) = encode_spans(
            [ReadableSpan(name="", context=_NOBODY, resource=resource, instrumentation_scope=scope)]
        ).resource_spans
        (own,) = like.scope_spans
        self._resource = field(1, like.resource.SerializeToString())
        self._resource_end = field(3, like.schema_url.encode()) if like.schema_url else b""
        self._scope = field(1, own.scope.SerializeToString())
        self._scope_end = field(3, own.schema_url.encode()) if own.schema_url else b""
        self._heads: dict[tuple[str, int], bytes] = {}
        self._layouts: dict[ChainForm, ChainLayout] = {}
        self._own = AttributeEncoder(b"\x4a")
        self._of_links = AttributeEncoder(b"\x22")

    def request(self, trees: Sequence[bytes]) -> bytes:
        """An ``ExportTraceServiceRequest`` of encoded trees, copied once: it may be half a megabyte."""
        scoped = len(self._scope) + sum(map(len, trees)) + len(self._scope_end)
        opened = self._resource + b"\x12" + varint(scoped)
        whole = len(opened) + scoped + len(self._resource_end)
        return b"".join((b"\x0a", varint(whole), opened, self._scope, *trees, self._scope_end, self._resource_end))

    def tree(self, tree: SpanTree) -> bytes:
        """The spans of ``tree``, each a field of ``ScopeSpans``."""
        root, children = tree.root, tree.children
        first = self.span(root)
        parts = [b"\x12", varint(len(first)), first]
        if children:
            # Trace, parent, flags and status: the same below one span.
            shared = _BELOW.pack(
                b"\x0a\x10", root.trace_id.to_bytes(16), b"\x22\x08", root.span_id.to_bytes(8), _NO_FLAGS, b"\x7a\x00",
                b"\x12\x08",
            )  # fmt: skip
            if type(children) is not Chain or root.trace_state or not self._chain(tree, children, shared, parts):
                self._each(tree, shared, parts)
        return b"".join(parts)

    def _chain(self, tree: SpanTree, chain: Chain, shared: bytes, parts: list[bytes]) -> bool:
        """All children at once, if they fit."""
        form = chain.form
        layout = self._layouts.get(form)
        if layout is None:
            layout = self._layouts[form] = ChainLayout(form, partial(self._head, kind=INTERNAL), self._own)
        attributes: list[bytes] = []
        self._own.write(chain.attributes, attributes)
        links: list[bytes] = []
        self._links(chain.links, tree.links_max, links)
        return layout.write(chain, tree.ids, shared, b"".join(attributes), b"".join(links), parts)

    def _each(self, tree: SpanTree, shared: bytes, parts: list[bytes]) -> None:
        """The children one by one. ``shared`` ends with the beginning of an id."""
        if tree.root.trace_state:
            shared = field(3, _state(tree.root.trace_state)) + shared
        own_size = len(shared) + _OWN.size
        ids, at = tree.ids, 0
        for name, begin_ns, end_ns, attributes, links in tree.children:
            head = self._heads.get((name, INTERNAL)) or self._head(name, INTERNAL)
            own = _OWN.pack(ids[at : at + 8], b"\x39", begin_ns, b"\x41", end_ns)
            at += 8
            if attributes or links:
                more: list[bytes] = []
                self._own.write(attributes, more)
                self._links(links, tree.links_max, more)
                rest = b"".join(more)
                parts += (b"\x12", varint(own_size + len(head) + len(rest)), shared, own, head, rest)
            else:
                parts += (b"\x12", varint(own_size + len(head)), shared, own, head)

    def span(self, span: SpanData) -> bytes:
        """A ``Span``."""
        head = self._heads.get((span.name, span.kind)) or self._head(span.name, span.kind)
        parts = [
            _IDS.pack(b"\x0a\x10", span.trace_id.to_bytes(16), b"\x12\x08", span.span_id.to_bytes(8)),
            head,
            _TIMES.pack(b"\x39", span.begin_ns, b"\x41", span.end_ns),
            _REMOTE_FLAGS if span.parent_is_remote else _NO_FLAGS,
        ]
        if span.parent_id:
            parts += (b"\x22\x08", span.parent_id.to_bytes(8))
        if span.trace_state:
            parts.append(field(3, _state(span.trace_state)))
        if span.shared:
            self._own.write(span.shared, parts)
        if span.attributes:
            self._own.write(span.attributes, parts)
        self._links(span.links, len(span.links), parts)
        if span.dropped_links:
            parts += (b"\x70", varint(span.dropped_links))
        # An empty Status is UNSET.
        parts.append(b"\x7a\x00" if span.error is None else field(15, field(2, span.error.encode()) + b"\x18\x02"))
        return b"".join(parts)

    def _head(self, name: str, kind: int) -> bytes:
        """Name and kind, of which there are few."""
        head = field(5, name.encode()) + b"\x30" + varint(kind)
        if len(self._heads) < CACHED_MAX:
            self._heads[name, kind] = head
        return head

    def _links(self, links: Sequence[LinkData], most: int, parts: list[bytes]) -> None:
        for link in links[:most] if len(links) > most else links:
            context, attributes = link
            own: list[bytes] = []
            self._of_links.write(attributes, own)
            raw = own[0] if len(own) == 1 else b"".join(own)
            ids = _LINK.pack(
                b"\x0a\x10", context.trace_id.to_bytes(16), b"\x12\x08", context.span_id.to_bytes(8),
                _LINK_FLAGS[context.is_remote],
            )  # fmt: skip
            parts += (b"\x6a", varint(_LINK.size + len(raw)), ids, raw)
        if len(links) > most:
            parts += (b"\x70", varint(len(links) - most))


_NOBODY: Final = SpanContext(1, 1, False)


def _state(state: TraceState) -> bytes:
    return state.to_header().encode("ascii", "replace")
