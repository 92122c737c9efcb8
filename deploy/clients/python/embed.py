"""Vectors of the texts that are given as arguments, by the service config in the folder above.

    python embed.py dns:///embedserve.internal:50051 "hello world" "good night"

Needs grpcio, grpcio-status and the package embedserve (or code generated from proto/embedserve/v1/embedding.proto).
"""

# ruff: noqa: INP001, T201 - an example: it stands alone, and prints
from __future__ import annotations

import sys
from pathlib import Path

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1 import embedding_pb2_grpc as rpc

OPTIONS = [
    ("grpc.service_config", Path(__file__).parents[1].joinpath("service_config.json").read_text(encoding="utf-8")),
    # A peer that is gone without a word is noticed after 35 s. Python needs all three; the server allows 10 s or more.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    # Requests of more than 256 KiB are never retried unless there is room to keep them.
    ("grpc.per_rpc_retry_buffer_size", 16 << 20),
]


def why(error: grpc.RpcError) -> str:
    """The reason that the server gives, for a program to act on, and its sentence for people."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    reason = next((info.reason for detail in status.details if detail.Unpack(info)), "") if status else ""
    return f"{error.code().name} {reason}: {error.details()}"


def main(target: str, *texts: str) -> int:
    """Print one line a text: the vector's length and its first components."""
    with grpc.insecure_channel(target, options=OPTIONS) as channel:
        try:
            answer = rpc.EmbeddingServiceStub(channel).Embed(pb.EmbedRequest(texts=texts), timeout=5)
        except grpc.RpcError as error:
            print(why(error), file=sys.stderr)
            return 1
    for embedding in answer.embeddings:
        print(len(embedding.values), *(f"{value:.4f}" for value in embedding.values[:3]))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
