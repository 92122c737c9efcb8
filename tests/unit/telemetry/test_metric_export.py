"""What is pushed over OTLP: our histograms beside the SDK's own figures, and how each push ended."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.metrics import Histogram as SdkHistogram
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    MetricExporter,
    MetricExportResult,
    MetricsData,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from embedserve.telemetry import instruments as table
from embedserve.telemetry.histograms import HistogramProducer, ProducingExporter
from embedserve.telemetry.instruments import Instruments


class _Keeping(MetricExporter):
    def __init__(self, temporality: AggregationTemporality) -> None:
        super().__init__({SdkHistogram: temporality})
        self.sent: list[MetricsData] = []
        self.result = MetricExportResult.SUCCESS

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: object) -> MetricExportResult:
        self.sent.append(metrics_data)
        return self.result

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: object) -> None:
        pass


def exporter_of(keeping: _Keeping, instruments: Instruments) -> ProducingExporter:
    outcomes = instruments.counter(table.METRIC_EXPORTS)
    return ProducingExporter(keeping, HistogramProducer(instruments), Resource({}), InstrumentationScope("t"), outcomes)


class TestExport:
    def test_each_push_is_counted_by_what_became_of_it(self) -> None:
        instruments = Instruments()
        keeping = _Keeping(AggregationTemporality.CUMULATIVE)
        exporter = exporter_of(keeping, instruments)

        exporter.export(MetricsData([]))
        keeping.result = MetricExportResult.FAILURE
        exporter.export(MetricsData([]))
        exporter.export(MetricsData([]))

        outcomes = instruments.counter(table.METRIC_EXPORTS)
        assert (outcomes.cell("exported").value, outcomes.cell("failed").value) == (1, 2)

    @pytest.mark.parametrize(
        ("temporality", "counts"), [(AggregationTemporality.CUMULATIVE, [1, 3]), (AggregationTemporality.DELTA, [1, 2])]
    )
    def test_histograms_go_out_in_the_temporality_that_the_exporter_prefers(
        self, temporality: AggregationTemporality, counts: list[int]
    ) -> None:
        instruments = Instruments()
        keeping = _Keeping(temporality)
        exporter = exporter_of(keeping, instruments)
        cell = instruments.histogram(table.TOKENIZER_WAIT).cell()

        cell.observe(0.5)
        exporter.export(MetricsData([]))
        cell.observe(0.5)
        cell.observe(0.5)
        exporter.export(MetricsData([]))

        found = []
        for data in keeping.sent:
            metrics = data.resource_metrics[-1].scope_metrics[0].metrics
            (metric,) = [metric for metric in metrics if metric.name == table.TOKENIZER_WAIT.name]
            assert isinstance(metric.data, Histogram)
            assert temporality is metric.data.aggregation_temporality
            found.append(sum(point.count for point in metric.data.data_points))
        assert counts == found
