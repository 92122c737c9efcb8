"""``grpc.health.v1`` for this process and its one service.

Decides what Check, List and Watch answer. Must never know why the process serves or not: ``set_serving`` says so. Built
on the stock protocol but not on the stock servicer, which begins as SERVING, has no List (gRFC A90), and holds one lock
while it writes to a watcher: a watcher that does not read would then hold up whoever sets the status, and the shutdown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

__all__ = ["HealthService"]

PROCESS: Final = ""
"""The name that stands for the whole process."""


class HealthService(health_pb2_grpc.HealthServicer):
    """Answers for ``""`` and each of ``services``; NOT_SERVING until told otherwise."""

    def __init__(self, services: Sequence[str]) -> None:
        """Know ``services`` by their full names."""
        self._names = frozenset((PROCESS, *services))
        self._serving = False
        self._final = False
        self._closed: bool = False
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        """What Check answers now."""
        return self._serving

    def set_serving(self, serving: bool) -> None:
        """Say so from now on, and tell every watcher. Does nothing after ``enter_graceful_shutdown``."""
        if not self._final and serving != self._serving:
            self._serving = serving
            self._announce()

    def enter_graceful_shutdown(self) -> None:
        """NOT_SERVING for good."""
        self.set_serving(False)
        self._final = True

    def close(self) -> None:
        """End every Watch, so that stopping the server does not wait out its grace time for streams that never end."""
        self.enter_graceful_shutdown()
        self._closed = True
        self._announce()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with ``server``."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802
        """The status of one service; NOT_FOUND for others."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service of that name is served here")
        return self._answer(request.service)

    # The published type stubs of grpcio-health-checking do not know List yet.
    async def List(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        """The status of every service."""
        statuses = {name: self._answer(name) for name in self._names}
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802
        """The status now and after each change; SERVICE_UNKNOWN, with the stream kept open, for others."""
        last = None
        while True:
            # Taken before the status is read: a change during the write below sets this very event.
            changed = self._changed
            answer = self._answer(request.service)
            if answer != last:
                await context.write(answer)
                last = answer
            if self._closed:
                break
            await changed.wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

    def _answer(self, service: str) -> health_pb2.HealthCheckResponse:
        if service not in self._names:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        if self._serving:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
