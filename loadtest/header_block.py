"""Header blocks of an HTTP/2 peer that was told to keep no dynamic table.

Decides how a block becomes fields: by hand where all is literal, as gRPC servers write it, and by ``hpack`` where a
proxy has packed it with Huffman's code. Must never know a call. Source: RFC 7541.
"""

from __future__ import annotations

from typing import Final

import hpack

__all__ = ["fields_of", "literal"]

STATUS_FIELDS: Final = {8: b"200", 9: b"204", 10: b"206", 11: b"304", 12: b"400", 13: b"404", 14: b"500"}
"""``:status`` in the static table; the other entries of it are of no interest."""
STATIC_ENTRIES: Final = 61


def literal(name: str, value: str) -> bytes:
    """A field that enters no table."""
    return b"\x00" + _string(name.encode()) + _string(value.encode())


def _string(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes([len(text)]) + text
    size, rest = bytearray([127]), len(text) - 127
    while rest >= 128:
        size.append(rest % 128 + 128)
        rest //= 128
    return bytes(size) + bytes([rest]) + text


def fields_of(block: bytes) -> dict[bytes, bytes]:
    """Name and value of every field that has a literal name, and ``:status``. ``ValueError`` when it is not a block."""
    try:
        plain = _plain(block)
    except IndexError:
        raise ValueError("a header block ends within a field") from None
    return _packed(block) if plain is None else plain


def _plain(block: bytes) -> dict[bytes, bytes] | None:
    """The same without Huffman's code; ``None`` where there is some."""
    found, at, end = {}, 0, len(block)
    while at < end:
        first = block[at]
        if first & 0x80:  # a whole field of the static table
            index, at = _integer(block, at, 7)
            if index in STATUS_FIELDS:
                found[b":status"] = STATUS_FIELDS[index]
            elif index > STATIC_ENTRIES:
                raise ValueError("a header block refers to a table that was refused")
            continue
        if first & 0xE0 == 0x20:  # a new size of the table, which can only be 0
            _, at = _integer(block, at, 5)
            continue
        index, at = _integer(block, at, 6 if first & 0x40 else 4)
        name = b":status" if index in STATUS_FIELDS else b""
        if not index:
            if block[at] & 0x80:
                return None
            size, at = _integer(block, at, 7)
            name, at = block[at : at + size], at + size
        if block[at] & 0x80:
            return None
        size, at = _integer(block, at, 7)
        if name:
            found[name] = block[at : at + size]
        at += size
    return found


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """A number that begins in the lowest ``bits`` of a byte, and the place after it."""
    most = (1 << bits) - 1
    value = block[at] & most
    at += 1
    if value < most:
        return value, at
    shift = 0
    while True:
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _packed(block: bytes) -> dict[bytes, bytes]:
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 0
    decoder.header_table_size = 0
    try:
        return {bytes(name): bytes(value) for name, value in decoder.decode(block, raw=True)}
    except hpack.HPACKError as error:
        raise ValueError(f"not a header block: {error}") from None
