"""A TCP proxy that misbehaves as it is told: between a client and a server, without root, in one event loop.

Decides what a bad network does to bytes. Must never know what the bytes mean. The idea is that of asyncpg's fuzzing
proxy and of Toxiproxy: faults are set for each direction, may be changed while connections live, and are taken back by
``restore``. Everything random comes from one seed.

    async with FaultProxy(server.address, seed=7) as proxy:
        proxy.both(latency_ms=50, jitter_ms=20)      # a bad line
        proxy.to_client(bytes_per_s=10_000)          # a thin one; to_client and to_server name where bytes go
        proxy.both(blackhole=True)                   # taken and never passed on
        proxy.reset_connections()                    # RST to both ends
        proxy.half_open("server")                    # the server's end is gone, the client is not told
        proxy.restore()
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self

__all__ = ["FaultProxy", "Faults"]

CHUNK_BYTES: Final = 16_384
"""Read at once. Small enough that a cut or a change of faults takes effect within a message."""
CHUNKS_HELD_MAX: Final = 64
"""On their way in one direction of one connection: 1 MiB, so that a slow line pushes back like a real one."""
PIECES_PER_S: Final = 50
"""A limited line writes this often: smooth, and not a write a byte."""

End = Literal["client", "server"]
_ENDS: Final[tuple[End, End]] = ("client", "server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What is wrong with one direction. Byte counts are those of one connection, from its beginning."""

    latency_ms: float = 0.0
    """Every byte comes this much later. Order is kept."""
    jitter_ms: float = 0.0
    """Up to this much is added to the latency of each chunk, at random."""
    bytes_per_s: float | None = None
    """The most that passes in a second."""
    slice_bytes: int | None = None
    """Each write is of at most so many bytes."""
    corrupt_byte: int | None = None
    """One bit, at random, of the byte at this offset is turned."""
    cut_after_bytes: int | None = None
    """After exactly so many bytes both ends are closed in order."""
    reset_after_bytes: int | None = None
    """After exactly so many bytes both ends get a RST."""
    blackhole: bool = False
    """Bytes, and the end of the connection too, are taken and never passed on."""
    held: bool = False
    """Nothing passes until this is taken back; then everything does, as when a route comes back."""


_NONE: Final = Faults()


class FaultProxy:
    """Listens on a free port of 127.0.0.1 and passes connections on to ``target``, through its faults."""

    def __init__(self, target: str, *, seed: int = 0) -> None:
        """``target`` is ``host:port``. Enter the context to listen."""
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._random = random.Random(seed)
        self._faults: dict[End, Faults] = dict.fromkeys(_ENDS, _NONE)
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        """Accepted so far."""
        self.passed_bytes: dict[End, int] = dict.fromkeys(_ENDS, 0)
        """Passed on so far, by the end that they went to."""
        self.swallowed_bytes = 0
        """Taken and not passed on: by a blackhole or half-open connections."""
        self.refusing = False
        """New connections get a RST at once."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK_BYTES)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        await asyncio.sleep(0)  # sockets are closed in the loop's next turn

    @property
    def address(self) -> str:
        """``host:port`` to connect to."""
        assert self._server is not None, "the proxy listens within its context only"
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def open_connections(self) -> int:
        """Connections that pass or hold bytes now."""
        return len(self._links)

    def to_server(self, **faults: object) -> None:
        """Set the faults of bytes to the server, as fields of ``Faults``; those not named are taken back."""
        self._set("server", Faults(**faults))  # type: ignore[arg-type]

    def to_client(self, **faults: object) -> None:
        """Set the faults of bytes to the client, as fields of ``Faults``; those not named are taken back."""
        self._set("client", Faults(**faults))  # type: ignore[arg-type]

    def both(self, **faults: object) -> None:
        """Set the faults of both directions."""
        self.to_server(**faults)
        self.to_client(**faults)

    def restore(self) -> None:
        """Take every fault back. Bytes that were swallowed stay lost: such a connection is of no use any more."""
        self.refusing = False
        self.both()

    def cut_connections(self) -> None:
        """Close both ends of every connection in order (FIN)."""
        for link in tuple(self._links):
            link.close(reset=False)

    def reset_connections(self) -> None:
        """Close both ends of every connection with a RST."""
        for link in tuple(self._links):
            link.close(reset=True)

    def half_open(self, gone: End) -> None:
        """Reset the ``gone`` end of every connection, and leave the other open and without an answer."""
        for link in tuple(self._links):
            link.sever(gone)

    def faults(self, to: End) -> Faults:
        """What is wrong now with bytes to ``to``."""
        return self._faults[to]

    async def change(self) -> None:
        """Wait until faults are set anew."""
        await self._changed.wait()

    def jitter_s(self, most_ms: float) -> float:
        """A delay of up to ``most_ms``."""
        return self._random.random() * most_ms / 1000 if most_ms else 0.0

    def flip(self, byte: int) -> int:
        """``byte`` with one bit turned."""
        return byte ^ (1 << self._random.randrange(8))

    def _set(self, to: End, faults: Faults) -> None:
        self._faults[to] = faults
        self._changed.set()
        self._changed.clear()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.refusing:
                raise ConnectionRefusedError
            far = await asyncio.open_connection(self._host, self._port, limit=CHUNK_BYTES)
        except OSError:
            _reset(writer)
            return
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        link = _Link(self, {"client": (reader, writer), "server": far})
        self._links.add(link)
        try:
            await link.run()
        except asyncio.CancelledError:
            link.abort()
            raise
        finally:
            self._links.discard(link)
            link.close(reset=False)


class _Link:
    """One client's connection and ours to the server."""

    def __init__(
        self, proxy: FaultProxy, streams: dict[End, tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    ) -> None:
        self._proxy = proxy
        self._streams = streams
        self._pumps: list[asyncio.Task[None]] = []
        self._kept: End | None = None

    async def run(self) -> None:
        """Pass bytes both ways until both ends are done, or one is severed and the other has gone."""
        self._pumps = [asyncio.create_task(self._pass_on(to)) for to in _ENDS]
        try:
            await asyncio.wait(self._pumps)
            if self._kept is not None:
                await self._swallow(self._kept)
        finally:
            for pump in self._pumps:
                pump.cancel()
            await asyncio.gather(*self._pumps, return_exceptions=True)

    def close(self, *, reset: bool) -> None:
        """Close both ends. The pumps end by themselves."""
        for _, writer in self._streams.values():
            _reset(writer) if reset else writer.close()
        for pump in self._pumps:
            pump.cancel()

    def abort(self) -> None:
        """Close both ends now, whatever they still had to send."""
        for _, writer in self._streams.values():
            writer.transport.abort()

    def sever(self, gone: End) -> None:
        """Reset one end and keep the other."""
        self._kept = "client" if gone == "server" else "server"
        _reset(self._streams[gone][1])
        for pump in self._pumps:
            pump.cancel()

    async def _pass_on(self, to: End) -> None:
        """Bytes to ``to``, from the other end, through the faults of that direction."""
        came_from: End = "client" if to == "server" else "server"
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_HELD_MAX)
        receiving = asyncio.create_task(self._receive(to, self._streams[came_from][0], line))
        try:
            await self._send(to, line)
        except ConnectionError:
            self.close(reset=True)
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)

    async def _receive(self, to: End, reader: asyncio.StreamReader, line: asyncio.Queue[tuple[float, bytes]]) -> None:
        """Read, and stamp each chunk with the instant at which it is due. An empty one is the end."""
        data = b"-"
        while data:
            try:
                data = await reader.read(CHUNK_BYTES)
            except ConnectionError:  # a RST at this end is a RST at the other
                self.close(reset=True)
                return
            faults = self._proxy.faults(to)
            await line.put((time.monotonic() + faults.latency_ms / 1000 + self._proxy.jitter_s(faults.jitter_ms), data))

    async def _send(self, to: End, line: asyncio.Queue[tuple[float, bytes]]) -> None:
        sent = 0
        writer = self._streams[to][1]
        while True:
            due, data = await line.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            while (faults := self._proxy.faults(to)).held:
                await self._proxy.change()
            if faults.blackhole:
                self._proxy.swallowed_bytes += len(data)
                if not data:
                    await asyncio.Event().wait()
                continue
            if not data:
                with suppress(OSError):  # the other direction may have closed it
                    writer.write_eof()
                return
            data = self._corrupted(faults, sent, data)
            limit = min((n for n in (faults.cut_after_bytes, faults.reset_after_bytes) if n is not None), default=None)
            if limit is not None:
                data = data[: max(0, limit - sent)]
            await self._write(to, writer, data, faults)
            sent += len(data)
            if limit is not None and sent >= limit:
                self.close(reset=limit == faults.reset_after_bytes)
                return

    async def _write(self, to: End, writer: asyncio.StreamWriter, data: bytes, faults: Faults) -> None:
        piece = len(data)
        if faults.bytes_per_s is not None:
            piece = max(1, min(piece, int(faults.bytes_per_s / PIECES_PER_S)))
        if faults.slice_bytes is not None:
            piece = min(piece, faults.slice_bytes)
        for start in range(0, len(data), max(1, piece)):
            part = data[start : start + piece]
            writer.write(part)
            await writer.drain()
            self._proxy.passed_bytes[to] += len(part)
            if faults.bytes_per_s is not None:
                await asyncio.sleep(len(part) / faults.bytes_per_s)
            elif piece < len(data):
                await asyncio.sleep(0)  # so that two slices are two segments

    def _corrupted(self, faults: Faults, sent: int, data: bytes) -> bytes:
        if faults.corrupt_byte is None or not sent <= faults.corrupt_byte < sent + len(data):
            return data
        changed = bytearray(data)
        changed[faults.corrupt_byte - sent] = self._proxy.flip(changed[faults.corrupt_byte - sent])
        return bytes(changed)

    async def _swallow(self, end: End) -> None:
        """Read what an end says to nobody, until it goes."""
        with suppress(ConnectionError):
            while data := await self._streams[end][0].read(CHUNK_BYTES):
                self._proxy.swallowed_bytes += len(data)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a RST: with a linger time of zero the kernel drops what is unsent (socket(7))."""
    connection = writer.get_extra_info("socket")
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
