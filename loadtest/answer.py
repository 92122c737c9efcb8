"""How one gRPC call ended, and the messages that came.

Decides which statuses have a name here, and how messages are cut out of a stream of bytes. Must never know HTTP/2 or a
load.
"""

from __future__ import annotations

__all__ = [
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "OK",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "UNKNOWN",
    "Answer",
]

OK, CANCELLED, UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE = 0, 1, 2, 4, 8, 13, 14
"""gRPC's statuses that somebody here asks for."""


class Answer:
    """How one call ended."""

    __slots__ = ("code", "details", "first_at", "parts", "pushback_ms")

    def __init__(self) -> None:
        """Nothing has come yet."""
        self.code = UNKNOWN
        self.pushback_ms = float("nan")
        self.details = b""
        """``google.rpc.Status``, serialised; empty where there is none."""
        self.first_at = 0.0
        """``time.monotonic`` when the first message began to come in; 0 without one."""
        self.parts: list[bytes] = []
        """What came in DATA frames."""

    def messages(self) -> list[bytes]:
        """Every message, serialised. ``ValueError`` when one is compressed or cut."""
        body = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        found, at = [], 0
        while at < len(body):
            end = at + 5 + int.from_bytes(body[at + 1 : at + 5], "big")
            if body[at] or end > len(body):
                raise ValueError("a message is compressed or incomplete")
            found.append(body[at + 5 : end])
            at = end
        return found
