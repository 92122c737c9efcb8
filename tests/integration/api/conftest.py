"""A small grpc.aio server with the guard in front, and somebody who watches."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest

from embedserve.api.guard import SERVICE, Guard
from embedserve.api.server import ServerOptions, bind, build_server
from embedserve.engine.stages import Stages
from embedserve.v1 import embedding_pb2 as pb


@dataclass
class Ended:
    """What a call's trace was told at its end."""

    status: str
    error_type: str | None
    attributes: Mapping[str, Any]
    stages: Stages | None


@dataclass
class Trace:
    """One call, as the observer saw it."""

    method: str
    metadata: dict[str, Any]
    arrived_ns: int
    peer: str
    trace_id: str | None
    context: object | None = None
    ends: list[Ended] = field(default_factory=list)

    def end(self, *, status: str, stages: Any, error_type: str | None, attributes: Mapping[str, Any]) -> None:
        self.ends.append(Ended(status, error_type, dict(attributes), stages))


class Recorder:
    """Keeps every call, every internal error and every fatal one."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []
        self.internal: list[tuple[str, BaseException]] = []
        self.fatal: list[BaseException] = []
        self.trace_id: str | None = None

    def begin(self, method: str, metadata: Any, arrived_ns: int, peer: str) -> Trace:
        self.traces.append(Trace(method, dict(metadata), arrived_ns, peer, self.trace_id))
        return self.traces[-1]

    @property
    def end(self) -> Ended:
        """The one end of the one call."""
        ((only,),) = [trace.ends for trace in self.traces]
        return only


@dataclass
class Served:
    """A running server, a channel to it, and what is behind it."""

    channel: grpc.aio.Channel
    guard: Guard
    recorder: Recorder
    server: grpc.aio.Server
    port: int

    def embed(self, request: bytes = b"", **options: Any) -> grpc.aio.UnaryUnaryCall:
        """Call Embed with raw bytes."""
        return self.channel.unary_unary(f"/{SERVICE}/Embed")(request, **options)

    def stream(self, request: bytes = b"", **options: Any) -> grpc.aio.UnaryStreamCall:
        """Call EmbedStream with raw bytes."""
        return self.channel.unary_stream(f"/{SERVICE}/EmbedStream")(request, **options)


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start servers with ``embed`` and ``stream`` handlers; afterwards all is stopped and nothing is in flight."""
    async with AsyncExitStack() as stack:
        guards: list[Guard] = []

        async def start(
            embed: Any = None,
            stream: Any = None,
            *,
            inner: tuple[Any, ...] = (),
            add: Callable[[grpc.aio.Server], None] | None = None,
            **options: Any,
        ) -> Served:
            recorder = Recorder()
            guard = Guard(
                observer=recorder,
                on_internal_error=lambda error_id, error: recorder.internal.append((error_id, error)),
                on_fatal=recorder.fatal.append,
                **options,
            )
            guards.append(guard)
            server = build_server(ServerOptions(), (guard, *inner))
            handlers = {}
            if embed is not None:
                handlers["Embed"] = grpc.unary_unary_rpc_method_handler(embed, pb.EmbedRequest.FromString)
                handlers["GetLoad"] = handlers["Embed"]
            if stream is not None:
                handlers["EmbedStream"] = grpc.unary_stream_rpc_method_handler(stream, pb.EmbedStreamRequest.FromString)
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
            if add is not None:
                add(server)
            (port,) = bind(server, ["127.0.0.1:0"])
            await server.start()
            stack.push_async_callback(server.stop, None)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            return Served(channel, guard, recorder, server, port)

        yield start
    for guard in guards:
        # A client has its status some turns of the loop before the handler is told that it went out.
        async with asyncio.timeout(5):
            await guard.wait_idle()
        assert guard.in_flight == 0
