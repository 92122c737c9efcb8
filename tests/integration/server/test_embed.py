"""Embed over the wire: every option, and what comes back beside the vectors."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import numpy as np
import pytest

from embedserve.model.tokenizer import Truncation
from embedserve.testing import FakeBackend, FaultPlan, FaultyBackend
from embedserve.testing.backends import fake_identity, fake_vector
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.server.calls import DIMENSION, MAX_INPUT, WORDS, expected, token_ids, until, values


async def one(server: InProcessServer, text: str = "hello world", **options: object) -> np.ndarray:
    answer = await server.stub.Embed(pb.EmbedRequest(texts=[text], **options))
    return values(answer.embeddings[0])


class TestAnswer:
    """An answer holds the vectors of the request, in its order, and says what made them."""

    async def test_vectors_are_those_of_the_texts_in_their_order(self, server: InProcessServer) -> None:
        texts = ["hello world", "a", "the text", "hello world"]
        answer = await server.stub.Embed(pb.EmbedRequest(texts=texts))

        assert [embedding.index for embedding in answer.embeddings] == [0, 1, 2, 3]
        for text, embedding in zip(texts, answer.embeddings, strict=True):
            assert np.array_equal(values(embedding), expected(text))
            assert embedding.token_count == len(token_ids(text))
            assert (embedding.truncated, embedding.packed, embedding.scale) == (False, b"", 0)
            assert embedding.batch_size == 4

    async def test_it_says_which_model_and_what_was_used(self, server: InProcessServer) -> None:
        answer = await server.stub.Embed(pb.EmbedRequest(texts=["hello world", "a"]))

        identity = fake_identity()
        assert (answer.model.name, answer.model.revision, answer.model.weights_digest) == (
            identity.name,
            identity.revision,
            identity.weights_digest,
        )
        assert (answer.dimensions, answer.encoding) == (DIMENSION, pb.ENCODING_FLOAT32)
        assert (answer.usage.texts, answer.usage.tokens, answer.usage.batches) == (2, 4 + 3, 1)

    async def test_the_stages_add_up_to_the_total(self) -> None:
        async with serving(FakeBackend(pass_ns=lambda _: 2_000_000)) as server:
            answer = await server.stub.Embed(pb.EmbedRequest(texts=["hello world"]))

        t = answer.timings
        stages = [t.validate_ms, t.tokenize_ms, t.queue_ms, t.assemble_ms, t.forward_ms, t.respond_ms]
        assert min(stages) >= 0
        assert sum(stages) == pytest.approx(t.total_ms, abs=1e-6)
        assert t.forward_ms >= 2

    async def test_unknown_fields_are_ignored(self, server: InProcessServer) -> None:
        """A newer client may send what this server does not know: field 1000, a string."""
        raw = pb.EmbedRequest(texts=["hello world"]).SerializeToString() + b"\xc2\x3e\x05later"
        call = server.channel.unary_unary("/embedserve.v1.EmbeddingService/Embed")
        answer = pb.EmbedResponse.FromString(await call(raw))

        assert np.array_equal(values(answer.embeddings[0]), expected("hello world"))

    async def test_a_request_larger_than_a_batch_is_answered_whole(self) -> None:
        rng = random.Random(3)
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(300)]
        settings = {"scheduling.max_batch_tokens": "256", "scheduling.max_batch_items": "16"}
        async with serving(settings=settings) as server:
            answer = await server.stub.Embed(pb.EmbedRequest(texts=texts))

        assert answer.usage.batches > 10
        assert max(embedding.batch_size for embedding in answer.embeddings) <= 16
        for text, embedding in zip(texts, answer.embeddings, strict=True):
            assert np.array_equal(values(embedding), expected(text))


class TestOptions:
    """Each option does what the proto says, and nothing else."""

    async def test_token_ids_are_used_as_they_are(self, server: InProcessServer) -> None:
        rows = [[2, 7, 3], [2, 8, 9, 9, 3], [5]]
        answer = await server.stub.Embed(pb.EmbedRequest(token_ids=[pb.TokenIds(ids=row) for row in rows]))

        for row, embedding in zip(rows, answer.embeddings, strict=True):
            assert np.array_equal(values(embedding), fake_vector(np.array(row, dtype=np.int32), DIMENSION))
            assert embedding.token_count == len(row)

    async def test_token_ids_give_what_their_text_gives(self, server: InProcessServer) -> None:
        ids = token_ids("hello world the text").tolist()
        answer = await server.stub.Embed(pb.EmbedRequest(token_ids=[pb.TokenIds(ids=ids)]))

        assert np.array_equal(values(answer.embeddings[0]), await one(server, "hello world the text"))

    @pytest.mark.parametrize(
        ("truncate", "kept"), [(pb.TRUNCATE_END, Truncation.END), (pb.TRUNCATE_START, Truncation.START)]
    )
    async def test_truncate_keeps_one_end_and_says_so(
        self, server: InProcessServer, truncate: pb.Truncate, kept: Truncation
    ) -> None:
        long = " ".join(f"{word} {n}" for n, word in enumerate(WORDS * 8))
        answer = await server.stub.Embed(pb.EmbedRequest(texts=[long, "hello"], truncate=truncate))

        cut, whole = answer.embeddings
        assert np.array_equal(values(cut), expected(long, truncation=kept))
        assert (cut.token_count, cut.truncated) == (MAX_INPUT, True)
        assert (whole.token_count, whole.truncated) == (3, False)

    @pytest.mark.parametrize(
        ("truncate", "kept"), [(pb.TRUNCATE_END, slice(MAX_INPUT)), (pb.TRUNCATE_START, slice(-MAX_INPUT, None))]
    )
    async def test_truncate_cuts_token_ids_too(
        self, server: InProcessServer, truncate: pb.Truncate, kept: slice
    ) -> None:
        ids = np.arange(1, 201, dtype=np.int32)
        request = pb.EmbedRequest(token_ids=[pb.TokenIds(ids=ids.tolist())], truncate=truncate)
        answer = await server.stub.Embed(request)

        assert np.array_equal(values(answer.embeddings[0]), fake_vector(ids[kept], DIMENSION))
        assert answer.embeddings[0].truncated

    @pytest.mark.parametrize("dimensions", [1, 7, 16])
    async def test_dimensions_cut_first_and_scale_after(self, server: InProcessServer, dimensions: int) -> None:
        answer = await server.stub.Embed(pb.EmbedRequest(texts=["hello world"], dimensions=dimensions))

        cut = expected("hello world", normalize=False)[:dimensions]
        assert values(answer.embeddings[0]) == pytest.approx(cut / np.linalg.norm(cut), abs=1e-6)
        assert answer.dimensions == dimensions

    @pytest.mark.parametrize("normalize", [True, False])
    async def test_normalize_wins_over_the_model(self, server: InProcessServer, normalize: bool) -> None:
        assert np.array_equal(await one(server, normalize=normalize), expected("hello world", normalize=normalize))

    async def test_without_normalize_the_model_decides(self, server: InProcessServer) -> None:
        assert np.array_equal(await one(server), await one(server, normalize=True))

    async def test_a_prompt_stands_before_the_text(self, server: InProcessServer) -> None:
        assert np.array_equal(await one(server, prompt_name="query"), expected("hello world", prompt="query: "))
        assert np.array_equal(await one(server, prompt_name=""), expected("hello world"))

    async def test_without_prompt_name_the_models_default_prompt_counts(self) -> None:
        identity = dataclasses.replace(fake_identity(), default_prompt_name="query")
        async with serving(FakeBackend(identity)) as server:
            assert np.array_equal(await one(server), expected("hello world", prompt="query: "))
            assert np.array_equal(await one(server, prompt_name=""), expected("hello world"))

    @pytest.mark.parametrize("pin", ["", fake_identity().revision, fake_identity().weights_digest])
    async def test_a_pin_that_holds_changes_nothing(self, server: InProcessServer, pin: str) -> None:
        assert np.array_equal(await one(server, expected_revision=pin), expected("hello world"))

    @pytest.mark.parametrize("model", ["", "fake/model"])
    async def test_the_model_may_be_named(self, server: InProcessServer, model: str) -> None:
        assert np.array_equal(await one(server, model=model), expected("hello world"))

    @pytest.mark.parametrize("priority", ["interactive", "default", "bulk"])
    async def test_priority_and_tenant_are_taken(self, server: InProcessServer, priority: str) -> None:
        metadata = (("x-embedserve-priority", priority), ("x-embedserve-tenant", "blue team"))
        answer = await server.stub.Embed(pb.EmbedRequest(texts=["hello"]), metadata=metadata)

        assert np.array_equal(values(answer.embeddings[0]), expected("hello"))


class TestPriority:
    """A class does what it is for."""

    async def test_an_interactive_call_passes_the_bulk_that_waits(self) -> None:
        settings = {"scheduling.max_batch_items": "1", "scheduling.batches_in_flight": "1"}
        async with serving(FaultyBackend(FaultPlan()), settings=settings) as server:
            ended: list[str] = []

            async def call(name: str, priority: str) -> None:
                metadata = (("x-embedserve-priority", priority),)
                await server.stub.Embed(pb.EmbedRequest(texts=["hello"]), metadata=metadata)
                ended.append(name)

            server.plan.gate.clear()
            calls = [asyncio.ensure_future(call("running", "bulk"))]
            await until(lambda: server.engine.load().running_items == 1)
            for n in range(5):
                calls.append(asyncio.ensure_future(call(f"bulk {n}", "bulk")))
                await until(lambda n=n: server.engine.load().queue_depth == n + 1)
            calls.append(asyncio.ensure_future(call("urgent", "interactive")))
            await until(lambda: server.engine.load().queue_depth == 6)
            server.plan.gate.set()
            await asyncio.gather(*calls)

        assert ended.index("urgent") <= 2, ended


def decoded(embedding: pb.Embedding, encoding: pb.Encoding) -> np.ndarray:
    """By the proto's comments, and by nothing of the server's code."""
    raw = embedding.packed
    match encoding:
        case pb.ENCODING_FLOAT16:
            return np.frombuffer(raw, "<f2").astype(np.float32)
        case pb.ENCODING_BFLOAT16:
            return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        case pb.ENCODING_INT8:
            return np.frombuffer(raw, np.int8) * np.float32(embedding.scale)
        case pb.ENCODING_UINT8:
            return (np.frombuffer(raw, np.uint8).astype(np.int32) - 128) * np.float32(embedding.scale)
        case pb.ENCODING_BINARY:
            unsigned = (np.frombuffer(raw, np.int8).astype(np.int32) + 128).astype(np.uint8)
            return np.unpackbits(unsigned).astype(np.float32)
        case pb.ENCODING_UBINARY:
            return np.unpackbits(np.frombuffer(raw, np.uint8)).astype(np.float32)
    return values(embedding)


class TestEncodings:
    """Each encoding decodes to the float answer, as near as the proto says."""

    TEXTS = ("hello world", "a", "the text poison", "0 1 2 3")

    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("encoding", range(1, 8))
    async def test_it_decodes_to_the_floats(self, server: InProcessServer, encoding: int, normalize: bool) -> None:
        request = pb.EmbedRequest(texts=self.TEXTS, encoding=encoding, normalize=normalize)
        answer = await server.stub.Embed(request)

        assert answer.encoding == encoding
        for text, embedding in zip(self.TEXTS, answer.embeddings, strict=True):
            want, got = expected(text, normalize=normalize), decoded(embedding, encoding)
            step = float(np.abs(want).max()) / 127
            match encoding:
                case pb.ENCODING_FLOAT32:
                    assert np.array_equal(got, want)
                case pb.ENCODING_FLOAT16:
                    assert np.abs(got - want).max() <= np.abs(want).max() * 2**-11
                case pb.ENCODING_BFLOAT16:
                    assert (np.abs(got - want) <= np.abs(want) * 2**-8).all()
                case pb.ENCODING_INT8 | pb.ENCODING_UINT8:
                    assert embedding.scale == pytest.approx(step)
                    assert np.abs(got - want).max() <= step / 2 * (1 + 1e-5)
                case _:
                    assert np.array_equal(got, want > 0)
            assert bool(embedding.values) == (encoding == pb.ENCODING_FLOAT32)

    @pytest.mark.parametrize(
        ("encoding", "size"),
        [
            (pb.ENCODING_FLOAT16, 2 * DIMENSION),
            (pb.ENCODING_BFLOAT16, 2 * DIMENSION),
            (pb.ENCODING_INT8, DIMENSION),
            (pb.ENCODING_UINT8, DIMENSION),
            (pb.ENCODING_BINARY, DIMENSION // 8),
            (pb.ENCODING_UBINARY, DIMENSION // 8),
        ],
    )
    async def test_it_takes_the_bytes_that_the_proto_says(
        self, server: InProcessServer, encoding: pb.Encoding, size: int
    ) -> None:
        answer = await server.stub.Embed(pb.EmbedRequest(texts=["hello"], encoding=encoding))

        assert len(answer.embeddings[0].packed) == size


class TestManyCallers:
    """Order and identity hold whoever else calls."""

    @pytest.mark.parametrize("shape", ["packed", "bucketed"])
    async def test_64_mixed_callers_get_their_own_vectors_in_their_own_order(self, shape: str) -> None:
        rng = random.Random(17)
        backend = FakeBackend(pass_ns=lambda batch: 200_000 + 300 * len(batch.ids))
        async with serving(backend, settings={"scheduling.shape": shape}) as server:
            channels = [server.connect() for _ in range(4)]
            stubs = [EmbeddingServiceStub(channel) for channel in channels]
            checked = 0

            async def caller(number: int, seed: int) -> None:
                nonlocal checked
                mine = random.Random(seed)
                for _ in range(8):
                    texts = [" ".join(mine.choices(WORDS, k=mine.randint(1, 20))) for _ in range(mine.randint(1, 9))]
                    normalize, dimensions = mine.random() < 0.5, mine.choice([None, 8])
                    prompt = mine.choice(["", "query"])
                    options = {"texts": texts, "normalize": normalize, "dimensions": dimensions, "prompt_name": prompt}
                    if mine.random() < 0.5:
                        answer = await stubs[number % 4].Embed(pb.EmbedRequest(**options))
                        got = [values(embedding) for embedding in answer.embeddings]
                    else:
                        rows = {}
                        async for message in stubs[number % 4].EmbedStream(pb.EmbedStreamRequest(**options)):
                            rows |= {embedding.index: values(embedding) for embedding in message.embeddings}
                        got = [rows[index] for index in range(len(texts))]
                    for text, vector in zip(texts, got, strict=True):
                        want = expected(text, normalize=False, prompt="query: " if prompt else "")[:dimensions]
                        if normalize:
                            want = want / np.linalg.norm(want)
                        assert vector == pytest.approx(want, abs=1e-6)
                        checked += 1

            await asyncio.gather(*(caller(n, rng.getrandbits(32)) for n in range(64)))
            await asyncio.gather(*(channel.close() for channel in channels))

        assert checked > 2000
        assert max(rows for rows, _ in backend.passes) > 9, "callers never shared a batch, so this test shows nothing"
