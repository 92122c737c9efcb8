"""embedserve's own API (``embedserve.v1.EmbeddingService``), by the client in C++, the wire client or grpc.aio.

Decides what a call looks like on the wire and what of its answer is told. Must never know a schedule. Texts that are
longer than the model takes are cut at their end: other servers do that without being asked. All clients give the same
replies; they differ in what they take from a server that they share cores with.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from embedserve.v1 import embedding_pb2 as pb
from loadtest.answer import Answer
from loadtest.native.volley import Unavailable, Volley, load_library
from loadtest.plan import Note, Plan, Played, Tell
from loadtest.target import NO_CONNECTION, Reply
from loadtest.wire_client import Connection, head_of

__all__ = ["AioTarget", "NativeTarget", "Options", "WireTarget"]

PATHS: Final = {
    "embed": "/embedserve.v1.EmbeddingService/Embed",
    "stream": "/embedserve.v1.EmbeddingService/EmbedStream",
}
OPEN_S: Final = 10.0
AGAIN_S: Final = 0.01
"""From a connection to the next in its place, as in ``native/client.cpp``: who has gone is not asked at once."""
RECEIVE_BYTES: Final = 64 << 20
"""More than a server may send by default: the limit under test is the server's."""
LOOK_S: Final = 0.5
"""How often somebody looks how far a run is."""
KEPT_BYTES: Final = 256 << 20
"""Answers that wait for the end of a run to be read."""
KEPT_REQUESTS: Final = 16_384
"""Serialised requests that are kept for the next time that the same texts are sent."""
STATUS_NAMES: Final = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a deployment is reached."""

    address: str
    """``host:port``."""
    method: Literal["embed", "stream"] = "embed"
    connections: int = 4
    """Of each client process: a balancer that counts connections sees more than one."""
    metadata: tuple[tuple[str, str], ...] = ()
    """Sent with each call, such as an authorization or ``x-embedserve-tenant``."""
    tls: bool = False
    ca_file: str | None = None
    """Certificates that are trusted, PEM; absent: the system's."""


class _Requests:
    """Serialised requests, each made once."""

    def __init__(self, options: Options) -> None:
        self._make = pb.EmbedRequest if options.method == "embed" else pb.EmbedStreamRequest
        self._kept: dict[int, tuple[Sequence[str], bytes]] = {}

    def of(self, texts: Sequence[str]) -> bytes:
        kept = self._kept.get(id(texts))
        if kept is not None and kept[0] is texts:
            return kept[1]
        message: bytes = self._make(texts=texts, truncate=pb.TRUNCATE_END).SerializeToString()
        if len(self._kept) < KEPT_REQUESTS:
            self._kept[id(texts)] = (texts, message)
        return message


class WireTarget:
    """By hand-made HTTP/2: see ``wire_client.py``."""

    def __init__(self, options: Options) -> None:
        """Nothing is opened yet."""
        self._options = options
        self._requests = _Requests(options)
        self._read = _read_embed if options.method == "embed" else _read_stream
        self._slots: list[Connection | None] = [None] * options.connections
        self._opening: dict[int, asyncio.Task[Connection]] = {}
        self._turn = itertools.cycle(range(options.connections))
        self._timeout_s: float | None = None
        self._not_before = [0.0] * options.connections
        self._reached = options.address
        """The one of the server's addresses that answers."""

    async def open(self) -> None:
        """Connect once, to see that somebody answers; the others come with their first call."""
        try:
            connection = await self._connect(None)
            self._reached = connection.peer
            connection.close()
        except (OSError, TimeoutError) as error:
            raise ConnectionError(
                f"{self._options.address} cannot be reached: {error or 'no answer in 10 s'}"
            ) from None

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Reply:
        """One call."""
        if timeout_s != self._timeout_s:  # the header is the connection's
            await self.close()
            self._timeout_s = timeout_s
        slot = next(self._turn)
        connection = self._slots[slot]
        if connection is None or not connection.usable:
            try:
                connection = await self._opened(slot)
            except (OSError, TimeoutError):
                return NO_CONNECTION
        sent = time.monotonic()
        return self._reply(await connection.exchange(self._requests.of(texts), timeout_s), sent)

    def _reply(self, answer: Answer, sent: float) -> Reply:
        if answer.code:
            return _refusal(STATUS_NAMES.get(answer.code, "UNKNOWN"), answer)
        try:
            return self._read(answer.messages(), (answer.first_at - sent) * 1e3)
        except (ValueError, DecodeError):
            return Reply("INTERNAL", "NOT_READABLE")

    async def close(self) -> None:
        """End all connections."""
        for opening in self._opening.values():
            opening.cancel()
        for connection in self._slots:
            if connection is not None:
                connection.close()
        self._slots = [None] * self._options.connections

    async def _opened(self, slot: int) -> Connection:
        """The connection of a slot; however many wait for it, it is opened once."""
        opening = self._opening.get(slot)
        if opening is None:
            opening = self._opening[slot] = asyncio.ensure_future(self._open_slot(slot))
            opening.add_done_callback(lambda _: self._opening.pop(slot, None))
        # A caller who goes away must not take the connection from the others.
        connection = await asyncio.shield(opening)
        self._slots[slot] = connection
        return connection

    async def _open_slot(self, slot: int) -> Connection:
        if (wait_s := self._not_before[slot] - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)
        self._not_before[slot] = time.monotonic() + AGAIN_S
        return await self._connect(self._timeout_s)

    async def _connect(self, timeout_s: float | None) -> Connection:
        options = self._options
        host, _, port = options.address.rpartition(":")
        secure = None
        if options.tls:
            secure = ssl.create_default_context(cafile=options.ca_file)
            secure.set_alpn_protocols(["h2"])

        def make() -> Connection:
            path = PATHS[options.method]
            return Connection(options.address, path, timeout_s, options.metadata, secure=options.tls)

        async with asyncio.timeout(OPEN_S):
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(make, host.strip("[]"), int(port), ssl=secure)
            await connection.ready()
        return connection


class NativeTarget(WireTarget):
    """As ``WireTarget`` in the warm-up; the run itself is sent by ``native/client.cpp``."""

    def __init__(self, options: Options) -> None:
        """Nothing is opened yet. Raises ``Unavailable`` where there is no such client, or with TLS."""
        if options.tls:
            raise Unavailable("the load generator in C++ speaks no TLS")
        super().__init__(options)
        self._library = load_library()

    async def play(self, plan: Plan, note: Note, tell: Tell, *, timeout_s: float) -> Played:
        """As ``Player`` says."""
        options = self._options
        volley = Volley(
            self._library,
            self._reached,
            head_of(options.address, PATHS[options.method], timeout_s, options.metadata),
            [self._requests.of(texts) for texts in plan.calls],
            plan,
            connections=options.connections,
            give_up_s=timeout_s,
            keep=True,
        )
        cpu, begun = time.process_time(), max(plan.start, time.monotonic())
        running = asyncio.ensure_future(asyncio.to_thread(volley.run))
        try:
            while not (await asyncio.wait({running}, timeout=LOOK_S))[0]:
                calls, failed, _, kept_bytes = volley.progress()
                tell(calls, failed)
                if kept_bytes > KEPT_BYTES:
                    self._note(volley, plan, note)
            cpu, took = time.process_time() - cpu, time.monotonic() - begun
            await running
            self._note(volley, plan, note)
            return Played(cpu, took, volley.progress()[2])
        finally:
            volley.stop()
            await asyncio.wait({running})
            volley.close()

    def _note(self, volley: Volley, plan: Plan, note: Note) -> None:
        """Answers are read when the run is over, or when they take much memory: the server is left alone meanwhile."""
        for ended in volley.take():
            answer = ended.answer
            reply = self._reply(answer, ended.sent) if ended.connected else NO_CONNECTION
            note(ended.meant, ended.sent, ended.ended, ended.phase, len(plan.calls[ended.request]), reply)


class AioTarget:
    """By grpc.aio: the plain client that most users have."""

    def __init__(self, options: Options) -> None:
        """Nothing is opened yet."""
        self._options = options
        self._requests = _Requests(options)
        self._roots = Path(options.ca_file).read_bytes() if options.ca_file else None
        self._channels: list[Any] = []
        self._calls: list[Any] = []
        self._turn = itertools.cycle(range(options.connections))

    async def open(self) -> None:
        """Connect each channel."""
        options = self._options
        for number in range(options.connections):
            # Channels with the same arguments share one connection.
            settings = [("grpc.max_receive_message_length", RECEIVE_BYTES), ("embedserve.loadtest.channel", number)]
            if options.tls:
                credentials = grpc.ssl_channel_credentials(self._roots)
                channel = grpc.aio.secure_channel(options.address, credentials, options=settings)
            else:
                channel = grpc.aio.insecure_channel(options.address, options=settings)
            self._channels.append(channel)
            make = channel.unary_unary if options.method == "embed" else channel.unary_stream
            self._calls.append(make(PATHS[options.method]))
        try:
            async with asyncio.timeout(OPEN_S):
                await asyncio.gather(*(channel.channel_ready() for channel in self._channels))
        except TimeoutError:
            raise ConnectionError(f"{options.address} cannot be reached: no answer in 10 s") from None

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Reply:
        """One call."""
        options = self._options
        number = next(self._turn)
        call = self._calls[number](self._requests.of(texts), timeout=timeout_s, metadata=options.metadata or None)
        sent, first_ms, messages = time.monotonic(), 0.0, []
        try:
            if options.method == "embed":
                messages.append(await call)
            else:
                async for message in call:
                    first_ms = first_ms or (time.monotonic() - sent) * 1e3
                    messages.append(message)
        except grpc.aio.AioRpcError as error:
            gone = self._channels[number].get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE
            if gone and error.code() is grpc.StatusCode.UNAVAILABLE:
                return NO_CONNECTION
            trailers: dict[str, Any] = dict(error.trailing_metadata() or ())
            answer = Answer()
            answer.details = trailers.get("grpc-status-details-bin", b"")
            pushback = trailers.get("grpc-retry-pushback-ms")
            answer.pushback_ms = float(pushback) if pushback is not None else answer.pushback_ms
            return _refusal(error.code().name, answer)
        return (_read_embed if options.method == "embed" else _read_stream)(messages, first_ms)

    async def close(self) -> None:
        """End all channels."""
        for channel in self._channels:
            await channel.close()


def _read_embed(messages: list[bytes], _first_ms: float) -> Reply:
    response = pb.EmbedResponse.FromString(messages[0]) if messages else pb.EmbedResponse()
    embeddings = response.embeddings
    return Reply(
        "OK",
        items=len(embeddings),
        batch_items=max((e.batch_size for e in embeddings), default=0),
        tokens=response.usage.tokens,
        server_ms=response.timings.total_ms,
    )


def _read_stream(messages: list[bytes], first_ms: float) -> Reply:
    items = batch_items = failed = 0
    summary = pb.EmbedStreamSummary()
    for message in messages:
        part = pb.EmbedStreamResponse.FromString(message)
        items += len(part.embeddings)
        batch_items = max(batch_items, *(e.batch_size for e in part.embeddings), 0)
        failed += len(part.errors)
        if part.HasField("summary"):
            summary = part.summary
    if failed:
        return Reply("INTERNAL", "ITEM_ERRORS", items=items)
    return Reply(
        "OK",
        items=items,
        batch_items=batch_items,
        tokens=summary.usage.tokens,
        server_ms=summary.timings.total_ms,
        first_ms=first_ms,
    )


def _refusal(name: str, answer: Answer) -> Reply:
    reason = ""
    if answer.details:
        status = status_pb2.Status()
        try:
            status.ParseFromString(answer.details)
            for detail in status.details:
                if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                    info = error_details_pb2.ErrorInfo()
                    detail.Unpack(info)
                    reason = info.reason
        except DecodeError:
            reason = "NOT_READABLE"
    pushback = answer.pushback_ms
    return Reply(name, reason, retry_after_ms=None if pushback != pushback else pushback)  # noqa: PLR0124 - NaN
