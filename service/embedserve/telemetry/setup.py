"""Telemetry of one process: built once, told of the engine's load, shut down in bounded time.

Decides what runs for given settings and environment, and that what is off costs nothing. Must never know the rest of
the service: the composition root hands the observers to the core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from embedserve.api.observer import CallObserver, SilentCallObserver
from embedserve.engine.observer import EngineObserver, SilentObserver
from embedserve.model.backend import ModelIdentity
from embedserve.telemetry import exporters
from embedserve.telemetry import instruments as table
from embedserve.telemetry.call_log import CallLog, ShedLog
from embedserve.telemetry.gauges import Gauges
from embedserve.telemetry.histograms import HistogramProducer, ProducingExporter
from embedserve.telemetry.instruments import Instruments
from embedserve.telemetry.load import LoadSource, SharedSnapshot
from embedserve.telemetry.log_stream import LogStream
from embedserve.telemetry.logs import configure_logs
from embedserve.telemetry.observers import TelemetryEngineObserver
from embedserve.telemetry.prometheus import PrometheusRenderer
from embedserve.telemetry.propagation import load_propagator
from embedserve.telemetry.semconv import SCHEMA_URL
from embedserve.telemetry.settings import TelemetrySettings
from embedserve.telemetry.span_data import SpanFactory
from embedserve.telemetry.span_queue import SpanQueue, SpanQueueLimits
from embedserve.telemetry.tracing import RequestTracer

__all__ = ["Telemetry", "setup_telemetry"]

RenderMetrics = Callable[[str], tuple[str, bytes]]


class Telemetry:
    """What the composition root wires."""

    def __init__(
        self,
        *,
        engine_observer: EngineObserver,
        call_observer: CallObserver,
        render_metrics: RenderMetrics | None,
        snapshot: SharedSnapshot,
        gauges: Gauges | None,
        spans: SpanQueue | None,
        meters: MeterProvider | None,
        shed_log: ShedLog | None,
    ) -> None:
        """Made by ``setup_telemetry``."""
        self.engine_observer = engine_observer
        self.call_observer = call_observer
        self.render_metrics = render_metrics
        """``(accept_header) -> (content_type, body)``, from any thread; ``None`` when Prometheus is off."""
        self._snapshot = snapshot
        self._gauges = gauges
        self._spans = spans
        self._meters = meters
        self._shed_log = shed_log

    def register_load(self, source: LoadSource) -> None:
        """Ask ``source`` for the load at each scrape; it is called from a scraper's thread and must only read."""
        self._snapshot.register(source)

    def register_model(self, identity: ModelIdentity) -> None:
        """Show ``identity`` in ``embedserve.model.info``, once the model is loaded."""
        if self._gauges is not None:
            self._gauges.show_model(identity)

    def shutdown(self, timeout_s: float) -> bool:
        """Send what waits, within ``timeout_s`` whatever the collector does; whether all of it was sent. Blocks."""
        ends = time.monotonic() + timeout_s
        if self._shed_log is not None:
            self._shed_log.flush()
        done = threading.Event()
        if self._meters is None:
            done.set()
        else:
            # Beside the spans, not after them: a dead collector must not cost its time twice.
            threading.Thread(target=_stop_meters, args=(self._meters, timeout_s, done), daemon=True).start()
        sent = self._spans.close(timeout_s) if self._spans is not None else True
        return done.wait(max(0.0, ends - time.monotonic())) and sent


def setup_telemetry(settings: TelemetrySettings) -> Telemetry:
    """Configure logs, and build what ``settings`` and the ``OTEL_*`` variables ask for.

    Raises ``ConfigError`` when a variable has a value that is not known.
    """
    lines = configure_logs(level=settings.log_level, levels=settings.log_levels, form=settings.log_format)
    load_propagator()
    _unpatch_stock_interceptor()
    log_call = None
    if settings.log_requests != "off":
        log_call = CallLog(
            structlog.get_logger("embedserve.access").bind(), settings.log_requests, settings.log_requests_ratio
        )
    disabled = exporters.sdk_disabled()
    resource = exporters.resource(settings)
    scope = InstrumentationScope("embedserve", settings.service_version, SCHEMA_URL)
    sampler = None if disabled else exporters.sampler(settings)
    limits = SpanQueueLimits() if disabled else SpanQueueLimits.from_environment()
    sender = None if disabled else exporters.span_sender(resource, scope)
    metric_exporter = None if disabled else exporters.metric_exporter()
    prometheus = settings.prometheus_enabled and not disabled
    snapshot = SharedSnapshot()
    if sender is None and metric_exporter is None and not prometheus and log_call is None:
        return Telemetry(
            engine_observer=SilentObserver(), call_observer=SilentCallObserver(), render_metrics=None,
            snapshot=snapshot, gauges=None, spans=None, meters=None, shed_log=None,
        )  # fmt: skip
    instruments = Instruments(settings.duration_buckets_s, settings.bucket_edges)
    producer = HistogramProducer(instruments)
    renderer = PrometheusRenderer(producer, resource) if prometheus else None
    readers: list[MetricReader] = [renderer.reader] if renderer is not None else []
    if metric_exporter is not None:
        pushes = instruments.counter(table.METRIC_EXPORTS)
        pushing = ProducingExporter(metric_exporter, producer, resource, scope, pushes)
        readers.append(PeriodicExportingMetricReader(pushing))
    meters = MeterProvider(readers, resource, shutdown_on_exit=False) if readers else None
    gauges = None
    if meters is not None:
        meter = meters.get_meter(scope.name, scope.version, scope.schema_url)
        gauges = Gauges(meter, instruments, snapshot, settings.bucket_edges, _line_counts(lines))
    spans = None
    if sender is not None:
        factory = SpanFactory(links_max=settings.span_links_max)
        spans = SpanQueue(sender, factory, instruments.counter(table.SPANS), limits)
    shed_log = ShedLog(structlog.get_logger("embedserve.admission").bind())
    return Telemetry(
        engine_observer=TelemetryEngineObserver(instruments, spans, shed_log, settings.bucket_edges),
        call_observer=RequestTracer(
            instruments,
            sampler=sampler if spans is not None else None,
            spans=spans,
            exemplars=exporters.exemplars_enabled(settings),
            log_call=log_call,
            force_trace=settings.force_trace,
        ),
        render_metrics=renderer.render if renderer is not None else None,
        snapshot=snapshot,
        gauges=gauges,
        spans=spans,
        meters=meters,
        shed_log=shed_log,
    )


def _line_counts(lines: LogStream | None) -> Callable[[], tuple[int, int]]:
    return lambda: (0, 0) if lines is None else (lines.lines_written, lines.lines_dropped)


def _stop_meters(meters: MeterProvider, timeout_s: float, done: threading.Event) -> None:
    meters.shutdown(timeout_millis=timeout_s * 1000)
    done.set()


def _unpatch_stock_interceptor() -> None:
    """Take ``opentelemetry-instrumentation-grpc`` off ``grpc.aio.server``, if a zero-code start has put it there."""
    from opentelemetry.instrumentation.grpc import GrpcAioInstrumentorServer  # noqa: PLC0415 - imports grpc's channel classes

    stock = GrpcAioInstrumentorServer()  # type: ignore[no-untyped-call]
    if stock.is_instrumented_by_opentelemetry:
        stock.uninstrument()
        structlog.get_logger(__name__).warning(
            "stock_interceptor_removed", why="it breaks health Watch and would make a second span of every call"
        )
