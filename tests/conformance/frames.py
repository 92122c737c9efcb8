"""An HTTP/2 client that sends whatever a test wants, also what no client should.

Decides nothing: it writes frames (RFC 9113), reads frames, and remembers what came. Headers are compressed with hpack;
frames are hyperframe's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from hpack import Decoder, Encoder
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, PingFrame, RstStreamFrame, SettingsFrame

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
EMBED: Final = "/embedserve.v1.EmbeddingService/Embed"
STREAM: Final = "/embedserve.v1.EmbeddingService/EmbedStream"
LIMIT_S: Final = 10.0
NO_ERROR, PROTOCOL_ERROR, FRAME_SIZE_ERROR, CANCEL, ENHANCE_YOUR_CALM = 0x0, 0x1, 0x6, 0x8, 0xB


def grpc_message(raw: bytes, *, compressed: bool = False) -> bytes:
    """``raw`` with gRPC's five bytes before it."""
    return bytes([compressed]) + len(raw).to_bytes(4, "big") + raw


@dataclass
class Connection:
    """One TCP connection. ``closed`` is set when the server has ended it, in whatever way."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    received: list[Frame] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    encoder: Encoder = field(default_factory=Encoder)
    decoder: Decoder = field(default_factory=Decoder)
    answer_pings: bool = True
    headers: dict[int, dict[str, str]] = field(default_factory=dict)
    """Headers and trailers received, by stream."""
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, *frames: Frame | bytes) -> None:
        """Write; what the server has ended is not written to, which the test then sees by ``closed``."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(b"".join(f if isinstance(f, bytes) else f.serialize() for f in frames))
            await self.writer.drain()

    def call(
        self,
        stream_id: int,
        path: str = EMBED,
        more: Iterable[tuple[str, str]] = (),
        *,
        flags: Iterable[str] = ("END_HEADERS",),
    ) -> HeadersFrame:
        """The request headers of a gRPC call."""
        headers = [
            (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "test"),
            ("te", "trailers"), ("content-type", "application/grpc"), *more,
        ]  # fmt: skip
        return HeadersFrame(stream_id, self.encoder.encode(headers), flags=flags)

    async def until(self, found: Callable[[Frame], bool], limit_s: float = LIMIT_S) -> Frame:
        """The first frame of those received and yet to come that ``found`` accepts."""
        async with asyncio.timeout(limit_s):
            seen = 0
            while True:
                self._news.clear()
                for frame in self.received[seen:]:
                    if found(frame):
                        return frame
                seen = len(self.received)
                assert not self.closed.is_set(), f"the connection ended; received: {self.received[-5:]}"
                await self._news.wait()

    async def ended(self, limit_s: float = LIMIT_S) -> None:
        """Until the server has ended the connection."""
        async with asyncio.timeout(limit_s):
            await self.closed.wait()

    async def trailers(self, stream_id: int, limit_s: float = LIMIT_S) -> dict[str, str]:
        """Headers and trailers of a stream that has ended."""
        await self.until(lambda f: f.stream_id == stream_id and "END_STREAM" in f.flags, limit_s)
        return self.headers[stream_id]

    @property
    def goaway(self) -> GoAwayFrame | None:
        """The last GOAWAY, if one came."""
        return next((f for f in reversed(self.received) if isinstance(f, GoAwayFrame)), None)

    async def listen(self) -> None:
        """Read frames until the end."""
        try:
            while True:
                head = await self.reader.readexactly(9)
                frame, length = Frame.parse_frame_header(memoryview(head))
                frame.parse_body(memoryview(await self.reader.readexactly(length)))
                if isinstance(frame, HeadersFrame):
                    self.headers.setdefault(frame.stream_id, {}).update(self.decoder.decode(frame.data))
                if isinstance(frame, PingFrame) and "ACK" not in frame.flags and self.answer_pings:
                    await self.send(PingFrame(0, frame.opaque_data, flags=["ACK"]))
                if isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
                    await self.send(SettingsFrame(0, flags=["ACK"]))
                self.received.append(frame)
                self._news.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed.set()
            self._news.set()


@asynccontextmanager
async def connected(
    address: str, *, settings: dict[int, int] | None = None, preface: bytes = PREFACE
) -> AsyncIterator[Connection]:
    """A connection with its preface and SETTINGS sent; ``preface`` empty: nothing is sent."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    connection = Connection(reader, writer)
    listening = asyncio.create_task(connection.listen())
    try:
        if preface:
            await connection.send(preface, SettingsFrame(0, settings or {}))
        yield connection
    finally:
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening
        writer.transport.abort()


def data(stream_id: int, body: bytes, *, end: bool = True) -> DataFrame:
    """A DATA frame."""
    return DataFrame(stream_id, body, flags=["END_STREAM"] if end else [])


def reset(stream_id: int, code: int = CANCEL) -> RstStreamFrame:
    """A RST_STREAM frame."""
    return RstStreamFrame(stream_id, code)


def pieces(stream_id: int, body: bytes) -> list[DataFrame]:
    """``body`` in DATA frames of 16 KiB, the largest that a peer takes before it has said more."""
    starts = range(0, len(body), 16_384)
    return [data(stream_id, body[i : i + 16_384], end=i == starts[-1]) for i in starts]
