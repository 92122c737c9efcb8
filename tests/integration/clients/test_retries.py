"""What a client with the published service config does with each refusal, and what the server tells it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from embedserve.api import guard
from embedserve.api.rpc import Rpc
from embedserve.model.backend import BatchResult, TokenBatch
from embedserve.testing import FakeBackend, FaultPlan, FaultyBackend
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.clients.fleet import connect, published
from tests.integration.server.calls import Failure, LoadingBackend, failure, poison_id, until

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
MOST = 4
"""``maxAttempts`` of Embed in the service config."""
HELLO = pb.EmbedRequest(texts=["hello"])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Calls that the server began, by method and attempt, as its guard sees them."""
    counts: Counter[tuple[str, int]] = Counter()
    begin = guard.Guard._begin

    def counting(self: guard.Guard, call: Rpc, context: Any) -> None:
        begin(self, call, context)
        counts[call.method.rpartition("/")[2], int(call.attributes.get("attempt", 1))] += 1

    monkeypatch.setattr(guard.Guard, "_begin", counting)
    return counts


def attempts(seen: Counter[tuple[str, int]], method: str = "Embed") -> list[int]:
    """Which attempts of ``method`` came, each once."""
    assert all(count == 1 for (name, _), count in seen.items() if name == method)
    return sorted(attempt for name, attempt in seen if name == method)


@asynccontextmanager
async def client(server: InProcessServer, **options: Any) -> AsyncIterator[Any]:
    async with connect(server.address, **options) as channel:
        yield EmbeddingServiceStub(channel)


@asynccontextmanager
async def full(queue_items: int = 4) -> AsyncIterator[InProcessServer]:
    """A server whose queue is full until its gate opens."""
    settings = {
        "scheduling.max_queue_items": str(queue_items),
        "limits.max_texts": str(queue_items),
        "scheduling.max_batch_items": "1",
        "scheduling.batches_in_flight": "1",
        "admission.policies": "none",
    }
    async with serving(FaultyBackend(FaultPlan()), settings=settings) as server:
        for _ in range(5):
            await server.stub.Embed(HELLO)
        server.plan.gate.clear()
        held = []
        for _ in range(queue_items):
            held.append(asyncio.ensure_future(server.stub.Embed(HELLO)))
            await until(lambda: server.engine.requests == len(held))
        yield server
        server.plan.gate.set()
        await asyncio.gather(*held)


async def refusal(call: Awaitable[Any]) -> Failure:
    """Why a call was shed."""
    error = await failure(call)
    assert error.code is EXHAUSTED
    return error


class TestTrailersOnly:
    """Response headers end a client's right to retry (gRFC A6): a refusal is sent without."""

    @pytest.mark.parametrize("streamed", [False, True])
    @pytest.mark.parametrize("texts", [1, 4])
    async def test_of_a_call_that_is_shed(self, streamed: bool, texts: int) -> None:
        async with full() as server:
            assert await headers_of_refusal(server, streamed, ["hello"] * texts) == (EXHAUSTED, [])

    @pytest.mark.parametrize("streamed", [False, True])
    async def test_of_a_call_that_comes_too_early(self, streamed: bool) -> None:
        backend = LoadingBackend()
        async with serving(backend, wait_ready=False) as server:
            refused = await headers_of_refusal(server, streamed, ["hello"])
            backend.warm.set()

        assert refused == (grpc.StatusCode.UNAVAILABLE, [])


async def headers_of_refusal(
    server: InProcessServer, streamed: bool, texts: list[str]
) -> tuple[grpc.StatusCode, list[Any]]:
    """Status and response headers of a call that fails; empty headers mean that there were none."""
    stub = server.stub
    call = (
        stub.EmbedStream(pb.EmbedStreamRequest(texts=texts)) if streamed else stub.Embed(pb.EmbedRequest(texts=texts))
    )
    error = await failure(call.read() if streamed else call)
    return error.code, list(await call.initial_metadata())


class TestOverload:
    """A refusal that may pass is tried again when the server says so."""

    async def test_a_refused_call_is_tried_until_it_is_taken(self, seen: Counter[tuple[str, int]]) -> None:
        async with full() as server, client(server) as stub:
            seen.clear()
            call = asyncio.ensure_future(stub.Embed(HELLO))
            await until(lambda: seen["Embed", 2] == 1)
            server.plan.gate.set()
            answer = await call

        assert len(answer.embeddings) == 1
        assert attempts(seen)[:2] == [1, 2]

    async def test_it_is_tried_four_times_and_the_last_refusal_is_told(self, seen: Counter[tuple[str, int]]) -> None:
        async with full() as server, client(server) as stub:
            seen.clear()
            error = await refusal(stub.Embed(HELLO))

        assert error.reason == "QUEUE_FULL"
        assert attempts(seen) == [1, 2, 3, 4] == list(range(1, MOST + 1))

    async def test_a_stream_is_tried_again_before_its_first_message(self, seen: Counter[tuple[str, int]]) -> None:
        async with full() as server, client(server) as stub:
            seen.clear()
            call = stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"]))
            first = asyncio.ensure_future(call.read())
            await until(lambda: seen["EmbedStream", 2] == 1)
            server.plan.gate.set()

            assert len((await first).embeddings) == 1

    async def test_a_stream_is_not_tried_again_after_its_first_message(self, seen: Counter[tuple[str, int]]) -> None:
        """The client has rows that it would get twice."""
        settings = {"scheduling.max_batch_items": "1", "server.stream_window_items": "4", "shutdown.grace_ms": "0"}
        async with serving(FaultyBackend(FaultPlan()), settings=settings) as server, client(server) as stub:
            call = stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"] * 600))
            await call.read()
            server.plan.gate.clear()
            server.begin_stop()
            error: Failure | None = None
            while error is None:
                try:
                    await call.read()
                except grpc.aio.AioRpcError as ended:
                    error = ended
            server.plan.gate.set()

        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert attempts(seen, "EmbedStream") == [1]

    async def test_a_request_over_the_clients_buffer_is_tried_once_unless_there_is_room(
        self, seen: Counter[tuple[str, int]]
    ) -> None:
        """256 KiB in the C core; the examples raise it."""
        large = pb.EmbedRequest(texts=["a " * 150_000], truncate=pb.TRUNCATE_END)
        async with full() as server:
            seen.clear()
            async with client(server) as stub:
                await refusal(stub.Embed(large))
            assert attempts(seen) == [1]
            seen.clear()
            async with client(server, options=(("grpc.per_rpc_retry_buffer_size", 1 << 20),)) as stub:
                await refusal(stub.Embed(large))
            assert attempts(seen) == [1, 2, 3, 4]


class TestNever:
    """A refusal that waiting cannot change says so, and is not tried again."""

    @pytest.mark.parametrize("streamed", [False, True])
    async def test_what_never_fits(self, seen: Counter[tuple[str, int]], streamed: bool) -> None:
        settings = {"scheduling.max_queue_tokens": "128", "scheduling.max_batch_tokens": "128"}
        texts = ["a " * 40] * 4
        async with serving(settings=settings) as server, client(server) as stub:
            call = (
                stub.EmbedStream(pb.EmbedStreamRequest(texts=texts)).read()
                if streamed
                else stub.Embed(pb.EmbedRequest(texts=texts))
            )
            error = await refusal(call)

        assert (error.reason, error.pushback_ms, error.retry_ms) == ("SUBMISSION_EXCEEDS_QUEUE", -1, None)
        assert attempts(seen, "EmbedStream" if streamed else "Embed") == [1]

    @pytest.mark.parametrize("text", ["poison", ""])
    async def test_what_is_wrong_with_the_text(self, seen: Counter[tuple[str, int]], text: str) -> None:
        """Whosever fault it is: INTERNAL has a pushback of -1, INVALID_ARGUMENT is in nobody's policy."""
        config = published()
        config["methodConfig"][0]["retryPolicy"]["retryableStatusCodes"].append("INTERNAL")

        async with (
            serving(FaultyBackend(FaultPlan(raise_on_id=poison_id()))) as server,
            client(server, config=config) as stub,
        ):
            error = await failure(stub.Embed(pb.EmbedRequest(texts=[text])))

        assert error.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)
        assert attempts(seen) == [1]


DRAIN_MS = 200
"""``admission.throughput.max_drain_ms``: a caller may come back when there is room below 0.8 of it."""


class Paced(FakeBackend):
    """20 ms a pass, and none while the gate is shut."""

    def __init__(self) -> None:
        super().__init__(pass_ns=lambda _batch: 20_000_000)
        self.gate = threading.Event()
        self.gate.set()

    def embed(self, batch: TokenBatch) -> BatchResult:
        self.gate.wait()
        return super().embed(batch)


@asynccontextmanager
async def backlog(texts: int) -> AsyncIterator[InProcessServer]:
    """A server that knows its pace, and has so many single-text passes before it of which the first does not end."""
    settings = {
        "scheduling.max_batch_items": "1",
        "scheduling.batches_in_flight": "1",
        "admission.throughput.max_drain_ms": str(DRAIN_MS),
    }
    backend = Paced()
    async with serving(backend, settings=settings) as server:
        for _ in range(8):
            await server.stub.Embed(HELLO)
        backend.gate.clear()
        held = asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello"] * texts)))
        await until(lambda: server.engine.load().running_items == 1)
        yield server
        backend.gate.set()
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)


class TestHint:
    """When to come back is our honest estimate, and not the same for all."""

    async def test_it_comes_from_the_backlog(self) -> None:
        """The time until there is room again, as the server's own load report has it, a fifth either way."""
        drains = []
        for texts in (30, 90):
            async with backlog(texts) as server:
                before_ms = server.engine.load().estimated_drain_time_ms
                hints = [(await refusal(server.stub.Embed(HELLO))).retry_ms or 0 for _ in range(10)]
                after_ms = server.engine.load().estimated_drain_time_ms
            drains.append(before_ms)

            # The pass that hangs makes the estimate grow meanwhile. What is refused needs a pass of its own.
            pass_ms = after_ms / texts
            assert min(hints) >= 0.8 * (before_ms - 0.8 * DRAIN_MS) - 1
            assert max(hints) <= 1.2 * (after_ms - 0.8 * DRAIN_MS + 2 * pass_ms) + 1

        assert drains[1] > 2 * drains[0] > 2 * DRAIN_MS

    async def test_those_refused_together_do_not_come_back_together(self) -> None:
        async with full() as server:
            errors = await asyncio.gather(*(refusal(server.stub.Embed(HELLO)) for _ in range(300)))
        figures = {(error.reason, error.metadata["queued_items"]) for error in errors}
        hints = [error.pushback_ms or 0 for error in errors]

        assert figures == {("QUEUE_FULL", "4")}
        assert all(error.pushback_ms == round(error.retry_ms or 0) for error in errors)
        # One estimate, times 0.8 to 1.2: the pass that hangs makes it grow meanwhile, so the spread is at least that.
        assert max(hints) / min(hints) > 1.3
        assert len(set(hints)) > 10

    async def test_who_cannot_wait_so_long_is_told_at_once(self, seen: Counter[tuple[str, int]]) -> None:
        """Retries share the call's deadline: a client told to wait past it would only sit it out."""
        async with backlog(90) as server, client(server) as stub:
            seen.clear()
            begun = time.monotonic()
            error = await refusal(stub.Embed(HELLO, timeout=0.4))
            took = time.monotonic() - begun

        assert error.metadata["policy"] in ("deadline", "throughput")
        assert error.pushback_ms == -1
        assert error.retry_ms is not None
        assert error.retry_ms > 400
        assert took < 0.4, "before the deadline, which a client that waits would have sat out"
        assert attempts(seen) == [1]
