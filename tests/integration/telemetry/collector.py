"""A real OTLP collector (rotel) and, behind it, a sink that keeps what it forwards."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs_pb2
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2_grpc as logs_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.canary import WATCH
from tests.integration.telemetry import trace_file

READY_S = 20.0
"""A loaded CI machine may need long to start a process."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until somebody listens on ``port``; fails when ``process`` has ended."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise AssertionError(f"nothing listens on {port} after {READY_S} s")


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process, until the end of the block."""
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


class Sink:
    """Keeps spans, metrics and logs, and lets a test wait for them."""

    def __init__(self, trace_file: Path | None = None) -> None:
        self.trace_file = trace_file
        """Where spans are written to as well, once they have arrived."""
        self.spans: list[Span] = []
        self.metrics: dict[str, Metric] = {}
        self.logs: list[LogRecord] = []
        self.resources: list[Resource] = []
        self.arrived = threading.Condition()

    def wait_for(self, enough: Callable[[], bool]) -> None:
        """Until ``enough()`` is true of what has arrived."""
        with self.arrived:
            assert self.arrived.wait_for(enough, READY_S), f"only {len(self.spans)} spans, {len(self.metrics)} metrics"


class _Traces(trace_grpc.TraceServiceServicer):
    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def Export(self, request: trace_pb2.ExportTraceServiceRequest, context: object) -> object:
        WATCH.saw("spans over OTLP", request.SerializeToString())
        with self._sink.arrived:
            if self._sink.trace_file is not None:
                trace_file.write(request, self._sink.trace_file)
            for resource in request.resource_spans:
                self._sink.resources.append(resource.resource)
                for scope in resource.scope_spans:
                    self._sink.spans.extend(scope.spans)
            self._sink.arrived.notify_all()
        return trace_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_grpc.MetricsServiceServicer):
    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def Export(self, request: metrics_pb2.ExportMetricsServiceRequest, context: object) -> object:
        WATCH.saw("metrics over OTLP", request.SerializeToString())
        with self._sink.arrived:
            for resource in request.resource_metrics:
                for scope in resource.scope_metrics:
                    self._sink.metrics.update({metric.name: metric for metric in scope.metrics})
            self._sink.arrived.notify_all()
        return metrics_pb2.ExportMetricsServiceResponse()


class _Logs(logs_grpc.LogsServiceServicer):
    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def Export(self, request: logs_pb2.ExportLogsServiceRequest, context: object) -> object:
        WATCH.saw("logs over OTLP", request.SerializeToString())
        with self._sink.arrived:
            for resource in request.resource_logs:
                for scope in resource.scope_logs:
                    self._sink.logs.extend(scope.log_records)
            self._sink.arrived.notify_all()
        return logs_pb2.ExportLogsServiceResponse()


@dataclass
class Collector:
    """Where to send, and what came through."""

    grpc_endpoint: str
    http_endpoint: str
    sink: Sink

    @property
    def trace_file(self) -> Path:
        """Where spans are written to; only where that was asked for."""
        assert self.sink.trace_file is not None
        return self.sink.trace_file


def rotel_agent() -> Path | None:
    """The collector's binary, if it is installed."""
    spec = importlib.util.find_spec("rotel")
    if spec is None or spec.origin is None:
        return None
    agent = Path(spec.origin).parent / "rotel-agent"
    return agent if agent.exists() else None


@contextmanager
def collecting(agent: Path, directory: Path, *, traces: Path | None = None) -> Iterator[Collector]:
    """A collector on free ports that forwards to a sink on another, which writes spans to the file ``traces``."""
    sink = Sink(traces)
    server = grpc.server(ThreadPoolExecutor(4))
    trace_grpc.add_TraceServiceServicer_to_server(_Traces(sink), server)
    metrics_grpc.add_MetricsServiceServicer_to_server(_Metrics(sink), server)
    logs_grpc.add_LogsServiceServicer_to_server(_Logs(sink), server)
    sink_port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    grpc_port, http_port = free_port(), free_port()
    command = [
        str(agent), "start", "--otlp-grpc-endpoint", f"127.0.0.1:{grpc_port}", "--otlp-http-endpoint",
        f"127.0.0.1:{http_port}", "--exporter", "otlp", "--otlp-exporter-endpoint", f"http://127.0.0.1:{sink_port}",
        "--otlp-exporter-protocol", "grpc", "--batch-timeout", "50ms", "--pid-file", str(directory / "rotel.pid"),
        "--log-file", str(directory / "rotel.log"),
    ]  # fmt: skip
    try:
        with running(command, directory / "rotel.out") as process:
            wait_for_port(grpc_port, process)
            wait_for_port(http_port, process)
            yield Collector(f"http://127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}", sink)
    finally:
        server.stop(None)
