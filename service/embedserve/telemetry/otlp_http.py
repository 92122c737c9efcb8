"""OTLP over HTTP: OpenTelemetry's exporters, given bytes.

Decides nothing: endpoint, certificates, headers, compression and retries are the library's, as ``OTEL_EXPORTER_OTLP_*``
say. Must never know what is sent.
"""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

__all__ = ["HttpSpans"]


class HttpSpans(OTLPSpanExporter):
    """Sends requests that are encoded already."""

    def send(self, request: bytes, spans: int) -> bool:  # noqa: ARG002
        """Send ``request``; whether it was taken. Retries for as long as its timeout."""
        return not self._shutdown and bool(self._client.export(request).success)
