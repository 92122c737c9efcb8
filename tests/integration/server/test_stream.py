"""EmbedStream over the wire: every index once, bad texts apart, and readers that stall, leave or come back."""

from __future__ import annotations

import asyncio
import random
import tracemalloc

import grpc
import numpy as np
import pytest

from embedserve.testing import FakeBackend, FaultPlan, FaultyBackend
from embedserve.testing.backends import fake_identity
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from tests.integration.server.calls import (
    LIMIT_S,
    MAX_INPUT,
    WORDS,
    Streamed,
    expected,
    failure,
    poison_id,
    read,
    until,
    values,
)

MIB = 1 << 20


async def stream(server: InProcessServer, texts: list[str], **options: object) -> Streamed:
    return await read(server.stub.EmbedStream(pb.EmbedStreamRequest(texts=texts, **options)))


class TestMessages:
    """What a reader gets, whatever the batches were."""

    async def test_every_index_comes_exactly_once_and_the_summary_last(self) -> None:
        rng = random.Random(7)
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 20))) for _ in range(700)]
        settings = {"scheduling.max_batch_tokens": "256", "server.stream_window_items": "64"}
        async with serving(settings=settings) as server:
            got = await stream(server, texts)

        assert got.vectors.keys() == set(range(700))
        for index, text in enumerate(texts):
            assert np.array_equal(got.vectors[index], expected(text))
        assert got.summary is not None
        usage = got.summary.usage
        assert (usage.texts, got.summary.failed) == (700, 0)
        assert usage.tokens == sum(embedding.token_count for embedding in got.embeddings.values())
        assert usage.batches > 10
        assert got.summary.model.name == "fake/model"
        assert len(got.sizes) > 10

    async def test_a_stream_may_be_larger_than_the_queue(self) -> None:
        """Its first piece is judged, not the whole: windows are what the stream is for."""
        settings = {
            "scheduling.max_queue_tokens": "4096",
            "scheduling.max_batch_tokens": "512",
            "server.stream_window_items": "64",
        }
        async with serving(settings=settings) as server:
            refused = await failure(server.stub.Embed(pb.EmbedRequest(texts=["a " * 30] * 300)))
            got = await stream(server, ["a " * 30] * 300)

        assert refused.reason == "SUBMISSION_EXCEEDS_QUEUE"
        assert "scheduling.max_queue_tokens" in refused.message
        assert "EmbedStream" in refused.message
        assert got.vectors.keys() == set(range(300))

    async def test_results_flow_before_the_last_batch_is_done(self) -> None:
        async with serving(FaultyBackend(FaultPlan()), settings={"scheduling.max_batch_items": "8"}) as server:
            call = server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"] * 600))
            first = await call.read()
            server.plan.gate.clear()
            assert 0 < len(first.embeddings) <= 8
            server.plan.gate.set()
            rest = await read(call)

        assert len(first.embeddings) + len(rest.vectors) == 600

    async def test_messages_stay_under_1_mib(self) -> None:
        """4096 components a vector: one batch's rows are 2 MB and go out in three messages."""
        backend = FakeBackend(fake_identity(dimension=4096))
        async with serving(backend, settings={"scheduling.max_batch_items": "512"}) as server:
            got = await stream(server, ["hello"] * 300)

        assert max(got.sizes) < MIB
        assert max(got.sizes) > MIB // 2
        assert got.vectors.keys() == set(range(300))

    async def test_bad_texts_are_item_errors_and_the_others_have_their_vectors(self, server: InProcessServer) -> None:
        texts = ["hello", "", "world", "a " * 200, "the text"]
        got = await stream(server, texts)

        assert {index: (error.code, error.reason) for index, error in got.errors.items()} == {
            1: (3, "TEXT_EMPTY"),
            3: (3, "TEXT_TOO_LONG"),
        }
        for index in (0, 2, 4):
            assert np.array_equal(got.vectors[index], expected(texts[index]))
        assert got.summary is not None
        assert (got.summary.usage.texts, got.summary.failed) == (3, 2)

    @pytest.mark.parametrize("texts", [["", ""], ["a " * 200]])
    async def test_only_bad_texts_still_end_with_a_summary(self, server: InProcessServer, texts: list[str]) -> None:
        got = await stream(server, texts)

        assert got.errors.keys() == set(range(len(texts)))
        assert got.summary is not None
        assert (got.summary.usage.texts, got.summary.failed) == (0, len(texts))

    async def test_bad_token_ids_are_item_errors_too(self, server: InProcessServer) -> None:
        rows = [[2, 7, 3], [], [5000], [1] * (MAX_INPUT + 1), [4]]
        got = await read(server.stub.EmbedStream(pb.EmbedStreamRequest(token_ids=[pb.TokenIds(ids=r) for r in rows])))

        assert {index: error.reason for index, error in got.errors.items()} == {
            1: "TOKEN_IDS_EMPTY",
            2: "TOKEN_ID_OUT_OF_RANGE",
            3: "TEXT_TOO_LONG",
        }
        assert got.vectors.keys() == {0, 4}

    async def test_a_text_that_breaks_the_model_fails_alone_with_an_id(self) -> None:
        async with serving(FaultyBackend(FaultPlan(raise_on_id=poison_id()))) as server:
            texts = ["hello", "the poison text", "world"] * 3
            got = await stream(server, texts)

        assert got.errors.keys() == {1, 4, 7}
        for error in got.errors.values():
            assert (error.code, error.reason) == (13, "ITEM_FAILED")
            assert "error id" in error.message
            assert "kernel" not in error.message
        for index in (0, 2, 3, 5, 6, 8):
            assert np.array_equal(got.vectors[index], expected(texts[index]))

    async def test_wrong_options_end_the_whole_stream(self, server: InProcessServer) -> None:
        request = pb.EmbedStreamRequest(texts=["a"], encoding=99, dimensions=400)
        error = await failure(server.stub.EmbedStream(request).read())

        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.violations.keys() == {"encoding", "dimensions"}

    async def test_the_stages_add_up_to_the_total(self, server: InProcessServer) -> None:
        got = await stream(server, ["hello world"] * 600)

        assert got.summary is not None
        t = got.summary.timings
        stages = [t.validate_ms, t.tokenize_ms, t.queue_ms, t.assemble_ms, t.forward_ms, t.respond_ms]
        assert min(stages) >= 0
        assert sum(stages) == pytest.approx(t.total_ms, abs=1e-6)


STALLED = {
    "admission.policies": "none",
    "server.stream_window_items": "32",
    "scheduling.max_batch_items": "16",
    "limits.max_texts": "4096",
}


class TestReaders:
    """A reader's trouble is its own."""

    async def test_a_reader_that_stalls_stops_its_own_work_and_nobody_elses(self) -> None:
        """16 KB a vector: flow control says stop after a few, and the device works no further ahead than the window."""
        backend = FakeBackend(fake_identity(dimension=4096))
        async with serving(backend, settings=STALLED) as server:
            stalled = server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"] * 2000))
            taken = len((await stalled.read()).embeddings)
            done = await _settled(lambda: sum(rows for rows, _ in backend.passes))
            others = [await server.stub.Embed(pb.EmbedRequest(texts=["the text"])) for _ in range(5)]
            streamed = await stream(server, ["hello world"] * 100)
            after = sum(rows for rows, _ in backend.passes)
            in_flight = server.guard.in_flight
            rest = await read(stalled)

        assert done < 1000, "the device ran on for a reader that had stopped"
        assert after - done <= 5 + 100 + 32
        assert in_flight == 1
        assert all(np.array_equal(values(a.embeddings[0]), values(others[0].embeddings[0])) for a in others)
        assert len(streamed.vectors) == 100
        assert taken + len(rest.vectors) == 2000, "a reader that comes back gets the rest"

    async def test_stalled_readers_hold_bounded_memory(self) -> None:
        """20 streams of 2000 vectors of 16 KB would be 640 MB."""
        backend = FakeBackend(fake_identity(dimension=4096))
        async with serving(backend, settings=STALLED) as server:
            tracemalloc.start()
            try:
                request = pb.EmbedStreamRequest(texts=["hello"] * 2000)
                streams = [server.stub.EmbedStream(request) for _ in range(20)]
                await asyncio.gather(*(call.read() for call in streams))
                rows = await _settled(lambda: sum(rows for rows, _ in backend.passes))
                held, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            for call in streams:
                call.cancel()
            await until(lambda: server.guard.in_flight == 0 and server.engine.requests == 0)

        assert rows < 20 * 1000, "the device ran on for readers that had stopped"
        assert held < 80 * MIB

    async def test_a_reader_that_has_stopped_for_good_is_ended_and_its_handler_is_gone(self) -> None:
        backend = FakeBackend(fake_identity(dimension=4096))
        async with serving(backend, settings=STALLED | {"server.stream_stall_ms": "200"}) as server:
            stalled = server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"] * 2000))
            first = await stalled.read()
            await until(lambda: server.guard.in_flight == 0)
            assert server.engine.requests == 0
            assert server.engine.load().queue_depth == 0
            # It wakes up: what was on its way comes, and then the reason, not silence.
            error = await failure(read(stalled))
            other = await server.stub.Embed(pb.EmbedRequest(texts=["hello"]))

        assert first.embeddings
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(other.embeddings) == 1

    async def test_a_stalled_reader_does_not_hold_the_shutdown(self) -> None:
        backend = FakeBackend(fake_identity(dimension=4096))
        settings = STALLED | {"server.stream_stall_ms": "200", "shutdown.grace_ms": "5000"}
        async with serving(backend, settings=settings) as server:
            stalled = server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"] * 2000))
            await stalled.read()
            await _settled(lambda: sum(rows for rows, _ in backend.passes))
            server.begin_stop()
            async with asyncio.timeout(4):
                code = await server.ended()

        assert code == 0

    async def test_a_client_that_disappears_frees_everything(self) -> None:
        settings = {"scheduling.max_batch_items": "16", "server.stream_window_items": "64"}
        async with serving(FaultyBackend(FaultPlan()), settings=settings) as server:
            channel = server.connect()
            method = channel.unary_stream(
                "/embedserve.v1.EmbeddingService/EmbedStream",
                pb.EmbedStreamRequest.SerializeToString,
                pb.EmbedStreamResponse.FromString,
            )
            call = method(pb.EmbedStreamRequest(texts=["hello"] * 4000))
            await call.read()
            server.plan.gate.clear()
            await until(lambda: server.engine.load().running_items > 0)
            call.cancel()
            await channel.close()
            await until(lambda: server.guard.in_flight == 0 and server.engine.requests == 0)
            assert server.engine.load().queue_depth == 0
            server.plan.gate.set()
            answer = await server.stub.Embed(pb.EmbedRequest(texts=["hello world"]))

        assert np.array_equal(values(answer.embeddings[0]), expected("hello world"))
        assert sum(rows for rows, _ in server.backend.passes) < 4000

    async def test_a_deadline_that_passes_mid_stream(self) -> None:
        async with serving(FaultyBackend(FaultPlan()), settings={"scheduling.max_batch_items": "16"}) as server:
            call = server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"] * 4000), timeout=1.0)
            await call.read()
            server.plan.gate.clear()
            error = await failure(read(call))
            await until(lambda: server.guard.in_flight == 0 and server.engine.requests == 0)

        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def _settled(figure, quiet_s: float = 0.15) -> int:  # type: ignore[no-untyped-def]
    """The figure once it has not changed for a while: flow control has no event that says it is full."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            before = figure()
            await asyncio.sleep(quiet_s)
            if before and figure() == before:
                return int(before)
