"""An OTLP endpoint that takes spans and forgets them: ``python -m loadtest.otlp_sink``.

Prints its port, then, at its end, how many spans came. It parses nothing while it runs: on a small machine a collector
would take the CPU that is measured.
"""

from __future__ import annotations

import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

EXPORT = {"opentelemetry.proto.collector.trace.v1.TraceService": "Export"}


def main() -> int:
    """Take spans until SIGTERM."""
    requests: list[bytes] = []
    ended = threading.Event()

    def export(request: bytes, _context: Any) -> bytes:
        requests.append(request)
        return b""

    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.max_receive_message_length", 64 << 20)])
    for service, method in EXPORT.items():
        handler: Any = grpc.unary_unary_rpc_method_handler(export)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    print(port, flush=True)
    ended.wait()
    server.stop(0.5).wait()
    spans = 0
    for raw in requests:
        for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
            spans += sum(len(scope.spans) for scope in resource.scope_spans)
    print(spans, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
