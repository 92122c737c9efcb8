"""Asks a server whether it serves, over ``grpc.health.v1``.

Decides what counts as healthy: SERVING, and nothing else. Must never load the model or touch the server's own state: an
orchestrator runs it every few seconds, beside the server.
"""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedserve.address import split_address

__all__ = ["check_health", "target_of"]

LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 (replaced, never bound)


def target_of(address: str) -> str:
    """The gRPC target that reaches a server listening on ``address``: any address becomes loopback."""
    host, port = split_address(address)
    if host.startswith("unix:"):
        return host
    return f"{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(host, host) }:{port}"  # noqa: S104 (replaced, not bound)


def check_health(target: str, service: str, timeout_ms: int) -> str | None:
    """``None`` when ``service`` at ``target`` is SERVING, otherwise one line that says what it is."""
    # A proxy meant for the outside must not stand between a probe and its own host.
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=service)
            answer = stub.Check(request, timeout=timeout_ms / 1000)  # type: ignore[attr-defined] # the stubs lack it
        except grpc.RpcError as error:
            return f"{target}: {error.code().name}: {error.details()}"
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return None if status == "SERVING" else f"{target}: {service or 'the server'} is {status}"
