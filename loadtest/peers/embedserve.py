"""embedserve as it is, among its peers: the same process that ``make serve`` starts.

Decides its settings here: all defaults. Must never know how calls are scheduled or counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1 import embedding_pb2_grpc
from loadtest.peers.peer import HOST, Launch, Peer, Vectors
from loadtest.target import Reply

__all__ = ["Embedserve"]

OPEN_S_MAX = 10.0
MESSAGE_BYTES_MAX = 64 << 20


class Embedserve(Peer):
    """This project."""

    name = "embedserve"
    about = "embedserve with its defaults, from this tree"
    variants = ("default", "float32", "bfloat16")

    def launch(self, python: Path, model: Path, port: int) -> Launch:
        """``embedserve serve`` on the checkpoint's folder; the same interpreter that runs us."""
        command = [str(python), "-m", "embedserve", "serve", "--model.source", str(model), "--server.address",
                   f"{HOST}:{port}", "--operations.address", f"{HOST}:0", "--shutdown.settle_ms", "0"]  # fmt: skip
        if self.variant != "default":
            command += ["--model.dtype", self.variant]
        return Launch(command)

    def target(self, address: str, model: Path) -> EmbedserveTarget:
        """A client by gRPC."""
        del model
        return EmbedserveTarget(address)


class EmbedserveTarget:
    """grpc.aio and the generated code, as a user's client has it."""

    def __init__(self, address: str) -> None:
        """Nothing is opened yet."""
        self._address = address
        self._channel: Any = None
        self._stub: Any = None

    async def open(self) -> None:
        """Connect. Raises ``ConnectionError`` after 10 s."""
        limits = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)]
        self._channel = grpc.aio.insecure_channel(self._address, options=limits)
        self._stub = embedding_pb2_grpc.EmbeddingServiceStub(self._channel)  # type: ignore[no-untyped-call]
        try:
            await asyncio.wait_for(self._channel.channel_ready(), OPEN_S_MAX)
        except TimeoutError:
            raise ConnectionError(f"embedserve at {self._address} did not answer within {OPEN_S_MAX:.0f} s") from None

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Reply:
        """One ``Embed``."""
        try:
            answer = await self._stub.Embed(pb.EmbedRequest(texts=texts, truncate=pb.TRUNCATE_END), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            return Reply(error.code().name)
        return Reply("OK", items=len(answer.embeddings))

    async def vectors(self, texts: Sequence[str]) -> Vectors:
        """As ``VectorTarget`` says."""
        try:
            answer = await self._stub.Embed(pb.EmbedRequest(texts=texts, truncate=pb.TRUNCATE_END), timeout=60)
        except grpc.aio.AioRpcError as error:
            raise ConnectionError(f"embedserve answered {error.code().name}: {error.details()}") from error
        return np.array([item.values for item in answer.embeddings], dtype=np.float32)

    async def close(self) -> None:
        """Give up the channel."""
        if self._channel is not None:
            await self._channel.close()
