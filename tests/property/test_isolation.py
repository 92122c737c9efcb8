"""No caller ever sees another's row: 32 clients, texts of their own, cancels and deadlines in between."""

from __future__ import annotations

import asyncio
import random

import grpc
import grpc.aio
import pytest

from embedserve.model.backend import TokenBatch
from embedserve.testing import FakeBackend
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from tests.integration.server.calls import MAX_INPUT, expected, until, values
from tests.log_fixtures import silent_log  # noqa: F401 - an autouse fixture of this module

CLIENTS, REQUESTS = 32, 50


def pass_ns(batch: TokenBatch) -> int:
    """Long enough for callers to leave while their batch runs."""
    return 200_000 + 20 * len(batch.ids)


class Client:
    """Sends texts that only it sends, and compares every row that it gets."""

    def __init__(self, server: InProcessServer, number: int) -> None:
        self.server = server
        self.number = number
        self.rng = random.Random(number)
        self.rows = self.cancelled = 0

    def texts(self) -> list[str]:
        """Distinct for each client and call; of any length up to the model's."""
        words = ("hello", "world", "text", str(self.number), "to", "a")
        count = self.rng.randint(1, 12)
        return [self.text(words) for _ in range(count)]

    def text(self, words: tuple[str, ...]) -> str:
        more = " ".join(self.rng.choices(words, k=self.rng.randint(0, 40)))
        return f"{self.number} {self.rng.randrange(10**6)} {more}"

    def check(self, text: str, embedding: pb.Embedding) -> None:
        assert (values(embedding) == expected(text)).all(), f"client {self.number} got a row that is not of {text!r}"
        self.rows += 1

    async def run(self) -> None:
        for _ in range(REQUESTS):
            texts = self.texts()
            act = self.rng.random()
            try:
                if act < 0.3:
                    await self.stream(texts, leave=act < 0.1)
                elif act < 0.5:
                    call = self.server.stub.Embed(pb.EmbedRequest(texts=texts, truncate=pb.TRUNCATE_END))
                    await asyncio.sleep(self.rng.random() * 0.004)
                    self.cancelled += call.cancel()
                    await call
                else:
                    timeout = 0.002 if act < 0.6 else 30
                    how = {"timeout": timeout, "metadata": (("x-embedserve-tenant", f"tenant-{self.number}"),)}
                    answer = await self.server.stub.Embed(pb.EmbedRequest(texts=texts, truncate=pb.TRUNCATE_END), **how)
                    assert len(answer.embeddings) == len(texts)
                    for text, embedding in zip(texts, answer.embeddings, strict=True):
                        self.check(text, embedding)
            except asyncio.CancelledError:
                continue
            except grpc.aio.AioRpcError as error:
                assert error.code() in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}  # noqa: PT017

    async def stream(self, texts: list[str], *, leave: bool) -> None:
        stream = self.server.stub.EmbedStream(pb.EmbedStreamRequest(texts=texts, truncate=pb.TRUNCATE_END))
        while (message := await stream.read()) is not grpc.aio.EOF:
            for embedding in message.embeddings:
                self.check(texts[embedding.index], embedding)
            if leave:
                self.cancelled += stream.cancel()
                return


@pytest.mark.parametrize("shape", ["packed", "bucketed"])
async def test_interleaved_clients_never_see_anothers_row(shape: str) -> None:
    settings = {"scheduling.shape": shape, "scheduling.max_batch_items": "24", "admission.policies": ""}
    async with serving(FakeBackend(pass_ns=pass_ns), settings=settings) as server:
        clients = [Client(server, number) for number in range(CLIENTS)]
        await asyncio.gather(*(client.run() for client in clients))
        await until(lambda: server.guard.in_flight == 0)
        load = server.engine.load()

    assert load.queue_depth == 0
    assert max(rows for rows, _ in server.backend.passes) > 12, "batches held several callers' rows"
    assert sum(client.rows for client in clients) > CLIENTS * REQUESTS
    assert sum(client.cancelled for client in clients) > CLIENTS
    assert all(tokens <= 24 * MAX_INPUT for _, tokens in server.backend.passes)
