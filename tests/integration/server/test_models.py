"""CountTokens, ListModels, GetModel and GetLoad over the wire."""

from __future__ import annotations

import asyncio

import pytest

from embedserve.testing import FaultPlan, FaultyBackend
from embedserve.testing.backends import fake_identity
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from tests.integration.server.calls import MAX_INPUT, TOKENIZER, failure, token_ids, until

IDENTITY = fake_identity()


class TestCountTokens:
    """Counts as Embed would see them, without the model."""

    async def test_counts_are_those_of_embed(self, server: InProcessServer) -> None:
        texts = ["hello world", "a", "the text poison"]
        counted = await server.stub.CountTokens(pb.CountTokensRequest(texts=texts))
        embedded = await server.stub.Embed(pb.EmbedRequest(texts=texts))

        assert [c.token_count for c in counted.counts] == [e.token_count for e in embedded.embeddings]
        assert counted.total_tokens == embedded.usage.tokens
        assert not any(c.exceeds_max_input_length for c in counted.counts)
        assert (counted.max_input_length, counted.model.name) == (MAX_INPUT, IDENTITY.name)

    async def test_the_prompt_counts(self, server: InProcessServer) -> None:
        counted = await server.stub.CountTokens(pb.CountTokensRequest(texts=["hello"], prompt_name="query"))

        assert counted.total_tokens == len(token_ids("hello", prompt="query: "))

    async def test_a_text_that_is_too_long_is_counted_whole(self, server: InProcessServer) -> None:
        text = "hello " * 500
        counted = await server.stub.CountTokens(pb.CountTokensRequest(texts=[text, "a"]))

        assert counted.counts[0].token_count == int(TOKENIZER.count([text])[0]) == 502
        assert [c.exceeds_max_input_length for c in counted.counts] == [True, False]

    async def test_it_does_not_wait_for_the_device(self) -> None:
        async with serving(FaultyBackend(FaultPlan())) as server:
            server.plan.gate.clear()
            held = asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello"])))
            await until(lambda: server.engine.load().running_items == 1)
            counted = await server.stub.CountTokens(pb.CountTokensRequest(texts=["hello"]))
            server.plan.gate.set()
            await held

        assert counted.total_tokens == 3

    @pytest.mark.parametrize(
        ("request_", "violations"),
        [
            ({}, {"texts": "NO_TEXTS"}),
            ({"texts": ["", "a"], "prompt_name": "other"}, {"prompt_name": "UNKNOWN_PROMPT", "texts[0]": "TEXT_EMPTY"}),
        ],
    )
    async def test_all_that_is_wrong_is_told(
        self, server: InProcessServer, request_: dict[str, object], violations: dict[str, str]
    ) -> None:
        error = await failure(server.stub.CountTokens(pb.CountTokensRequest(**request_)))

        assert error.violations == violations


class TestModels:
    """What a client may pin, and what it must know before its first call."""

    async def test_the_model_is_described_whole(self, server: InProcessServer) -> None:
        model = (await server.stub.GetModel(pb.GetModelRequest(model="fake/model"))).model

        for name in ("name", "revision", "weights_digest", "tokenizer_digest", "architecture", "dimension",
                     "max_input_length", "pooling", "normalize", "dtype", "device", "vocab_size"):  # fmt: skip
            assert getattr(model, name) == getattr(IDENTITY, name), name
        assert [(prompt.name, prompt.text) for prompt in model.prompts] == list(IDENTITY.prompts)
        assert model.default_prompt_name == ""
        assert list(model.bucket_edges) == [16, 32, 64, 128]
        assert model.max_texts == 16384
        assert 0 < model.max_texts_unary <= model.max_texts

    async def test_the_list_has_it_first(self, server: InProcessServer) -> None:
        listed = await server.stub.ListModels(pb.ListModelsRequest())
        model = await server.stub.GetModel(pb.GetModelRequest())

        assert list(listed.models) == [model.model]

    async def test_what_max_texts_unary_promises_holds(self) -> None:
        async with serving(
            settings={"server.max_send_message_bytes": "65536", "server.stream_message_bytes": "4096"}
        ) as s:
            most = (await s.stub.GetModel(pb.GetModelRequest())).model.max_texts_unary
            answer = await s.stub.Embed(pb.EmbedRequest(texts=["a"] * most))

        assert len(answer.embeddings) == most
        assert answer.ByteSize() <= 65536


class TestLoad:
    """What a balancer asks."""

    async def test_an_idle_server_is_healthy(self, server: InProcessServer) -> None:
        await server.stub.Embed(pb.EmbedRequest(texts=["hello"]))
        load = await server.stub.GetLoad(pb.GetLoadRequest())

        assert (load.state, load.accepting_requests) == (pb.LOAD_STATE_HEALTHY, True)
        assert (load.queued_tokens, load.queue_depth, load.running_items, load.running_tokens) == (0, 0, 0, 0)
        assert load.service_rate_tokens_per_second > 0
        assert load.p95_latency_ms > 0
        assert load.uptime_seconds < 60

    async def test_what_runs_and_what_waits_is_told(self) -> None:
        settings = {"scheduling.max_batch_items": "1", "scheduling.batches_in_flight": "1"}
        async with serving(FaultyBackend(FaultPlan()), settings=settings) as server:
            server.plan.gate.clear()
            held = [asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello"]))) for _ in range(3)]
            await until(lambda: server.engine.requests == 3 and server.engine.load().queue_depth == 2)
            load = await server.stub.GetLoad(pb.GetLoadRequest())
            server.plan.gate.set()
            await asyncio.gather(*held)

        assert (load.running_items, load.running_tokens) == (1, 3)
        assert (load.queue_depth, load.queued_tokens) == (2, 6)
        assert load.estimated_drain_time_ms > 0
