"""The cheapest client that speaks gRPC: HTTP/2 frames by hand, about a fifth of what grpc.aio costs a call.

Decides nothing about load: it sends one request and tells how it ended. Whoever measures a server on the cores that the
client runs on too measures the client as well; 300 calls a second through grpc.aio took 13 % of a core here. One
connection, no compression; the dynamic table is refused in the first SETTINGS, so that each header block can be read by
itself. Both directions keep to flow control, a call that is given up is reset, and a connection that says GOAWAY ends
what it has. Sources: RFC 9113 and 7541, gRPC over HTTP/2.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from loadtest.answer import CANCELLED, DEADLINE_EXCEEDED, OK, UNAVAILABLE, UNKNOWN, Answer
from loadtest.ending import code_of_reset, is_good, read_ending
from loadtest.header_block import literal

__all__ = ["Connection", "head_of"]

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
WINDOW: Final = (1 << 31) - 1
GIVE_BACK: Final = 1 << 28
"""Bytes after which the server is told that its answers were read."""
HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 3, 4, 5
LAST_STREAM: Final = WINDOW - 1000
"""Stream numbers end there; a call later would be refused."""
CANCEL: Final = 8


class _Stream:
    """One call in flight."""

    __slots__ = ("answer", "body", "done", "head", "keep", "window")

    def __init__(self, done: asyncio.Future[Answer], keep: bool, window: int) -> None:
        self.done = done
        self.keep = keep
        self.answer = Answer()
        self.window = window
        """Bytes of DATA that the server still takes on this stream."""
        self.body: memoryview | None = None
        """What is left to send."""
        self.head = b""
        """The first header block, where it was no plain 200."""


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame."""
    return struct.pack("!I", len(payload) << 8 | kind) + struct.pack("!BI", flags, stream) + payload


def head_of(
    authority: str,
    path: str,
    timeout_s: float | None,
    metadata: Sequence[tuple[str, str]],
    *,
    secure: bool = False,
) -> bytes:
    """The header block of a call."""
    head = (b"\x83\x87" if secure else b"\x83\x86") + b"\x04" + literal("", path)[2:]
    head += b"\x01" + literal("", authority)[2:]
    head += literal("content-type", "application/grpc") + literal("te", "trailers")
    if timeout_s is not None:
        head += literal("grpc-timeout", f"{max(1, round(timeout_s * 1000))}m")
    for name, value in metadata:
        head += literal(name.lower(), value)
    return head


class Connection(asyncio.Protocol):
    """One connection to one server. ``call`` and ``exchange`` may be used by many tasks at once."""

    def __init__(
        self,
        authority: str,
        path: str,
        timeout_s: float | None,
        metadata: tuple[tuple[str, str], ...],
        *,
        secure: bool = False,
    ) -> None:
        """Every call has this path, deadline and metadata."""
        self._head = head_of(authority, path, timeout_s, metadata, secure=secure)
        self._transport: Any = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._next = -1
        self._streams: dict[int, _Stream] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._streams_max = WINDOW
        self._buffer = b""
        self._block = b""
        self._block_ends_stream = False
        self._window = 65_535
        self._stream_window = 65_535
        self._frame_max = 16_384
        self._held: deque[int] = deque()
        """Streams that have more to send than the server takes now, in order."""
        self._unread = 0
        self._leaving = False

    async def ready(self) -> None:
        """Until the server has said its settings. Raises ``ConnectionError`` when it goes away instead."""
        await self._ready

    @property
    def peer(self) -> str:
        """The server's address in numbers, ``host:port``."""
        host, port, *_ = self._transport.get_extra_info("peername")
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def usable(self) -> bool:
        """Whether a new call may be sent."""
        return not (self._leaving or self._transport.is_closing() or self._next > LAST_STREAM)

    async def call(self, message: bytes) -> tuple[int, float]:
        """Send one request; its status code, and the pushback in milliseconds (NaN where there was none)."""
        answer = await self._exchange(message, keep=False)
        return answer.code, answer.pushback_ms

    async def exchange(self, message: bytes, timeout_s: float | None = None) -> Answer:
        """Send one request and keep what comes back.

        A call whose time is over, and one whose caller is cancelled, is reset at the server; the former ends as
        DEADLINE_EXCEEDED, as it does with every gRPC client.
        """
        return await self._exchange(message, keep=True, timeout_s=timeout_s)

    def close(self) -> None:
        """End the connection; calls in flight end as UNAVAILABLE."""
        if self._transport is not None:
            self._transport.close()

    async def _exchange(self, message: bytes, *, keep: bool, timeout_s: float | None = None) -> Answer:
        assert self._transport is not None
        while len(self._streams) >= self._streams_max and self.usable:
            await self._turn()
        if not self.usable:
            answer = Answer()
            answer.code = UNAVAILABLE
            return answer
        self._next += 2
        number = self._next
        stream = self._streams[number] = _Stream(asyncio.get_running_loop().create_future(), keep, self._stream_window)
        self._send(number, stream, b"\x00" + struct.pack("!I", len(message)) + message)
        if timeout_s is None:
            timer = None
        else:
            timer = asyncio.get_running_loop().call_later(timeout_s, self._give_up, number, DEADLINE_EXCEEDED)
        try:
            return await stream.done
        except asyncio.CancelledError:
            self._give_up(number, CANCELLED)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    async def _turn(self) -> None:
        """Until another call has ended."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had come, and somebody else shall have it
                self._wake(1)
            raise

    # ------------------------------------------------------------------------------------------------------- sending

    def _send(self, number: int, stream: _Stream, body: bytes) -> None:
        size, write = len(body), self._transport.write
        head = frame(HEADERS, END_HEADERS, number, self._head)
        if not self._held and size <= min(self._window, stream.window, self._frame_max):
            self._window -= size
            write(head + frame(DATA, END_STREAM, number, body))
            return
        write(head)
        stream.body = memoryview(body)
        self._held.append(number)
        self._send_held()

    def _send_held(self) -> None:
        """As much of what is held as the windows allow, oldest stream first."""
        for number in list(self._held):
            stream = self._streams.get(number)
            while stream is not None and stream.body is not None:
                size = min(len(stream.body), self._window, stream.window, self._frame_max)
                if size <= 0:
                    break
                part, rest = stream.body[:size], stream.body[size:]
                self._window -= size
                stream.window -= size
                stream.body = rest if len(rest) else None
                self._transport.write(frame(DATA, 0 if len(rest) else END_STREAM, number, bytes(part)))
            if stream is None or stream.body is None:
                self._held.remove(number)
            if self._window <= 0:
                return

    # ------------------------------------------------------------------------------------------------------- asyncio

    def connection_made(self, transport: Any) -> None:
        """Say who we are: no dynamic table, and all the window that there is."""
        self._transport = transport
        settings = struct.pack("!HIHI", HEADER_TABLE_SIZE, 0, INITIAL_WINDOW_SIZE, WINDOW)
        opening = PREFACE + frame(SETTINGS, 0, 0, settings)
        transport.write(opening + frame(WINDOW_UPDATE, 0, 0, struct.pack("!I", WINDOW - 65_535)))

    def connection_lost(self, exc: Exception | None) -> None:
        """Everybody who waits is told."""
        self._leaving = True
        if not self._ready.done():
            self._ready.set_exception(ConnectionError(f"the server closed the connection: {exc or 'no HTTP/2 there?'}"))
        for number in list(self._streams):
            self._settle(number, UNAVAILABLE)
        self._wake(len(self._waiting))

    def data_received(self, data: bytes) -> None:
        """Frames, whole or not."""
        buffer = self._buffer + data if self._buffer else data
        at, end = 0, len(buffer)
        while end - at >= 9:
            size = int.from_bytes(buffer[at : at + 3], "big")
            if end - at < 9 + size:
                break
            stream = int.from_bytes(buffer[at + 5 : at + 9], "big") & WINDOW
            self._take(buffer[at + 3], buffer[at + 4], stream, buffer[at + 9 : at + 9 + size])
            at += 9 + size
        self._buffer = buffer[at:]

    # ----------------------------------------------------------------------------------------------------- receiving

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == DATA:
            self._data(flags, number, payload)
        elif kind in (HEADERS, CONTINUATION):
            self._headers(kind, flags, number, payload)
        elif kind == SETTINGS and not flags & ACK:
            self._settings(payload)
        elif kind == PING and not flags & ACK:
            self._transport.write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            self._grant(number, int.from_bytes(payload, "big"))
        elif kind == RST_STREAM:
            self._settle(number, code_of_reset(int.from_bytes(payload[:4], "big")))
        elif kind == GOAWAY:
            self._leaving = True
            last = int.from_bytes(payload[:4], "big") & WINDOW
            for beyond in [n for n in self._streams if n > last]:
                self._settle(beyond, UNAVAILABLE)
            self._wake(len(self._waiting))
            self._close_if_done()

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        self._unread += len(payload)
        if self._unread >= GIVE_BACK:
            self._transport.write(frame(WINDOW_UPDATE, 0, 0, struct.pack("!I", self._unread)))
            self._unread = 0
        stream = self._streams.get(number)
        if stream is None:
            return
        if flags & PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        if stream.keep and payload:
            answer = stream.answer
            if not answer.first_at:
                answer.first_at = time.monotonic()
            answer.parts.append(payload)
        if flags & END_STREAM:  # without trailers
            self._settle(number, UNKNOWN)

    def _headers(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == HEADERS:
            if flags & PADDED:
                payload = payload[1 : len(payload) - payload[0]]
            if flags & PRIORITY:
                payload = payload[5:]
            self._block_ends_stream = bool(flags & END_STREAM)
            self._block = payload
        else:
            self._block += payload
        if not flags & END_HEADERS:
            return
        if self._block_ends_stream:
            self._end(number, self._block)
        elif self._block[:1] != b"\x88" and (stream := self._streams.get(number)) is not None:
            # Not the static table's ":status 200": remember what a proxy says, should it be the last word.
            stream.head = self._block

    def _settings(self, payload: bytes) -> None:
        for at in range(0, len(payload) - 5, 6):
            name, value = struct.unpack_from("!HI", payload, at)
            if name == INITIAL_WINDOW_SIZE:
                for number in self._held:
                    if (stream := self._streams.get(number)) is not None:
                        stream.window += value - self._stream_window
                self._stream_window = value
            elif name == MAX_FRAME_SIZE:
                self._frame_max = value
            elif name == MAX_CONCURRENT_STREAMS:
                self._streams_max = value
        self._transport.write(frame(SETTINGS, ACK, 0, b""))
        if not self._ready.done():
            self._ready.set_result(None)
        self._send_held()
        self._wake(len(self._waiting))

    def _grant(self, number: int, size: int) -> None:
        if not number:
            self._window += size
        elif (stream := self._streams.get(number)) is not None:
            stream.window += size
        if self._held:
            self._send_held()

    def _end(self, number: int, block: bytes) -> None:
        if is_good(block):
            self._settle(number, OK)
            return
        stream = self._streams.get(number)
        if stream is None:
            return
        read_ending(stream.answer, block, stream.head)
        self._settle(number, stream.answer.code)

    # ------------------------------------------------------------------------------------------------------- endings

    def _give_up(self, number: int, code: int) -> None:
        if number in self._streams:
            self._reset(number)
            self._settle(number, code)

    def _reset(self, number: int) -> None:
        if not self._transport.is_closing():
            self._transport.write(frame(RST_STREAM, 0, number, struct.pack("!I", CANCEL)))

    def _settle(self, number: int, code: int) -> None:
        stream = self._streams.pop(number, None)
        if stream is None:
            return
        if stream.body is not None:  # the server has answered before it had read all
            stream.body = None
            self._reset(number)
        if not stream.done.done():
            stream.answer.code = code
            stream.done.set_result(stream.answer)
        self._wake(1)
        self._close_if_done()

    def _wake(self, count: int) -> None:
        while count and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                count -= 1

    def _close_if_done(self) -> None:
        if self._leaving and not self._streams:
            self._transport.close()
