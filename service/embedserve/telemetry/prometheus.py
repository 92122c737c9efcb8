"""The metrics as text, for a Prometheus that scrapes.

Decides names, labels, exemplars and the content type. Must never know HTTP: the operations port calls ``render``. Not
the stock ``opentelemetry-exporter-prometheus``, which drops exemplars and puts three ``otel_scope_*`` labels on every
series; the text itself is written by prometheus_client.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from opentelemetry.sdk.metrics.export import (
    Gauge,
    Histogram,
    HistogramDataPoint,
    InMemoryMetricReader,
    Metric,
    NumberDataPoint,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from embedserve.telemetry.histograms import HistogramProducer
from embedserve.telemetry.instruments import Kind, prometheus_label, prometheus_name

__all__ = ["PrometheusRenderer"]

_NS_PER_S = 1e9


class PrometheusRenderer:
    """Renders all metrics of this process. ``reader`` is registered with the MeterProvider at wiring."""

    def __init__(self, producer: HistogramProducer, resource: Resource) -> None:
        """``producer`` gives the histograms, ``reader`` all the rest."""
        self.reader = InMemoryMetricReader()
        self._producer = producer
        self._resource = resource
        self._lock = threading.Lock()

    def render(self, accept_header: str) -> tuple[str, bytes]:
        """Content type and body: OpenMetrics, with exemplars, where ``accept_header`` asks for it, else text.

        Takes some milliseconds; may be called from any thread, and concurrent calls take turns.
        """
        encode, content_type = choose_encoder(accept_header)
        with self._lock:
            return content_type, encode(self)

    def collect(self) -> Iterator[Family]:
        """One family a metric: the collector protocol of prometheus_client."""
        info = GaugeMetricFamily("target_info", "Target metadata", labels=[])
        info.add_sample("target_info", {prometheus_label(k): str(v) for k, v in self._resource.attributes.items()}, 1)
        yield info
        for metric in self._metrics():
            yield _family(metric)

    def _metrics(self) -> Iterable[Metric]:
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                yield from scope.metrics
        yield from self._producer.produce()


def _family(metric: Metric) -> Family:
    data = metric.data
    if isinstance(data, Histogram):
        return _histogram(metric, data.data_points)
    if isinstance(data, Sum) and data.is_monotonic:
        name = prometheus_name(metric.name, metric.unit or "", Kind.COUNTER)
        family: Family = CounterMetricFamily(name, metric.description or "")
        return _numbers(family, name, data.data_points)
    # An exponential histogram has no classic form; we make none; a foreign one is left out, not shown wrongly.
    points = data.data_points if isinstance(data, Gauge | Sum) else ()
    name = prometheus_name(metric.name, metric.unit or "", Kind.GAUGE)
    return _numbers(GaugeMetricFamily(name, metric.description or ""), name, points)


def _numbers(family: Family, name: str, points: Iterable[NumberDataPoint]) -> Family:
    for point in points:
        labels = {prometheus_label(key): str(value) for key, value in (point.attributes or {}).items()}
        family.add_sample(name, labels, point.value)
    return family


def _histogram(metric: Metric, points: Iterable[HistogramDataPoint]) -> Family:
    name = prometheus_name(metric.name, metric.unit or "", Kind.HISTOGRAM)
    family = HistogramMetricFamily(name, metric.description or "")
    bucket_name, count_name, sum_name = f"{name}_bucket", f"{name}_count", f"{name}_sum"
    for point in points:
        labels = {prometheus_label(key): str(value) for key, value in (point.attributes or {}).items()}
        exemplars = _exemplars(point)
        bounds = [*map(floatToGoString, point.explicit_bounds), "+Inf"]
        below = 0
        for index, (bound, count) in enumerate(zip(bounds, point.bucket_counts, strict=True)):
            below += count
            family.add_sample(bucket_name, {**labels, "le": bound}, below, None, exemplars.get(index))
        family.add_sample(count_name, labels, point.count)
        family.add_sample(sum_name, labels, point.sum)
    return family


def _exemplars(point: HistogramDataPoint) -> dict[int, Exemplar]:
    found: dict[int, Exemplar] = {}
    for exemplar in point.exemplars:
        if exemplar.trace_id is None or exemplar.span_id is None:
            continue
        index = sum(1 for bound in point.explicit_bounds if bound < exemplar.value)
        labels = {"trace_id": f"{exemplar.trace_id:032x}", "span_id": f"{exemplar.span_id:016x}"}
        found[index] = Exemplar(labels, float(exemplar.value), exemplar.time_unix_nano / _NS_PER_S)
    return found
