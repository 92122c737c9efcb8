"""Spans as OTLP's bytes.

Decides how a span is written (opentelemetry-proto 1.x, ``trace.proto``). Must never know where it goes. The library's
encoder makes a message object for every attribute, 17 us a span; joining bytes takes 2 us. Both give the same message,
which ``tests/unit/telemetry/test_span_wire.py`` holds to arbitrary spans.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, TraceState

from embedserve.telemetry.span_data import ATTRIBUTE_CHARS_MAX, LinkData, SpanData, Value

__all__ = ["SpanEncoder"]

_IDS: Final = struct.Struct("<2s16s2s8s")
_TIMES: Final = struct.Struct("<cQcQ")
_DOUBLE: Final = struct.Struct("<d")
_NO_FLAGS: Final = b"\x85\x01\x00\x01\x00\x00"
_REMOTE_FLAGS: Final = b"\x85\x01\x00\x03\x00\x00"
"""Span.flags, field 16: whether the parent is remote is known (0x100), and that it is (0x200)."""
_LINK_FLAGS: Final = {False: b"\x35\x00\x01\x00\x00", True: b"\x35\x00\x03\x00\x00"}
_CACHED_MAX: Final = 2048
"""Encoded attributes that are kept: their values are few, such as a model's name, but callers choose some of them."""


class SpanEncoder:
    """Writes spans of one resource and scope. For one thread."""

    def __init__(self, resource: Resource, scope: InstrumentationScope) -> None:
        """Every request begins with ``resource`` and ``scope``."""
        (like,) = encode_spans(
            [ReadableSpan(name="", context=_NOBODY, resource=resource, instrumentation_scope=scope)]
        ).resource_spans
        (own,) = like.scope_spans
        self._resource = _field(1, like.resource.SerializeToString())
        self._resource_end = _field(3, like.schema_url.encode()) if like.schema_url else b""
        self._scope = _field(1, own.scope.SerializeToString())
        self._scope_end = _field(3, own.schema_url.encode()) if own.schema_url else b""
        self._strings: dict[tuple[str, str], bytes] = {}
        self._keys: dict[str, bytes] = {}
        self._heads: dict[tuple[str, int], bytes] = {}

    def request(self, spans: Iterable[bytes]) -> bytes:
        """An ``ExportTraceServiceRequest`` of encoded spans."""
        encoded = [self._scope]
        for raw in spans:
            encoded += (b"\x12", _varint(len(raw)), raw)
        encoded.append(self._scope_end)
        return _field(1, self._resource + _field(2, b"".join(encoded)) + self._resource_end)

    def span(self, span: SpanData) -> bytes:
        """A ``Span``."""
        head = self._heads.get((span.name, span.kind))
        if head is None:
            head = _field(5, span.name.encode()) + b"\x30" + _varint(span.kind)
            if len(self._heads) < _CACHED_MAX:
                self._heads[span.name, span.kind] = head
        parts = [
            _IDS.pack(b"\x0a\x10", span.trace_id.to_bytes(16, "big"), b"\x12\x08", span.span_id.to_bytes(8, "big")),
            head,
            _TIMES.pack(b"\x39", span.begin_ns, b"\x41", span.end_ns),
            _REMOTE_FLAGS if span.parent_is_remote else _NO_FLAGS,
        ]
        if span.parent_id:
            parts += (b"\x22\x08", span.parent_id.to_bytes(8, "big"))
        if span.trace_state:
            parts.append(_field(3, _state(span.trace_state)))
        if span.attributes:
            self._attributes(b"\x4a", span.attributes, parts)
        for link in span.links:
            raw = self._link(link)
            parts += (b"\x6a", _varint(len(raw)), raw)
        if span.dropped_links:
            parts += (b"\x70", _varint(span.dropped_links))
        # An empty Status is UNSET.
        parts.append(b"\x7a\x00" if span.error is None else _field(15, _field(2, span.error.encode()) + b"\x18\x02"))
        return b"".join(parts)

    def _link(self, link: LinkData) -> bytes:
        context = link.context
        parts = [
            _IDS.pack(
                b"\x0a\x10", context.trace_id.to_bytes(16, "big"), b"\x12\x08", context.span_id.to_bytes(8, "big")
            ),
            _LINK_FLAGS[context.is_remote],
        ]
        self._attributes(b"\x22", link.attributes, parts)
        return b"".join(parts)

    def _attributes(self, tag: bytes, attributes: Mapping[str, Value], parts: list[bytes]) -> None:
        for key, value in attributes.items():
            # The commonest first, and exactly: a bool is an int too.
            kind = type(value)
            if kind is str:
                raw = self._string(key, value)  # type: ignore[arg-type]
            elif kind is int and 0 <= value < _SMALL:  # type: ignore[operator]
                raw = self._key(key) + _SMALL_INTS[value]  # type: ignore[index]
            else:
                raw = self._key(key) + _sized(b"\x12", _any(value))
            parts += (tag, _varint(len(raw)), raw)

    def _string(self, key: str, value: str) -> bytes:
        raw = self._strings.get((key, value))
        if raw is None:
            raw = self._key(key) + _sized(b"\x12", _any(value))
            if len(self._strings) >= _CACHED_MAX:
                self._strings.clear()
            self._strings[key, value] = raw
        return raw

    def _key(self, key: str) -> bytes:
        raw = self._keys.get(key)
        if raw is None:
            raw = _field(1, key.encode())
            if len(self._keys) < _CACHED_MAX:
                self._keys[key] = raw
        return raw


_NOBODY: Final = SpanContext(1, 1, False)


def _any(value: Value) -> bytes:
    """An ``AnyValue``."""
    if isinstance(value, str):
        # A lone surrogate cannot be UTF-8, and a wrong byte would cost the whole request.
        return _field(1, value[:ATTRIBUTE_CHARS_MAX].encode("utf-8", "replace"))
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + _varint(value & 0xFFFFFFFFFFFFFFFF)
    if isinstance(value, float):
        return b"\x21" + _DOUBLE.pack(value)
    return _field(5, b"".join(_field(1, _any(item)) for item in value))


def _state(state: TraceState) -> bytes:
    return state.to_header().encode("ascii", "replace")


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _sized(tag: bytes, content: bytes) -> bytes:
    return tag + _varint(len(content)) + content


_VARINTS: Final[Sequence[bytes]] = tuple(
    bytes([n]) if n < 0x80 else bytes([n & 0x7F | 0x80, n >> 7]) for n in range(1 << 12)
)


_SMALL: Final = 1 << 12
_SMALL_INTS: Final[Sequence[bytes]] = tuple(bytes([0x12, 1 + len(raw), 0x18]) + raw for raw in _VARINTS)
"""``KeyValue.value`` of small numbers, which most attributes are."""


def _varint(number: int) -> bytes:
    if number < _SMALL:
        return _VARINTS[number]
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
