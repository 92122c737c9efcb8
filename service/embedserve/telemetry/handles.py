"""Handles of traces as bytes, so that spans of one process can link to those of another.

Decides what of a span's context crosses: its ids and flags. Must never know who sends them.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from opentelemetry.trace import SpanContext, TraceFlags

__all__ = ["SpanHandles"]

_HANDLE: Final = Struct(">16s8sB")


class SpanHandles:
    """Meets ``frontends.marks.Traces``."""

    def pack(self, trace: object) -> bytes:
        """The ids and flags of a ``SpanContext``, 25 bytes."""
        assert isinstance(trace, SpanContext)
        return _HANDLE.pack(trace.trace_id.to_bytes(16), trace.span_id.to_bytes(8), trace.trace_flags)

    def unpack(self, packed: bytes) -> SpanContext:
        """What ``pack`` was given."""
        trace_id, span_id, flags = _HANDLE.unpack(packed)
        return SpanContext(
            int.from_bytes(trace_id), int.from_bytes(span_id), is_remote=False, trace_flags=TraceFlags(flags)
        )
