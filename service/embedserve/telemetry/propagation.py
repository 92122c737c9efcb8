"""The caller's trace context, out of a call's metadata.

Decides what of the metadata is believed. Must never know sampling or spans. W3C Trace Context is what gRPC clients send
as ``traceparent`` and ``tracestate``; ``OTEL_PROPAGATORS`` may add others that are installed. What cannot be read
counts as absent, as the recommendation asks: a wrong header never fails a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext, get_current_span

__all__ = ["Propagation"]

HEADER_CHARS_MAX: Final = 512
"""Longest header that is looked at: what the recommendation says must be carried of a tracestate, and nine times a
traceparent. Longer ones are left out here, because the SDK would log a warning for each: a caller could fill the log
with them.
"""


class Propagation:
    """Reads trace context with the propagators that the process has."""

    def __init__(self) -> None:
        """Take the propagators that ``OTEL_PROPAGATORS`` names (default ``tracecontext,baggage``)."""
        self._propagator = propagate.get_global_textmap()
        # Baggage carries no identity, and we keep none of it: alone it is not worth a look.
        self._fields = frozenset(self._propagator.fields) - {"baggage"}

    def extract(self, metadata: Sequence[tuple[str, str | bytes]]) -> SpanContext | None:
        """The caller's span, or ``None`` when there is none that can be believed."""
        fields = self._fields
        if not any(pair[0] in fields for pair in metadata):
            return None
        carrier: dict[str, list[str]] = {}
        for key, value in metadata:
            if key in fields and isinstance(value, str) and len(value) <= HEADER_CHARS_MAX:
                carrier.setdefault(key, []).append(value)
        if len(carrier.get("traceparent", ())) > 1:
            return None  # sent twice: nobody can say which is meant
        context = get_current_span(self._propagator.extract(carrier, Context())).get_span_context()
        return context if context.is_valid else None
