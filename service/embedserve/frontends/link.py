"""Frames between a front end and the engine process, over a Unix socket.

Decides how frames are told apart and when they are written: once a turn of the event loop, all of that turn in one
system call. Must never know what a frame means.

A frame is a little-endian head (bytes of the body, kind, call) and a body. What waits to be written is bounded by the
calls in flight, each of which has a bounded number of frames on its way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from struct import Struct
from typing import Final, cast

__all__ = ["FRAME_MAX_BYTES", "Link", "connect_link"]

_HEAD: Final = Struct("<IBI")
FRAME_MAX_BYTES: Final = 64 << 20
"""The largest body: vectors and ids go through memory, so that only a process gone mad sends more."""


class Link(asyncio.Protocol):
    """One end."""

    def __init__(self, on_frame: Callable[[int, int, bytes], None], on_lost: Callable[[], None]) -> None:
        """``on_frame(kind, call, body)`` for each frame; ``on_lost`` once when the other side has gone."""
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._transport: asyncio.WriteTransport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unread = b""
        self._unsent: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Frames may be sent."""
        self._transport = cast("asyncio.WriteTransport", transport)
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        """Tell of every frame that is here whole."""
        unread = self._unread + data if self._unread else data
        at, end = 0, len(unread)
        while end - at >= _HEAD.size:
            length, kind, call = _HEAD.unpack_from(unread, at)
            if length > FRAME_MAX_BYTES:
                raise ValueError(f"a frame of {length} bytes")
            if end - at < _HEAD.size + length:
                break
            body = unread[at + _HEAD.size : at + _HEAD.size + length]
            at += _HEAD.size + length
            self._on_frame(kind, call, body)
        self._unread = unread[at:]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - a lost side is a lost side
        """The other side has gone, or sent what is no frame."""
        if self._transport is not None:
            self._transport = None
            self._on_lost()

    @property
    def lost(self) -> bool:
        """Whether nothing will be sent any more."""
        return self._transport is None or self._transport.is_closing()

    def send(self, kind: int, call: int, body: bytes = b"") -> None:
        """Send at the end of this turn; nothing where the other side has gone."""
        if self._transport is None:
            return
        if not self._unsent:
            assert self._loop is not None
            self._loop.call_soon(self.flush)
        self._unsent.append(_HEAD.pack(len(body), kind, call))
        self._unsent.append(body)

    def flush(self) -> None:
        """Write what this turn has sent."""
        if self._transport is not None and self._unsent:
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()

    def close(self) -> None:
        """Write what waits, and close."""
        self.flush()
        if self._transport is not None:
            self._transport.close()


async def connect_link(
    descriptor: int, on_frame: Callable[[int, int, bytes], None], on_lost: Callable[[], None]
) -> Link:
    """The end of a socket pair that ``descriptor`` is."""
    import socket  # noqa: PLC0415 - one call at the start

    end = socket.socket(fileno=descriptor)
    end.setblocking(False)
    _transport, link = await asyncio.get_running_loop().create_connection(lambda: Link(on_frame, on_lost), sock=end)
    return link
