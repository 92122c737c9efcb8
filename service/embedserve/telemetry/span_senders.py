"""Who takes spans away: OTLP as bytes, or any of OpenTelemetry's span exporters.

Decides how spans become what an exporter takes. Must never know when they are sent (``span_queue``).
"""

from __future__ import annotations

from typing import Protocol

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from embedserve.telemetry.span_data import ATTRIBUTE_CHARS_MAX, SERVER, SpanData
from embedserve.telemetry.span_tree import SpanTree
from embedserve.telemetry.span_wire import SpanEncoder

__all__ = ["OtlpSender", "OtlpTransport", "ReadableSender", "SpanSender"]

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class SpanSender(Protocol):
    """Takes spans, and sends them when it is told to. For one thread, but for ``shutdown``."""

    def add(self, tree: SpanTree) -> None:
        """Make the spans of ``tree`` ready for the next ``send``."""

    def send(self) -> bool:
        """Send all that is ready; whether it was taken. May take seconds; what was not taken is gone."""

    def shutdown(self) -> None:
        """Send nothing more; wakes a ``send`` that waits for its collector."""


class OtlpTransport(Protocol):
    """``otlp_grpc`` or ``otlp_http``."""

    def send(self, request: bytes, spans: int) -> bool:
        """Send an encoded request."""

    def shutdown(self) -> None:
        """Close."""


class OtlpSender:
    """Sends OTLP."""

    def __init__(self, transport: OtlpTransport, resource: Resource, scope: InstrumentationScope) -> None:
        """Every span is one of ``resource`` and ``scope``."""
        self._transport = transport
        self._encoder = SpanEncoder(resource, scope)
        self._ready: list[bytes] = []
        self._spans = 0

    def add(self, tree: SpanTree) -> None:
        """Encode ``tree``."""
        self._ready.append(self._encoder.tree(tree))
        self._spans += 1 + len(tree.children)

    def send(self) -> bool:
        """See ``SpanSender``."""
        ready, spans = self._ready, self._spans
        self._ready, self._spans = [], 0
        return self._transport.send(self._encoder.request(ready), spans)

    def shutdown(self) -> None:
        """See ``SpanSender``."""
        self._transport.shutdown()


class ReadableSender:
    """Sends through an exporter that wants OpenTelemetry's own spans, such as the console's."""

    def __init__(self, exporter: SpanExporter, resource: Resource, scope: InstrumentationScope) -> None:
        """Every span is one of ``resource`` and ``scope``."""
        self._exporter = exporter
        self._resource = resource
        self._scope = scope
        self._ready: list[ReadableSpan] = []

    def add(self, tree: SpanTree) -> None:
        """Make OpenTelemetry's spans of ``tree``."""
        self._ready += [self._readable(span) for span in tree.spans()]

    def send(self) -> bool:
        """See ``SpanSender``."""
        ready, self._ready = self._ready, []
        return self._exporter.export(ready) is SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """See ``SpanSender``."""
        self._exporter.shutdown()

    def _readable(self, span: SpanData) -> ReadableSpan:
        parent = None
        if span.parent_id:
            parent = SpanContext(span.trace_id, span.parent_id, span.parent_is_remote, _SAMPLED, span.trace_state)
        attributes = BoundedAttributes(attributes={**span.shared, **span.attributes}, max_value_len=ATTRIBUTE_CHARS_MAX)
        return ReadableSpan(
            name=span.name,
            context=SpanContext(span.trace_id, span.span_id, False, _SAMPLED, span.trace_state),
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            links=[Link(link.context, dict(link.attributes)) for link in span.links],
            kind=SpanKind.SERVER if span.kind == SERVER else SpanKind.INTERNAL,
            status=Status(StatusCode.UNSET) if span.error is None else Status(StatusCode.ERROR, span.error),
            start_time=span.begin_ns,
            end_time=span.end_ns,
            instrumentation_scope=self._scope,
        )
