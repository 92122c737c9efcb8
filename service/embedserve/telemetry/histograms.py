"""Our histograms as OpenTelemetry's data, for the readers that collect the SDK's own.

Decides how tallies join what the SDK collects. Must never know a wire format. The specification's MetricProducer is the
place for this; the Python SDK has none (1.45), so that each reader adds these metrics itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from opentelemetry.sdk.metrics import Histogram as SdkHistogram
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from embedserve.telemetry.instruments import INSTRUMENTS, Instruments, Kind
from embedserve.telemetry.semconv import SCHEMA_URL
from embedserve.telemetry.tally import CounterTally

__all__ = ["HistogramProducer", "ProducingExporter"]


class HistogramProducer:
    """Gives every histogram of the table as one metric with cumulative points. Thread-safe."""

    def __init__(self, instruments: Instruments) -> None:
        """Read ``instruments``."""
        self._instruments = instruments

    def produce(self) -> list[Metric]:
        """All histograms now, those without a measurement included."""
        now_ns = time.time_ns()
        return [
            Metric(
                instrument.name,
                instrument.description,
                instrument.unit,
                Histogram(
                    [cell.point(now_ns) for cell in self._instruments.histogram(instrument).cells()],
                    AggregationTemporality.CUMULATIVE,
                ),
            )
            for instrument in INSTRUMENTS
            if instrument.kind is Kind.HISTOGRAM
        ]


class ProducingExporter(MetricExporter):
    """Adds our histograms to what another exporter sends, in the temporality that it prefers."""

    def __init__(
        self,
        exporter: MetricExporter,
        producer: HistogramProducer,
        resource: Resource,
        scope: InstrumentationScope,
        outcomes: CounterTally,
    ) -> None:
        """Wrap ``exporter``; ``outcomes`` counts what becomes of each push, exported or failed."""
        temporality = exporter._preferred_temporality or {}  # noqa: SLF001 - what its own reader reads
        super().__init__(temporality, exporter._preferred_aggregation)  # noqa: SLF001
        self._exporter = exporter
        self._producer = producer
        self._resource = resource
        self._scope = scope
        self._exported = outcomes.cell("exported")
        self._failed = outcomes.cell("failed")
        self._delta = temporality.get(SdkHistogram) is AggregationTemporality.DELTA
        self._sent: dict[tuple[str, frozenset[tuple[str, object]]], HistogramDataPoint] = {}

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: object) -> MetricExportResult:
        """Export ``metrics_data`` and the histograms in one request."""
        metrics = self._producer.produce()
        if self._delta:
            metrics = [self._since_last(metric) for metric in metrics]
        together = self._together(metrics_data, metrics)
        result = self._exporter.export(together, timeout_millis=timeout_millis, **kwargs)
        (self._exported if result is MetricExportResult.SUCCESS else self._failed).value += 1
        return result

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Ask the wrapped exporter."""
        return self._exporter.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: object) -> None:
        """Shut the wrapped exporter down."""
        self._exporter.shutdown(timeout_millis=timeout_millis, **kwargs)

    def _together(self, collected: MetricsData, metrics: list[Metric]) -> MetricsData:
        """``metrics`` among the SDK's own of our scope: the OTLP encoder keeps one entry a scope."""
        scopes: list[ScopeMetrics] = []
        for resource in collected.resource_metrics:
            for scope in resource.scope_metrics:
                if scope.scope == self._scope:
                    metrics = [*scope.metrics, *metrics]
                else:
                    scopes.append(scope)
        scopes.append(ScopeMetrics(self._scope, metrics, SCHEMA_URL))
        return MetricsData([ResourceMetrics(self._resource, scopes, self._resource.schema_url)])

    def _since_last(self, metric: Metric) -> Metric:
        points: list[HistogramDataPoint] = []
        for point in metric.data.data_points:
            assert isinstance(point, HistogramDataPoint)
            key = (metric.name, frozenset((point.attributes or {}).items()))
            before = self._sent.get(key)
            self._sent[key] = point
            points.append(point if before is None else _difference(point, before))
        return replace(metric, data=Histogram([p for p in points if p.count], AggregationTemporality.DELTA))


def _difference(point: HistogramDataPoint, before: HistogramDataPoint) -> HistogramDataPoint:
    counts: Sequence[int] = [now - then for now, then in zip(point.bucket_counts, before.bucket_counts, strict=True)]
    return replace(
        point,
        start_time_unix_nano=before.time_unix_nano,
        count=point.count - before.count,
        sum=point.sum - before.sum,
        bucket_counts=counts,
        exemplars=[e for e in point.exemplars if e.time_unix_nano > before.time_unix_nano],
    )
