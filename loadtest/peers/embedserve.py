"""embedserve as it is, among its peers: the same process that ``make serve`` starts.

Decides its settings here: all defaults. Must never know how calls are scheduled or counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1 import embedding_pb2_grpc
from loadtest.peers.peer import HOST, Launch, Peer, Vectors
from loadtest.targets.embedserve import Options, WireTarget

__all__ = ["Embedserve"]

VECTORS_S_MAX = 60.0


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


class EmbedserveTarget(WireTarget):
    """The load test's own client, and vectors by the client that users have."""

    def __init__(self, address: str) -> None:
        """Nothing is opened yet."""
        super().__init__(Options(address=address))
        self._address = address

    async def vectors(self, texts: Sequence[str]) -> Vectors:
        """As ``VectorTarget`` says."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]
            request = pb.EmbedRequest(texts=texts, truncate=pb.TRUNCATE_END)
            try:
                answer = await stub.Embed(request, timeout=VECTORS_S_MAX)
            except grpc.aio.AioRpcError as error:
                raise ConnectionError(f"embedserve answered {error.code().name}: {error.details()}") from error
        return np.array([item.values for item in answer.embeddings], dtype=np.float32)
