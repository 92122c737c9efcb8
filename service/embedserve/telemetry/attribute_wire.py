"""Attributes as OTLP's bytes.

Decides how a ``KeyValue`` is written (opentelemetry-proto 1.x, ``common.proto``), and which of them are kept encoded.
Must never know which attributes there are.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from embedserve.telemetry.span_data import ATTRIBUTE_CHARS_MAX, SharedAttributes, Value
from embedserve.varint import ONE_BYTE_END, TWO_BYTES_END, VARINTS, varint

__all__ = ["CACHED_MAX", "AttributeEncoder", "field"]

CACHED_MAX: Final = 2048
"""Encoded attributes that are kept: their values are few, such as a model's name, but callers choose some of them."""
_DOUBLE: Final = struct.Struct("<d")


class AttributeEncoder:
    """Writes attributes of one kind of message. For one thread."""

    def __init__(self, tag: bytes) -> None:
        """``tag`` is that of the attributes' field."""
        self._tag = tag
        self._strings: dict[tuple[str, str], bytes] = {}
        self._keys: dict[str, tuple[bytes, bytes, bytes, bytes]] = {}

    def write(self, attributes: Mapping[str, Value], parts: list[bytes]) -> None:
        """Add ``attributes`` to ``parts``."""
        if type(attributes) is SharedAttributes:
            parts.append(attributes.written.get(self._tag) or self._shared(attributes))
            return
        for key, value in attributes.items():
            # The commonest first, and exactly: a bool is an int too.
            kind = type(value)
            if kind is str:
                parts.append(self._strings.get((key, value)) or self._string(key, value))  # type: ignore[arg-type]
                continue
            name, short, two_bytes, double = self._keys.get(key) or self._key(key)
            if kind is int and 0 <= value < TWO_BYTES_END:  # type: ignore[operator]
                parts += (short if value < ONE_BYTE_END else two_bytes, VARINTS[value])  # type: ignore[operator, index]
            elif kind is float:
                parts += (double, _DOUBLE.pack(value))
            else:
                parts.append(_sized(self._tag, name + _sized(b"\x12", _any(value))))

    def _shared(self, attributes: SharedAttributes) -> bytes:
        parts: list[bytes] = []
        self.write(dict(attributes), parts)
        raw = attributes.written[self._tag] = b"".join(parts)
        return raw

    def _string(self, key: str, value: str) -> bytes:
        raw = _sized(self._tag, field(1, key.encode()) + _sized(b"\x12", _any(value)))
        if len(self._strings) >= CACHED_MAX:
            self._strings.clear()
        self._strings[key, value] = raw
        return raw

    def _key(self, key: str) -> tuple[bytes, bytes, bytes, bytes]:
        """The key's field, and all that comes before a number of one byte, of two, and before a double."""
        name = field(1, key.encode())
        found = (
            name,
            self._tag + varint(len(name) + 4) + name + b"\x12\x02\x18",
            self._tag + varint(len(name) + 5) + name + b"\x12\x03\x18",
            self._tag + varint(len(name) + 11) + name + b"\x12\x09\x21",
        )
        if len(self._keys) < CACHED_MAX:
            self._keys[key] = found
        return found


def _any(value: Value) -> bytes:
    """An ``AnyValue``."""
    if isinstance(value, str):
        # A lone surrogate cannot be UTF-8, and a wrong byte would cost the whole request.
        return field(1, value[:ATTRIBUTE_CHARS_MAX].encode("utf-8", "replace"))
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + varint(value & 0xFFFFFFFFFFFFFFFF)
    if isinstance(value, float):
        return b"\x21" + _DOUBLE.pack(value)
    return field(5, b"".join(field(1, _any(item)) for item in value))


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def _sized(tag: bytes, content: bytes) -> bytes:
    return tag + varint(len(content)) + content
