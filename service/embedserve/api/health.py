"""``grpc.health.v1`` for this process and its one service.

Decides what Check, List and Watch answer. Must never know why the process serves or not: ``set_serving`` says so. Built
on the stock protocol but not on the stock servicer, which begins as SERVING, has no List (gRFC A90), and holds one lock
while it writes to a watcher: a watcher that does not read would then hold up whoever sets the status, and the shutdown.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

__all__ = ["Health"]

PROCESS: Final = ""
"""The name that stands for the whole process."""


class Health(health_pb2_grpc.HealthServicer):
    """Answers for ``""`` and each of ``services``; NOT_SERVING until told otherwise."""

    def __init__(self, services: tuple[str, ...]) -> None:
        """Know ``services`` by their full names."""
        self._names = frozenset((PROCESS, *services))
        self._serving = False
        self._final = False
        self._closed = False
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
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def List(self, request: health_pb2.HealthListRequest, context: Any) -> health_pb2.HealthListResponse:  # noqa: ARG002, N802
        """The status of every service."""
        statuses = {name: health_pb2.HealthCheckResponse(status=self._status(name)) for name in self._names}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802
        """The status now and after each change; SERVICE_UNKNOWN, with the stream kept open, for others."""
        last = None
        while not self._closed:
            # Taken before the status is read: a change during the write below sets this very event.
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                last = status
            await changed.wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in self._names:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        return health_pb2.HealthCheckResponse.SERVING if self._serving else health_pb2.HealthCheckResponse.NOT_SERVING

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
