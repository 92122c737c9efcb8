"""What runs for given settings and OTEL_* variables."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import grpc.aio
import pytest
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as GrpcLogs
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetrics
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as HttpLogs
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetrics
from opentelemetry.instrumentation.grpc import GrpcAioInstrumentorServer
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import ConsoleSpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from embedserve.api.observer import SilentCallObserver
from embedserve.engine.observer import SilentObserver
from embedserve.errors import ConfigError
from embedserve.telemetry import exporters
from embedserve.telemetry.load import LoadSnapshot
from embedserve.telemetry.observers import TelemetryEngineObserver
from embedserve.telemetry.otlp_grpc import GrpcSpans
from embedserve.telemetry.otlp_http import HttpSpans
from embedserve.telemetry.settings import TelemetrySettings
from embedserve.telemetry.setup import setup_telemetry
from embedserve.telemetry.tracing import RequestTracer

OFF = TelemetrySettings(prometheus_enabled=False, log_requests="off")


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])


class TestOff:
    def test_what_is_off_costs_nothing_at_all(self) -> None:
        telemetry = setup_telemetry(OFF)

        assert type(telemetry.engine_observer) is SilentObserver
        assert type(telemetry.call_observer) is SilentCallObserver
        assert telemetry.render_metrics is None
        telemetry.register_load(LoadSnapshot)
        assert telemetry.shutdown(0.1)

    def test_the_sdk_switch_turns_metrics_and_traces_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
        telemetry = setup_telemetry(TelemetrySettings(log_requests="off"))

        assert type(telemetry.call_observer) is SilentCallObserver
        assert telemetry.render_metrics is None

    def test_metrics_alone_sample_nothing(self) -> None:
        telemetry = setup_telemetry(TelemetrySettings(trace_sample_ratio=1.0))

        assert type(telemetry.engine_observer) is TelemetryEngineObserver
        assert type(telemetry.call_observer) is RequestTracer
        assert telemetry.call_observer._sampling is None
        telemetry.shutdown(5)


class TestExporters:
    @pytest.mark.parametrize(
        ("environment", "spans", "metrics"),
        [
            ({}, None, None),
            ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, GrpcSpans, GrpcMetrics),
            ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, GrpcSpans, None),
            ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:1"}, None, GrpcMetrics),
            (
                {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
                HttpSpans,
                HttpMetrics,
            ),
            (
                {
                    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
                    "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf",
                    "OTEL_TRACES_EXPORTER": "none",
                },
                None,
                HttpMetrics,
            ),
            ({"OTEL_TRACES_EXPORTER": "otlp"}, GrpcSpans, None),
            ({"OTEL_TRACES_EXPORTER": "console", "OTEL_METRICS_EXPORTER": "prometheus"}, ConsoleSpanExporter, None),
        ],
        ids=str,
    )
    def test_they_are_those_that_the_variables_name(
        self, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], spans: type | None, metrics: type | None
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

        sender = exporters.span_sender(Resource({}), InstrumentationScope("t"))
        made = exporters.metric_exporter()

        takes = getattr(sender, "_transport", None) or getattr(sender, "_exporter", None)
        assert (spans, metrics) == tuple(None if one is None else type(one) for one in (takes, made))
        for one in (sender, made):
            if one is not None:
                one.shutdown()

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("OTEL_TRACES_EXPORTER", "jaeger"),
            ("OTEL_TRACES_SAMPLER", "sometimes"),
            ("OTEL_TRACES_SAMPLER_ARG", "2"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
        ],
    )
    @pytest.mark.parametrize("endpoint", [None, "http://127.0.0.1:1"])
    def test_a_value_that_nobody_knows_stops_the_start_and_says_so(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: str, endpoint: str | None
    ) -> None:
        """Whether anything is exported or not: else the endpoint, once it is set, stops a service that ran."""
        if endpoint is not None:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        if name == "OTEL_TRACES_SAMPLER_ARG":
            monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=name):
            setup_telemetry(TelemetrySettings())

    def test_what_is_switched_off_reads_no_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "sometimes")

        setup_telemetry(TelemetrySettings()).shutdown(1)


class TestLogs:
    """Over OTLP only where that is asked for: an endpoint alone would send every line twice."""

    @pytest.mark.parametrize(
        ("environment", "found"),
        [
            ({}, None),
            ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, None),
            ({"OTEL_LOGS_EXPORTER": "none"}, None),
            ({"OTEL_LOGS_EXPORTER": "otlp"}, GrpcLogs),
            ({"OTEL_LOGS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL": "http/protobuf"}, HttpLogs),
        ],
        ids=str,
    )
    def test_it_is_what_the_variables_name(
        self, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], found: type | None
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        made = exporters.log_exporter()

        assert found is (None if made is None else type(made))
        if made is not None:
            made.shutdown()

    def test_a_name_that_nobody_knows_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_LOGS_EXPORTER", "syslog")
        with pytest.raises(ConfigError, match="OTEL_LOGS_EXPORTER"):
            setup_telemetry(TelemetrySettings())


class TestSampler:
    @pytest.mark.parametrize(
        ("environment", "description"),
        [
            ({}, "ParentBased{root:TraceIdRatioBased{0.01}"),
            ({"OTEL_TRACES_SAMPLER": "always_on"}, "AlwaysOnSampler"),
            ({"OTEL_TRACES_SAMPLER": "always_off"}, "AlwaysOffSampler"),
            ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"}, "TraceIdRatioBased{0.5}"),
            ({"OTEL_TRACES_SAMPLER": "parentbased_always_on"}, "ParentBased{root:AlwaysOnSampler"),
            (
                {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.2"},
                "ParentBased{root:TraceIdRatioBased{0.2}",
            ),
        ],
        ids=str,
    )
    def test_it_is_the_one_that_the_variables_name(
        self, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], description: str
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert exporters.sampler(TelemetrySettings()).get_description().startswith(description)

    @pytest.mark.parametrize("argument", ["2", "-0.1", "much", "nan"])
    def test_a_ratio_outside_its_range_is_refused(self, monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
        with pytest.raises(ConfigError, match="OTEL_TRACES_SAMPLER_ARG"):
            exporters.sampler(TelemetrySettings())


class TestResource:
    def test_settings_say_who_this_is(self) -> None:
        settings = TelemetrySettings(service_version="1.2", resource_attributes={"embedserve.model": "m"})
        attributes = exporters.resource(settings).attributes
        assert tuple(attributes[key] for key in ("service.name", "service.version", "embedserve.model")) == (
            "embedserve",
            "1.2",
            "m",
        )
        assert attributes["service.instance.id"] != exporters.resource(settings).attributes["service.instance.id"]

    def test_the_standard_variables_win(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_SERVICE_NAME", "other")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=p,service.version=9")
        attributes = exporters.resource(TelemetrySettings(service_version="1.2")).attributes
        assert tuple(attributes[key] for key in ("service.name", "service.version", "k8s.pod.name")) == (
            "other",
            "9",
            "p",
        )


class TestExemplars:
    def test_the_standard_variable_can_turn_them_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert exporters.exemplars_enabled(TelemetrySettings())
        assert not exporters.exemplars_enabled(TelemetrySettings(exemplars=False))
        monkeypatch.setenv("OTEL_METRICS_EXEMPLAR_FILTER", "always_off")
        assert not exporters.exemplars_enabled(TelemetrySettings())


class TestZeroCode:
    def test_the_stock_patch_is_taken_off_and_the_log_says_so(self, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
        untouched = grpc.aio.server
        GrpcAioInstrumentorServer().instrument()
        assert grpc.aio.server is not untouched

        setup_telemetry(TelemetrySettings(log_format="json")).shutdown(5)

        assert grpc.aio.server is untouched
        events = [json.loads(line)["event"] for line in capfdbinary.readouterr().err.splitlines()]
        assert events == ["stock_interceptor_removed"]
