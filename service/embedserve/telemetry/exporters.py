"""Where traces, metrics and logs go, as OpenTelemetry's own environment variables say.

Decides exporters, sampler and resource from ``OTEL_*``; these are read here, and not from our settings, because
operators and operators' platforms set them for every service alike. Must never know what is exported.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Mapping
from typing import Final

from opentelemetry.sdk._logs.export import LogRecordExporter
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, MetricExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace.export import ConsoleSpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from embedserve.errors import ConfigError
from embedserve.telemetry.semconv import SCHEMA_URL
from embedserve.telemetry.settings import TelemetrySettings
from embedserve.telemetry.span_senders import OtlpSender, ReadableSender, SpanSender

__all__ = ["exemplars_enabled", "log_exporter", "metric_exporter", "resource", "sampler", "sdk_disabled", "span_sender"]

_PROTOCOLS: Final = ("grpc", "http/protobuf")


def sdk_disabled() -> bool:
    """``OTEL_SDK_DISABLED``."""
    return os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def exemplars_enabled(settings: TelemetrySettings) -> bool:
    """Whether histograms keep exemplars; ``OTEL_METRICS_EXEMPLAR_FILTER=always_off`` wins.

    ``always_on`` means the same as ``trace_based`` here: an exemplar without a trace leads nowhere.
    """
    return settings.exemplars and os.environ.get("OTEL_METRICS_EXEMPLAR_FILTER", "").strip().lower() != "always_off"


def span_sender(resource: Resource, scope: InstrumentationScope) -> SpanSender | None:
    """What ``OTEL_TRACES_EXPORTER`` asks for: ``otlp``, ``console`` or ``none``; unset, OTLP if an endpoint is set.

    Raises ``ConfigError`` for a name or protocol that is not known.
    """
    protocol = _protocol("TRACES")
    match _choice("TRACES"):
        case "otlp" if protocol == "grpc":
            from embedserve.telemetry.otlp_grpc import GrpcSpans  # noqa: PLC0415

            return OtlpSender(GrpcSpans(), resource, scope)
        case "otlp":
            from embedserve.telemetry.otlp_http import HttpSpans  # noqa: PLC0415

            return OtlpSender(HttpSpans(), resource, scope)
        case "console":
            return ReadableSender(ConsoleSpanExporter(out=sys.stderr), resource, scope)
        case _:
            return None


def metric_exporter() -> MetricExporter | None:
    """What ``OTEL_METRICS_EXPORTER`` asks for, as ``span_sender``; ``prometheus`` is served elsewhere."""
    protocol = _protocol("METRICS")
    match _choice("METRICS"):
        case "otlp":
            if protocol == "grpc":
                from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as Grpc  # noqa: PLC0415

                return Grpc()
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as Http  # noqa: PLC0415

            return Http()
        case "console":
            return ConsoleMetricExporter(out=sys.stderr)
        case _:
            return None


def log_exporter() -> LogRecordExporter | None:
    """What ``OTEL_LOGS_EXPORTER`` asks for: ``otlp``, or ``none`` and ``console``: standard error has each line anyway.

    Unset, none: an endpoint alone does not send every line twice. Raises ``ConfigError`` as ``span_sender``.
    """
    protocol = _protocol("LOGS")
    if not os.environ.get("OTEL_LOGS_EXPORTER", "").strip() or _choice("LOGS") != "otlp":
        return None
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as Grpc  # noqa: PLC0415

        return Grpc()
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as Http  # noqa: PLC0415

    return Http()


def sampler(settings: TelemetrySettings) -> Sampler:
    """What ``OTEL_TRACES_SAMPLER`` and ``_ARG`` ask for; unset, ``parentbased_traceidratio`` with the configured ratio.

    Raises ``ConfigError`` for a name that is not known or a ratio outside 0 to 1.
    """
    name = os.environ.get("OTEL_TRACES_SAMPLER", "").strip().lower()
    ratio = settings.trace_sample_ratio
    if name:
        ratio = _ratio(os.environ.get("OTEL_TRACES_SAMPLER_ARG", "").strip() or "1.0")
    made: dict[str, Sampler] = {
        "": ParentBased(TraceIdRatioBased(ratio)),
        "always_on": ALWAYS_ON,
        "always_off": ALWAYS_OFF,
        "traceidratio": TraceIdRatioBased(ratio),
        "parentbased_always_on": ParentBased(ALWAYS_ON),
        "parentbased_always_off": ParentBased(ALWAYS_OFF),
        "parentbased_traceidratio": ParentBased(TraceIdRatioBased(ratio)),
    }
    if name not in made:
        known = ", ".join(filter(None, made))
        raise ConfigError([f"OTEL_TRACES_SAMPLER is {name!r}; known are {known}"])
    return made[name]


def resource(settings: TelemetrySettings) -> Resource:
    """Who this is, on every signal; ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` win."""
    ours: dict[str, str | int | float | bool] = {
        "service.name": settings.service_name,
        "service.instance.id": settings.service_instance_id or str(uuid.uuid4()),
        **settings.resource_attributes,
    }
    if settings.service_version:
        ours["service.version"] = settings.service_version
    return Resource.create().merge(Resource(ours, SCHEMA_URL)).merge(OTELResourceDetector().detect())


def _choice(signal: str) -> str:
    name = os.environ.get(f"OTEL_{signal}_EXPORTER", "").strip().lower()
    if not name:
        endpoints: Mapping[str, str] = os.environ
        set_ = endpoints.get("OTEL_EXPORTER_OTLP_ENDPOINT") or endpoints.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
        return "otlp" if set_ else "none"
    known = {"otlp", "console", "none"} | ({"prometheus"} if signal == "METRICS" else set())
    if name not in known:
        raise ConfigError([f"OTEL_{signal}_EXPORTER is {name!r}; known are {', '.join(sorted(known))}"])
    return name


def _protocol(signal: str) -> str:
    name = f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL"
    protocol = os.environ.get(name) or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    if protocol not in _PROTOCOLS:
        raise ConfigError([f"{name} or OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; known are {', '.join(_PROTOCOLS)}"])
    return protocol


def _ratio(word: str) -> float:
    try:
        ratio = float(word)
    except ValueError:
        ratio = -1.0
    if not 0.0 <= ratio <= 1.0:
        raise ConfigError([f"OTEL_TRACES_SAMPLER_ARG is {word!r}; it must be a number from 0 to 1"])
    return ratio
