"""Every kind of call, for as long as somebody measures: answered, refused, failed, retried, wrong and given up."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import grpc

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.server.calls import WORDS

TENANT = "x-embedserve-tenant"
SLOW, POISON = "~", "the text poison"
CALLERS = 6
RETRYING = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 3, "initialBackoff": "0.02s", "maxBackoff": "0.1s", "backoffMultiplier": 2,
                    "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
                },
            }
        ]
    }
)  # fmt: skip


def _call(stub: EmbeddingServiceStub, rng: random.Random) -> None:
    words = rng.choice((3, 12, 40, 80))
    text = " ".join(rng.choices(WORDS, k=words))
    match rng.randrange(24):
        case 0:
            stub.Embed(pb.EmbedRequest(texts=[POISON]), timeout=5, metadata=((TENANT, "poisoner"),))
        case 1:
            stub.Embed(pb.EmbedRequest(texts=[text] * 60), timeout=5)
        case 2:
            stub.Embed(pb.EmbedRequest(texts=["hello"], model="another"), timeout=5)
        case 3:
            stub.Embed(pb.EmbedRequest(texts=[SLOW]), timeout=5)
        case 4:
            stub.Embed(pb.EmbedRequest(texts=[text]), timeout=0.05)
        case 5:
            stub.CountTokens(pb.CountTokensRequest(texts=[text]), timeout=5)
        case 6:
            list(stub.EmbedStream(pb.EmbedStreamRequest(texts=[text, "a", POISON]), timeout=5))
        case 7:
            stub.GetLoad(pb.GetLoadRequest(), timeout=5)
            stub.GetModel(pb.GetModelRequest(), timeout=5)
            stub.ListModels(pb.ListModelsRequest(), timeout=5)
        case _:
            stub.Embed(pb.EmbedRequest(texts=[text] * rng.randint(1, 4)), timeout=5)


@contextmanager
def mixed_load(address: str) -> Iterator[None]:
    """Callers that go on until the end of the block."""
    over = threading.Event()

    def caller(seed: int) -> None:
        rng = random.Random(seed)
        with grpc.insecure_channel(address, [("grpc.service_config", RETRYING)]) as channel:
            stub = EmbeddingServiceStub(channel)
            while not over.is_set():
                with suppress(grpc.RpcError):
                    _call(stub, rng)
                over.wait(0.01)

    with ThreadPoolExecutor(CALLERS) as pool:
        running = [pool.submit(caller, seed) for seed in range(CALLERS)]
        try:
            yield
        finally:
            over.set()
            for one in running:
                one.result(10)
