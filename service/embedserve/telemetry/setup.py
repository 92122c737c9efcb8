"""Telemetry of one process: built once, told of the engine's load, shut down in bounded time.

Decides what runs for given settings and environment, and that what is off costs nothing. Must never know the rest of
the service: the composition root hands the observers to the core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue

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
from embedserve.telemetry.log_queue import LogQueue, LogQueueLimits
from embedserve.telemetry.log_stream import LogStream
from embedserve.telemetry.logs import configure_logs, flush_lines, line_logger
from embedserve.telemetry.observers import TelemetryEngineObserver
from embedserve.telemetry.prometheus import PrometheusRenderer
from embedserve.telemetry.propagation import load_propagator
from embedserve.telemetry.semconv import SCHEMA_URL
from embedserve.telemetry.settings import TelemetrySettings
from embedserve.telemetry.span_queue import SpanQueue, SpanQueueLimits
from embedserve.telemetry.span_tree import SpanFactory
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
        log_records: LogQueue | None = None,
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
        self._log_records = log_records

    def register_load(self, source: LoadSource) -> None:
        """Ask ``source`` for the load at each scrape; it is called from a scraper's thread and must only read."""
        self._snapshot.register(source)

    def register_model(self, identity: ModelIdentity) -> None:
        """Show ``identity`` in ``embedserve.model.info``, once the model is loaded."""
        if self._gauges is not None:
            self._gauges.show_model(identity)

    def shutdown(self, timeout_s: float) -> bool:
        """Send what waits, within ``timeout_s`` whatever the collector does; whether all of it was sent. Blocks."""
        if self._shed_log is not None:
            self._shed_log.flush()
        flush_lines()
        # Beside each other, not in turn: a dead collector must not cost its time more than once.
        stops: list[Callable[[float], bool]] = []
        if self._meters is not None:
            stops.append(partial(_stop_meters, self._meters))
        stops += [queue.close for queue in (self._spans, self._log_records) if queue is not None]
        ends = time.monotonic() + timeout_s
        results: SimpleQueue[bool] = SimpleQueue()
        for stop in stops:
            threading.Thread(target=lambda stop=stop: results.put(stop(timeout_s)), daemon=True).start()
        try:
            told = [results.get(timeout=max(0.0, ends - time.monotonic())) for _ in stops]
        except Empty:
            return False
        return all(told)


def setup_telemetry(settings: TelemetrySettings) -> Telemetry:
    """Configure logs, and build what ``settings`` and the ``OTEL_*`` variables ask for.

    Raises ``ConfigError`` when a variable has a value that is not known.
    """
    load_propagator()
    parts = _Parts(settings)
    lines = configure_logs(
        level=settings.log_level,
        levels=settings.log_levels,
        form=settings.log_format,
        forward=parts.log_records.put if parts.log_records is not None else None,
    )
    _unpatch_stock_interceptor()
    log_call = _call_log(settings)
    snapshot = SharedSnapshot()
    if parts.nothing and log_call is None:
        return Telemetry(
            engine_observer=SilentObserver(), call_observer=SilentCallObserver(), render_metrics=None,
            snapshot=snapshot, gauges=None, spans=None, meters=None, shed_log=None,
        )  # fmt: skip
    instruments = parts.instruments
    renderer, meters = parts.meters()
    gauges = None
    if meters is not None:
        meter = meters.get_meter(parts.scope.name, parts.scope.version, parts.scope.schema_url)
        gauges = Gauges(
            meter,
            instruments,
            snapshot,
            settings.bucket_edges,
            _line_counts(lines),
            has_device=settings.has_device,
        )
    spans = parts.spans()
    shed_log = ShedLog(structlog.get_logger("embedserve.admission").bind())
    exemplars_kept = exporters.exemplars_enabled(settings)
    return Telemetry(
        engine_observer=TelemetryEngineObserver(
            instruments, spans, shed_log, settings.bucket_edges, exemplars=exemplars_kept
        ),
        call_observer=RequestTracer(
            instruments,
            sampler=parts.sampler if spans is not None else None,
            spans=spans,
            exemplars=exemplars_kept,
            log_call=log_call,
            force_trace=settings.force_trace,
        ),
        render_metrics=renderer.render if renderer is not None else None,
        snapshot=snapshot,
        gauges=gauges,
        spans=spans,
        meters=meters,
        shed_log=shed_log,
        log_records=parts.log_records,
    )


class _Parts:
    """What the environment asks for. All of it is read, and so refused, before a thread is started."""

    def __init__(self, settings: TelemetrySettings) -> None:
        disabled = exporters.sdk_disabled()
        self.instruments = Instruments(settings.duration_buckets_s, settings.bucket_edges)
        self.resource = exporters.resource(settings)
        self.scope = InstrumentationScope("embedserve", settings.service_version, SCHEMA_URL)
        self.sampler = None if disabled else exporters.sampler(settings)
        self._links_max = settings.span_links_max
        self._limits = SpanQueueLimits() if disabled else SpanQueueLimits.from_environment()
        self._sender = None if disabled else exporters.span_sender(self.resource, self.scope)
        self._pushed = None if disabled else exporters.metric_exporter()
        self._scraped = settings.prometheus_enabled and not disabled
        log_limits = LogQueueLimits() if disabled else LogQueueLimits.from_environment()
        log_exporter = None if disabled else exporters.log_exporter()
        self.log_records: LogQueue | None = None
        if log_exporter is not None:
            outcomes = self.instruments.counter(table.LOG_RECORDS)
            self.log_records = LogQueue(log_exporter, self.resource, self.scope, outcomes, log_limits)

    @property
    def nothing(self) -> bool:
        """Whether nothing leaves this process but lines on standard error."""
        return self._sender is None and self._pushed is None and not self._scraped and self.log_records is None

    def meters(self) -> tuple[PrometheusRenderer | None, MeterProvider | None]:
        """Who renders the metrics, and who collects them."""
        producer = HistogramProducer(self.instruments)
        renderer = PrometheusRenderer(producer, self.resource) if self._scraped else None
        readers: list[MetricReader] = [renderer.reader] if renderer is not None else []
        if self._pushed is not None:
            outcomes = self.instruments.counter(table.METRIC_EXPORTS)
            pushing = ProducingExporter(self._pushed, producer, self.resource, self.scope, outcomes)
            readers.append(PeriodicExportingMetricReader(pushing))
        return renderer, MeterProvider(readers, self.resource, shutdown_on_exit=False) if readers else None

    def spans(self) -> SpanQueue | None:
        """Where spans go."""
        if self._sender is None:
            return None
        factory = SpanFactory(links_max=self._links_max)
        return SpanQueue(self._sender, factory, self.instruments.counter(table.SPANS), self._limits)


def _call_log(settings: TelemetrySettings) -> CallLog | None:
    if settings.log_requests == "off":
        return None
    logger = line_logger("embedserve.access")
    return CallLog(logger, settings.log_requests, settings.log_requests_ratio)


def _line_counts(lines: LogStream | None) -> Callable[[], tuple[int, int]]:
    return lambda: (0, 0) if lines is None else (lines.lines_written, lines.lines_dropped)


def _stop_meters(meters: MeterProvider, timeout_s: float) -> bool:
    meters.shutdown(timeout_millis=timeout_s * 1000)
    return True


def _unpatch_stock_interceptor() -> None:
    """Take ``opentelemetry-instrumentation-grpc`` off ``grpc.aio.server``, if a zero-code start has put it there."""
    from opentelemetry.instrumentation.grpc import GrpcAioInstrumentorServer  # noqa: PLC0415 - imports grpc's channel classes

    stock = GrpcAioInstrumentorServer()  # type: ignore[no-untyped-call]
    if stock.is_instrumented_by_opentelemetry:
        stock.uninstrument()
        structlog.get_logger(__name__).warning(
            "stock_interceptor_removed", why="it breaks health Watch and would make a second span of every call"
        )
