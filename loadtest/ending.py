"""What the end of a call on HTTP/2 means to gRPC: its status, and what the server says with it.

Decides which status a header block, a reset or a proxy's HTTP status is. Must never know a connection: whoever has read
the bytes, in Python or in C++, asks here. Sources: gRPC over HTTP/2, RFC 9113; of HTTP statuses gRPC's
http-grpc-status-mapping.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

from loadtest.answer import CANCELLED, INTERNAL, RESOURCE_EXHAUSTED, UNAVAILABLE, UNKNOWN, Answer
from loadtest.header_block import fields_of

__all__ = ["GOOD", "code_of_reset", "is_good", "read_ending"]

OF_RESET: Final = {0: INTERNAL, 7: UNAVAILABLE, 8: CANCELLED, 11: RESOURCE_EXHAUSTED}
"""gRPC's status of an HTTP/2 reset code; INTERNAL of the others."""
OF_HTTP: Final = {b"400": INTERNAL, b"401": 16, b"403": 7, b"404": 12} | dict.fromkeys(
    (b"429", b"502", b"503", b"504"), UNAVAILABLE
)
"""gRPC's status of an HTTP one that came from a proxy; UNKNOWN of the others."""
GOOD: Final = b"\x0bgrpc-status\x010"
"""The whole of a good ending: a literal name and one digit. Everything else is read field by field."""
_GOOD: Final = re.compile(re.escape(GOOD) + rb"(?!\d)")


def is_good(block: bytes) -> bool:
    """Whether the last header block of a call says OK as servers write it."""
    return _GOOD.search(block) is not None


def code_of_reset(code: int) -> int:
    """What a stream that was reset with an HTTP/2 code is to gRPC."""
    return OF_RESET.get(code, INTERNAL)


def read_ending(answer: Answer, block: bytes, head: bytes = b"") -> None:
    """Fill in what the last header block of a call says; ``head`` is its first one where that was no plain 200."""
    try:
        fields = fields_of(block)
        http_status = fields.get(b":status") or (fields_of(head).get(b":status", b"") if head else b"")
    except ValueError:
        answer.code = INTERNAL
        return
    status = fields.get(b"grpc-status", b"")
    answer.code = int(status) if status.isdigit() else OF_HTTP.get(http_status, UNKNOWN)
    pushback = fields.get(b"grpc-retry-pushback-ms", b"")
    if pushback.removeprefix(b"-").isdigit():
        answer.pushback_ms = float(pushback)
    details = fields.get(b"grpc-status-details-bin", b"")
    try:
        answer.details = base64.b64decode(details + b"=" * (-len(details) % 4))
    except binascii.Error:
        answer.details = b""
