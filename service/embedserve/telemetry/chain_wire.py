"""Chains of spans as OTLP's bytes, all spans of one at once.

Decides how a chain is written: ids and times into a layout that is made once for its form. Must never know which forms
there are, nor what else a request holds (``span_wire``). Seven spans cost 3 us so, and 9 us one by one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

from embedserve.telemetry.attribute_wire import AttributeEncoder
from embedserve.telemetry.span_chain import Chain, ChainForm
from embedserve.varint import varint

__all__ = ["ChainLayout"]

_ARGUMENTS: Final = 7
"""Of a span in the layout: tag and size, what all share, id, name and the like, begin, a tag, end."""
_SHARED_BYTES: Final = 38
_OWN_BYTES: Final = 8 + 8 + 1 + 8
_TWO_BYTES: Final = range(1 << 7, 1 << 14)
"""Sizes that take two bytes, as those of spans with attributes of their own do: the layout has room for no other."""


class ChainLayout:
    """The bytes of one form, with room for what differs."""

    def __init__(self, form: ChainForm, head: Callable[[str], bytes], attributes: AttributeEncoder) -> None:
        """``head`` gives the fields of a span's name and kind."""
        count = len(form.names)
        formats: list[str] = []
        self._arguments: list[Any] = []
        self._varied: list[tuple[int, int, int, bool]] = []
        at = 0
        for place, (name, shared) in enumerate(zip(form.names, form.shared, strict=True)):
            static: list[bytes] = [head(name)]
            varies = place in (form.attributed, form.linked)
            if place != form.attributed:
                attributes.write(shared, static)
            tail = b"".join(static) + b"\x39"
            size = _SHARED_BYTES + len(tail) + _OWN_BYTES
            begins = b"\x12" + (b"\0\0" if varies else varint(size))
            formats.append(f"{len(begins)}s{_SHARED_BYTES}s8s{len(tail)}sQcQ")
            self._arguments += (begins, b"", b"", tail, 0, b"\x41", 0)
            at += len(begins) + size
            if varies:
                self._varied.append((place, size, at, place == form.linked))
        self._fill = struct.Struct("<" + "".join(formats)).pack
        self._ids = struct.Struct("8s" * count).unpack
        self._count = count

    def write(
        self, chain: Chain, ids: bytes, shared: bytes, attributes: bytes, links: bytes, parts: list[bytes]
    ) -> bool:
        """Add the spans of ``chain`` to ``parts``, each a field of ``ScopeSpans``; ``False`` where they do not fit.

        ``shared`` is trace, parent, flags, status and the beginning of an id; ``attributes`` and ``links`` are those
        that the chain has of its own, written.
        """
        arguments = self._arguments.copy()
        arguments[1::_ARGUMENTS] = [shared] * self._count
        arguments[2::_ARGUMENTS] = self._ids(ids)
        arguments[4::_ARGUMENTS] = chain.borders[:-1]
        arguments[6::_ARGUMENTS] = chain.borders[1:]
        for place, size, _, has_links in self._varied:
            whole = size + len(links if has_links else attributes)
            if whole not in _TWO_BYTES:
                return False
            arguments[place * _ARGUMENTS] = b"\x12" + varint(whole)
        raw = self._fill(*arguments)
        begin = 0
        for _, _, end, has_links in self._varied:
            parts += (raw[begin:end], links if has_links else attributes)
            begin = end
        parts.append(raw[begin:])
        return True
