"""The caller's trace context, out of a call's metadata.

Decides what of the metadata is believed. Must never know sampling or spans. W3C Trace Context is what gRPC clients send
as ``traceparent`` and ``tracestate``; ``OTEL_PROPAGATORS`` may add others that are installed. What cannot be read
counts as absent, as the recommendation asks: a wrong header never fails a call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from opentelemetry.context import Context
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.trace import SpanContext, get_current_span

from embedserve.errors import ConfigError

__all__ = ["FORCE_KEY", "Propagation", "asks_for_a_trace", "load_propagator"]

FORCE_KEY: Final = "x-force-trace"
"""The metadata by which a caller asks for a trace of one call, where ``telemetry.force_trace`` lets it."""

HEADER_CHARS_MAX: Final = 512
"""Longest header that is looked at: what the recommendation says must be carried of a tracestate, and nine times a
traceparent. Longer ones are left out here, because the SDK would log a warning for each: a caller could fill the log
with them.
"""


def asks_for_a_trace(metadata: Sequence[tuple[str, str | bytes]]) -> bool:
    """Whether the caller has sent ``x-force-trace: 1``."""
    return any(key == FORCE_KEY and value == "1" for key, value in metadata)


def load_propagator() -> TextMapPropagator:
    """Load the propagators that ``OTEL_PROPAGATORS`` names. Raises ``ConfigError`` for one that is not installed.

    To be called before anything else of OpenTelemetry's instrumentation is imported, which would raise on its own.
    """
    try:
        from opentelemetry import propagate  # noqa: PLC0415 - reads the variable when it is imported, and raises
    except ValueError as error:
        raise ConfigError([f"OTEL_PROPAGATORS = {os.environ.get('OTEL_PROPAGATORS')}: {error}"]) from error
    return propagate.get_global_textmap()


class Propagation:
    """Reads trace context with the propagators that the process has."""

    def __init__(self) -> None:
        """Take the propagators that ``OTEL_PROPAGATORS`` names (default ``tracecontext,baggage``)."""
        self._propagator = load_propagator()
        # Baggage carries no identity, and we keep none of it: alone it is not worth a look.
        self._fields = frozenset(self._propagator.fields) - {"baggage"}

    def extract(self, metadata: Sequence[tuple[str, str | bytes]]) -> SpanContext | None:
        """The caller's span, or ``None`` when there is none that can be believed."""
        fields = self._fields
        for pair in metadata:  # any() over a generator costs three times as much
            if pair[0] in fields:
                break
        else:
            return None
        carrier: dict[str, list[str]] = {}
        for key, value in metadata:
            if key in fields and isinstance(value, str) and len(value) <= HEADER_CHARS_MAX:
                carrier.setdefault(key, []).append(value)
        if len(carrier.get("traceparent", ())) > 1:
            return None  # sent twice: nobody can say which is meant
        context = get_current_span(self._propagator.extract(carrier, Context())).get_span_context()
        return context if context.is_valid else None
