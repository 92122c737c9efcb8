"""sentence-transformers itself: what one has without a server.

Decides the two ways in which it is timed. ``embed`` is a program that encodes each call's texts as they come, one call
at a time (``encode_loop.py``); ``offline`` is one ``encode`` over all texts at once in its best batch size, which no
online service can have: an upper bound. Must never know how calls are scheduled or counted.
"""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.peers.peer import Launch, Peer, Vectors
from loadtest.target import Reply

__all__ = ["EncodeTarget", "SentenceTransformers"]

LOOP = Path(__file__).parent / "encode_loop.py"
OPEN_S_MAX = 10.0
OFFLINE_S_MAX = 300.0
BATCH_SIZES = (8, 32, 128)
"""Tried for ``offline``; 32 is the library's default."""
ECHO_CALLS = 200


class SentenceTransformers(Peer):
    """``SentenceTransformer.encode`` in a process of its own."""

    name = "sentence-transformers"
    about = "sentence-transformers 6.2.0: model.encode, one call at a time"
    requirements = ("sentence-transformers==6.2.0",)
    variants = ("float32", "bfloat16")

    def launch(self, python: Path, model: Path, port: int) -> Launch:
        """The loop, run by the peer's interpreter."""
        # -P: this folder, which has a module of the library's name, is not on its path.
        return Launch([str(python), "-P", str(LOOP), str(model), str(port), self.variant], {"HF_HUB_OFFLINE": "1"})

    def target(self, address: str, model: Path) -> EncodeTarget:
        """A connection for each call at once."""
        del model
        return EncodeTarget(address)


class EncodeTarget:
    """A client of the loop: a pool of connections, as many as there are calls at once."""

    def __init__(self, address: str) -> None:
        """Nothing is opened yet."""
        self._host, _, self._port = address.rpartition(":")
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def open(self) -> None:
        """Connect once. Raises ``ConnectionError``."""
        try:
            self._idle.append(await asyncio.wait_for(self._connect(), OPEN_S_MAX))
        except (OSError, TimeoutError) as error:
            raise ConnectionError(f"the encode loop at port {self._port} did not answer: {error!r}") from error

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Reply:
        """One frame there, one back."""
        try:
            body = await asyncio.wait_for(self._ask({"texts": list(texts)}), timeout_s)
        except TimeoutError:
            return Reply("DEADLINE_EXCEEDED")
        except (OSError, asyncio.IncompleteReadError):
            return Reply("UNAVAILABLE")
        return Reply("OK", items=len(_rows(body, len(texts))))

    async def vectors(self, texts: Sequence[str]) -> Vectors:
        """As ``VectorTarget`` says."""
        try:
            return _rows(await self._ask({"texts": list(texts)}), len(texts))
        except (OSError, asyncio.IncompleteReadError) as error:
            raise ConnectionError(f"the encode loop ended: {error!r}") from error

    async def offline(self, texts: Sequence[str], batch_size: int) -> float:
        """Texts a second of one ``encode`` over all of them, timed in the peer's process."""
        asked = self._ask({"offline": list(texts), "batch_size": batch_size})
        told = json.loads(await asyncio.wait_for(asked, OFFLINE_S_MAX))
        return float(told["texts"] / told["seconds"])

    async def loop_cost_us(self, texts: Sequence[str]) -> float:
        """What socket and frames cost a call, without the model: median of ``ECHO_CALLS``, one after another."""
        took = []
        for _ in range(ECHO_CALLS):
            begun = time.perf_counter()
            await self._ask({"echo": list(texts)})
            took.append(time.perf_counter() - begun)
        return float(np.median(took) * 1e6)

    async def close(self) -> None:
        """Give up the connections."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, int(self._port), limit=64 << 20)

    async def _ask(self, frame: Any) -> bytes:
        reader, writer = self._idle.pop() if self._idle else await self._connect()
        try:
            body = json.dumps(frame).encode()
            writer.write(struct.pack("!I", len(body)) + body)
            (size,) = struct.unpack("!I", await reader.readexactly(4))
            found = await reader.readexactly(size)
        except BaseException:
            # A frame that was given up leaves an answer behind: the connection is of no more use.
            writer.close()
            raise
        self._idle.append((reader, writer))
        return found


def _rows(body: bytes, count: int) -> Vectors:
    rows: Vectors = np.frombuffer(body, dtype="<f4")
    if not count or not rows.size or rows.size % count:
        raise ConnectionError(f"the encode loop gave {rows.size} floats for {count} texts")
    return rows.reshape(count, -1)
