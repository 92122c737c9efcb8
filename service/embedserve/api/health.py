"""``grpc.health.v1`` for this process and its one service.

Decides what Check, List and Watch answer. Must never know why the process serves or not: ``set_serving`` says so. Built
on the stock protocol but not on the stock servicer, which begins as SERVING, has no List (gRFC A90), and holds one lock
while it writes to a watcher: a watcher that does not read would then hold up whoever sets the status, and the shutdown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
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
        """Register with ``server``, with our own parsing: gRPC answers UNKNOWN with Python's own words to garbage."""
        unary, streaming = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        check, listing = _parser(health_pb2.HealthCheckRequest), _parser(health_pb2.HealthListRequest)  # type: ignore[attr-defined]
        handlers = {
            "Check": unary(_whole(self.Check), check, _serialize),
            "List": unary(_whole(self.List), listing, _serialize),
            "Watch": streaming(_whole(self.Watch), check, _serialize),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", handlers),))

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


def _parser(message: Any) -> Callable[[bytes], Any]:
    def parse(raw: bytes) -> Any:
        try:
            return message.FromString(raw)
        except DecodeError:
            return None

    return parse


def _whole(behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    """Refuse a request that could not be parsed before ``behaviour`` sees it."""

    async def guarded(request: Any, context: Any) -> Any:
        if request is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the bytes are not a valid health request")
        return await behaviour(request, context)

    return guarded


def _serialize(message: Any) -> bytes:
    raw: bytes = message.SerializeToString()
    return raw
