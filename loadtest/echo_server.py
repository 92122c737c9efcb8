"""A bare grpc.aio server that gives every call the same bytes: ``python -m loadtest.echo_server TEXTS DIMENSION``.

Decides nothing: it is the ceiling that gRPC itself sets on this machine. Same event loop (uvloop), same kind of process
and same number of bytes in both directions as embedserve's answer to a call of so many texts; no model, no tokenizer,
no scheduler, no telemetry. It prints the same line as the product when it listens, and ends with SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import Any

import grpc
import grpc.aio
import uvloop

from embedserve.v1 import embedding_pb2 as pb

SERVICE = "embedserve.v1.EmbeddingService"


def answer(texts: int, dimension: int) -> bytes:
    """An EmbedResponse as large as the product's."""
    stage = 0.125
    embeddings = [pb.Embedding(index=i, values=[0.5] * dimension, token_count=12, batch_size=32) for i in range(texts)]
    times = pb.Timings(validate_ms=stage, tokenize_ms=stage, queue_ms=stage, assemble_ms=stage, forward_ms=stage,
                       respond_ms=stage, total_ms=6 * stage)  # fmt: skip
    response = pb.EmbedResponse(
        embeddings=embeddings,
        model=pb.ModelIdentity(name="null-384", revision="0" * 12, weights_digest="sha256:" + "0" * 64),
        dimensions=dimension,
        encoding=pb.ENCODING_FLOAT32,
        usage=pb.Usage(texts=texts, tokens=12 * texts, batches=1),
        timings=times,
    )
    return response.SerializeToString()


async def serve(reply: bytes) -> None:
    """Until SIGTERM."""

    async def echo(_request: bytes, _context: object) -> bytes:
        return reply

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_concurrent_streams", 1024)])
    handlers: dict[str, Any] = {"Embed": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"event": "serving", "address": f"127.0.0.1:{port}"}), flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await server.stop(0)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(answer(int(sys.argv[1]), int(sys.argv[2]))))
