"""Every refusal of the API over the wire: its status, its details, and that nobody else is affected."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from embedserve.errors import ConfigError, StartupError
from embedserve.testing import FakeBackend, FaultPlan, FaultyBackend
from embedserve.testing.backends import fake_identity
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.server.calls import (
    MAX_INPUT,
    SERVICE,
    Failure,
    LoadingBackend,
    expected,
    failure,
    poison_id,
    read,
    until,
    values,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT


async def refused(server: InProcessServer, **request: object) -> Failure:
    """The error of an Embed call; the server goes on."""
    error = await failure(server.stub.Embed(pb.EmbedRequest(**request)))
    answer = await server.stub.Embed(pb.EmbedRequest(texts=["hello world"]))
    assert (values(answer.embeddings[0]) == expected("hello world")).all()
    return error


class TestInvalidArgument:
    """The caller's fault, with every violation and no retry."""

    @pytest.mark.parametrize(
        ("request_", "violations"),
        [
            ({}, {"texts": "NO_TEXTS"}),
            ({"texts": [""]}, {"texts[0]": "TEXT_EMPTY"}),
            ({"texts": ["a", "", "b", ""]}, {"texts[1]": "TEXT_EMPTY", "texts[3]": "TEXT_EMPTY"}),
            ({"texts": ["a"], "token_ids": [pb.TokenIds(ids=[1])]}, {"token_ids": "TEXTS_AND_TOKEN_IDS"}),
            ({"token_ids": [pb.TokenIds(ids=[1, 1000])]}, {"token_ids[0]": "TOKEN_ID_OUT_OF_RANGE"}),
            ({"token_ids": [pb.TokenIds()]}, {"token_ids[0]": "TOKEN_IDS_EMPTY"}),
            ({"token_ids": [pb.TokenIds(ids=[1] * (MAX_INPUT + 1))]}, {"token_ids[0]": "TEXT_TOO_LONG"}),
            ({"token_ids": [pb.TokenIds(ids=[1])], "prompt_name": "query"}, {"prompt_name": "PROMPT_WITH_TOKEN_IDS"}),
            ({"texts": ["a"], "prompt_name": "nobody"}, {"prompt_name": "UNKNOWN_PROMPT"}),
            ({"texts": ["a"], "dimensions": 0}, {"dimensions": "DIMENSIONS_OUT_OF_RANGE"}),
            ({"texts": ["a"], "dimensions": 17}, {"dimensions": "DIMENSIONS_OUT_OF_RANGE"}),
            (
                {"texts": ["a"], "dimensions": 12, "encoding": pb.ENCODING_BINARY},
                {"dimensions": "DIMENSIONS_NOT_MULTIPLE_OF_8"},
            ),
            ({"texts": ["a"], "truncate": 9}, {"truncate": "UNKNOWN_TRUNCATE"}),
            ({"texts": ["a"], "encoding": 9}, {"encoding": "UNKNOWN_ENCODING"}),
            ({"texts": ["a", "a " * 200]}, {"texts[1]": "TEXT_TOO_LONG"}),
        ],
    )
    async def test_it_names_the_field_and_the_reason(
        self, server: InProcessServer, request_: dict[str, object], violations: dict[str, str]
    ) -> None:
        error = await refused(server, **request_)

        assert (error.code, error.reason) == (INVALID, "INVALID_REQUEST")
        assert error.violations == violations
        assert error.retry_ms is None

    async def test_all_that_is_wrong_is_told_at_once(self, server: InProcessServer) -> None:
        error = await failure(
            server.stub.Embed(
                pb.EmbedRequest(
                    texts=["a", "", "b" * 2_000_000], truncate=9, encoding=99, dimensions=400, prompt_name="nobody"
                ),
                metadata=(("x-embedserve-priority", "urgent"), ("x-embedserve-tenant", "x" * 65)),
            )
        )

        assert error.violations == {
            "truncate": "UNKNOWN_TRUNCATE",
            "encoding": "UNKNOWN_ENCODING",
            "dimensions": "DIMENSIONS_OUT_OF_RANGE",
            "prompt_name": "UNKNOWN_PROMPT",
            "metadata.x-embedserve-priority": "UNKNOWN_PRIORITY",
            "metadata.x-embedserve-tenant": "BAD_TENANT",
            "texts[1]": "TEXT_EMPTY",
            "texts[2]": "TEXT_TOO_LARGE",
        }

    async def test_an_over_long_text_is_told_with_both_lengths(self, server: InProcessServer) -> None:
        error = await refused(server, texts=["a", "a " * 150])

        assert "152" in error.message
        assert str(MAX_INPUT) in error.message

    async def test_100_000_empty_texts_are_refused_at_once(self, server: InProcessServer) -> None:
        """200 KB of body hold them; the count is looked at before any of them."""
        raw = b"\x12\x00" * 100_000
        call = server.channel.unary_unary(f"/{SERVICE}/Embed")
        begun = time.monotonic()
        error = await failure(call(raw))

        # Parsing alone takes 10 ms; looking into each text would take a tenth of a second, tokenising seconds.
        assert time.monotonic() - begun < 0.5
        assert error.violations == {"texts": "TOO_MANY_TEXTS"}
        assert "limits.max_texts" in error.message

    async def test_an_answer_that_is_too_large_names_the_stream_and_the_setting(self) -> None:
        async with serving(
            settings={"server.max_send_message_bytes": "65536", "server.stream_message_bytes": "4096"}
        ) as server:
            model = (await server.stub.GetModel(pb.GetModelRequest())).model
            texts = ["a"] * (model.max_texts_unary + 1)
            error = await refused(server, texts=texts)
            fits = await server.stub.Embed(pb.EmbedRequest(texts=texts[1:]))
            streamed = await read(server.stub.EmbedStream(pb.EmbedStreamRequest(texts=texts)))

        assert (error.code, error.violations) == (INVALID, {"texts": "ANSWER_TOO_LARGE"})
        assert "EmbedStream" in error.message or "EmbedStream" in str(error.trailers)
        assert "server.max_send_message_bytes" in str(error.trailers)
        assert len(fits.embeddings) == len(texts) - 1
        assert len(streamed.vectors) == len(texts)

    @pytest.mark.parametrize("method", ["Embed", "EmbedStream", "CountTokens", "ListModels", "GetModel", "GetLoad"])
    @pytest.mark.parametrize("raw", [b"\xff\xff\xff\xff", b"\x12\x05ab", b"\x12\x02\xc3\x28", b"\x0a\xff"])
    async def test_garbage_on_the_wire_is_the_callers_fault(
        self, server: InProcessServer, method: str, raw: bytes
    ) -> None:
        """A broken tag, a length past the end, text that is not UTF-8, an endless varint."""
        if method == "EmbedStream":
            stream = server.channel.unary_stream(f"/{SERVICE}/{method}")(raw)
            error = await failure(stream.read())
        elif raw == b"\x12\x05ab" or not (method in ("ListModels", "GetLoad", "GetModel") and raw[0] == 0x12):
            error = await failure(server.channel.unary_unary(f"/{SERVICE}/{method}")(raw))
        else:  # field 2 is unknown to it: its bytes need not be text
            await server.channel.unary_unary(f"/{SERVICE}/{method}")(raw)
            return

        assert error.code is INVALID
        assert error.violations == {"": "MALFORMED_MESSAGE"}

    @pytest.mark.parametrize(
        ("key", "value", "reason"),
        [
            ("x-embedserve-priority", "urgent", "UNKNOWN_PRIORITY"),
            ("x-embedserve-tenant", "x" * 65, "BAD_TENANT"),
        ],
    )
    @pytest.mark.parametrize("streamed", [False, True])
    async def test_bad_metadata(
        self, server: InProcessServer, key: str, value: str, reason: str, streamed: bool
    ) -> None:
        if streamed:
            call = server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["a"]), metadata=((key, value),)).read()
        else:
            call = server.stub.Embed(pb.EmbedRequest(texts=["a"]), metadata=((key, value),))
        error = await failure(call)

        assert error.violations == {f"metadata.{key}": reason}


class TestNotHere:
    """What another server may have, or another build."""

    @pytest.mark.parametrize("method", ["Embed", "EmbedStream", "CountTokens", "GetModel"])
    async def test_an_unknown_model_is_not_found(self, server: InProcessServer, method: str) -> None:
        request = {
            "Embed": pb.EmbedRequest(texts=["a"], model="other"),
            "EmbedStream": pb.EmbedStreamRequest(texts=["a"], model="other"),
            "CountTokens": pb.CountTokensRequest(texts=["a"], model="other"),
            "GetModel": pb.GetModelRequest(model="other"),
        }[method]
        call = getattr(server.stub, method)(request)
        error = await failure(call.read() if method == "EmbedStream" else call)

        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")
        assert error.metadata == {"asked": "other", "served": "fake/model"}

    @pytest.mark.parametrize("streamed", [False, True])
    async def test_another_revision_is_a_failed_precondition(self, server: InProcessServer, streamed: bool) -> None:
        if streamed:
            call = server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["a"], expected_revision="2")).read()
        else:
            call = server.stub.Embed(pb.EmbedRequest(texts=["a"], expected_revision="2"))
        error = await failure(call)

        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REVISION_MISMATCH")
        assert error.metadata == {"expected": "2", "served": "1"}

    @pytest.mark.parametrize("path", [f"/{SERVICE}/Rerank", "/other.Service/Embed"])
    async def test_an_unknown_method_is_unimplemented(self, server: InProcessServer, path: str) -> None:
        error = await failure(server.channel.unary_unary(path)(b""))

        assert error.code is grpc.StatusCode.UNIMPLEMENTED


@pytest.fixture
async def gated() -> AsyncIterator[InProcessServer]:
    """A server whose device waits for the gate, and which takes four texts, the running one included."""
    settings = {
        "scheduling.max_queue_items": "4",
        "scheduling.max_batch_items": "1",
        "scheduling.batches_in_flight": "1",
        "limits.max_texts": "4",
        "admission.policies": "none",
    }
    async with serving(FaultyBackend(FaultPlan()), settings=settings) as server:
        for _ in range(10):  # the time of a pass is measured now: a short deadline is not refused on a guess
            await server.stub.Embed(pb.EmbedRequest(texts=["hello"]))
        yield server


async def fill(server: InProcessServer, texts: int) -> list[asyncio.Task[pb.EmbedResponse]]:
    """Close the gate, and let single texts come until one runs and ``texts`` more are queued."""
    server.plan.gate.clear()
    calls = []
    for number in range(texts + 1):
        calls.append(asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello"]))))
        await until(lambda: server.engine.load().queue_depth + server.engine.load().running_items > number)  # noqa: B023
    return calls


class TestOverload:
    """Shed with a reason and a time to come back; what was taken is answered."""

    @pytest.mark.parametrize("streamed", [False, True])
    async def test_a_full_queue(self, gated: InProcessServer, streamed: bool) -> None:
        held = await fill(gated, 3)
        if streamed:
            call = gated.stub.EmbedStream(pb.EmbedStreamRequest(texts=["a"] * 4)).read()
        else:
            call = gated.stub.Embed(pb.EmbedRequest(texts=["a"] * 4))
        error = await failure(call)
        load = await gated.stub.GetLoad(pb.GetLoadRequest())
        gated.plan.gate.set()
        answers = await asyncio.gather(*held)

        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_ms is not None
        assert error.retry_ms > 0
        assert error.pushback_ms == pytest.approx(error.retry_ms, abs=1)
        assert error.metadata["policy"]
        assert error.reason
        assert load.state == pb.LOAD_STATE_OVERLOADED
        assert not load.accepting_requests
        assert len(answers) == 4

    async def test_drain_time_over_its_limit(self) -> None:
        """Work that would take longer than admission.throughput.max_drain_ms is refused."""
        settings = {"admission.policies": "throughput", "admission.throughput.max_drain_ms": "20"}
        backend = SlowBackend(FaultPlan())
        async with serving(backend, settings=settings) as server:
            for texts in (1, 4, 8, 2, 8, 1, 4):  # the rate is measured on passes of several sizes, not guessed
                await server.stub.Embed(pb.EmbedRequest(texts=["hello"] * texts))
            server.plan.gate.clear()
            held = asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello"])))
            await until(lambda: server.engine.load().running_items == 1)
            error = await failure(server.stub.Embed(pb.EmbedRequest(texts=["hello world"] * 100)))
            server.plan.gate.set()
            await held
            after = await server.stub.Embed(pb.EmbedRequest(texts=["hello"]))

        assert (error.code, error.metadata["policy"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "throughput")
        assert error.retry_ms is not None
        assert error.pushback_ms is not None
        assert len(after.embeddings) == 1

    async def test_too_many_requests_in_flight(self) -> None:
        async with serving(FaultyBackend(FaultPlan()), settings={"limits.max_requests_in_flight": "2"}) as server:
            server.plan.gate.clear()
            held = [asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello"]))) for _ in range(2)]
            await until(lambda: server.engine.requests == 2)
            error = await failure(server.stub.Embed(pb.EmbedRequest(texts=["hello"])))
            server.plan.gate.set()
            await asyncio.gather(*held)

        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS_IN_FLIGHT")
        assert error.pushback_ms is not None
        assert error.pushback_ms > 0


class SlowBackend(FaultyBackend):
    """2 ms a text."""

    def __init__(self, plan: FaultPlan) -> None:
        super().__init__(plan)
        self._pass_ns = lambda batch: 2_000_000 * (len(batch.offsets) - 1)


class TestDeadlines:
    """Time that has run out is told, and costs nobody anything."""

    async def test_while_queued(self, gated: InProcessServer) -> None:
        """The caller is told in time, its text is never run, and its place is free."""
        held = await fill(gated, 2)
        depth = gated.engine.load().queue_depth
        passes = len(gated.backend.passes)
        begun = time.monotonic()
        error = await failure(gated.stub.Embed(pb.EmbedRequest(texts=["the text"]), timeout=0.1))
        took = time.monotonic() - begun
        await until(lambda: gated.engine.load().queue_depth == depth)
        await until(lambda: gated.guard.in_flight == len(held))
        gated.plan.gate.set()
        await asyncio.gather(*held)

        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0.1 <= took < 1
        assert len(gated.backend.passes) - passes == len(held)

    async def test_the_servers_own_maximum(self) -> None:
        """Who sets no deadline is held to server.max_request_ms, also with a text on a device that hangs."""
        async with serving(FaultyBackend(FaultPlan()), settings={"server.max_request_ms": "50"}) as server:
            server.plan.gate.clear()
            request = pb.EmbedRequest(texts=["hello"])
            stream = pb.EmbedStreamRequest(texts=["hello"])
            errors = await asyncio.gather(
                *(failure(server.stub.Embed(request)) for _ in range(3)),
                failure(server.stub.Embed(request, timeout=60)),
                failure(server.stub.EmbedStream(stream).read()),
            )
            await until(lambda: server.guard.in_flight == 0)

        for error in errors:
            assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED")

    @pytest.mark.parametrize("limit", ["server.max_request_ms", "server.stream_stall_ms"])
    async def test_a_stream_whose_first_message_is_not_taken_still_gets_its_status(self, limit: str) -> None:
        """The limit comes while Core holds the first message back, which is larger than a window of HTTP/2."""
        backend = FakeBackend(fake_identity(dimension=1024))
        async with serving(backend, settings={limit: "200", "limits.max_texts": "256"}) as server:
            narrow = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
            async with grpc.aio.insecure_channel(server.address, options=narrow) as channel:
                call = EmbeddingServiceStub(channel).EmbedStream(pb.EmbedStreamRequest(texts=["hello"] * 256))
                await until(lambda: len(backend.passes) > 0)
                await until(lambda: server.guard.in_flight == 0)
                async with asyncio.timeout(10):
                    error = await failure(read(call))

        assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED")
        assert limit in error.message


class TestCancellation:
    """Who leaves frees their place at once."""

    async def test_a_queued_call_leaves_the_queue(self, gated: InProcessServer) -> None:
        held = await fill(gated, 2)
        before = gated.engine.load().queue_depth
        leaving = gated.stub.Embed(pb.EmbedRequest(texts=["the text"]))
        task = asyncio.ensure_future(leaving)
        await until(lambda: gated.engine.load().queue_depth == before + 1)
        leaving.cancel()
        await until(lambda: gated.engine.load().queue_depth == before)
        await until(lambda: gated.engine.requests == len(held) == gated.guard.in_flight)
        passes = len(gated.backend.passes)
        gated.plan.gate.set()
        await asyncio.gather(*held)
        await asyncio.gather(task, return_exceptions=True)

        assert len(gated.backend.passes) - passes == len(held)

    async def test_the_place_can_be_taken_by_another(self, gated: InProcessServer) -> None:
        held = await fill(gated, 3)
        error = await failure(gated.stub.Embed(pb.EmbedRequest(texts=["hello"])))
        held.pop().cancel()
        await until(lambda: gated.engine.load().queue_depth == 2)
        newcomer = asyncio.ensure_future(gated.stub.Embed(pb.EmbedRequest(texts=["the text"])))
        await until(lambda: gated.engine.load().queue_depth == 3)
        gated.plan.gate.set()
        answer = await newcomer
        await asyncio.gather(*held)

        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (values(answer.embeddings[0]) == expected("the text")).all()


class TestNotServing:
    """UNAVAILABLE before the model is ready and once the port is closing; the load is told all the same."""

    async def test_before_the_model_is_ready(self) -> None:
        backend = LoadingBackend()
        async with serving(backend, wait_ready=False) as server:
            unary = await failure(server.stub.Embed(pb.EmbedRequest(texts=["hello"])))
            stream = await failure(server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"])).read())
            models = await failure(server.stub.ListModels(pb.ListModelsRequest()))
            load = await server.stub.GetLoad(pb.GetLoadRequest())
            backend.warm.set()
            await until(lambda: server.lifecycle.accepting)
            answer = await server.stub.Embed(pb.EmbedRequest(texts=["hello"]))

        for error in (unary, stream, models):
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING")
            assert error.retry_ms is not None
        assert (load.state, load.accepting_requests) == (pb.LOAD_STATE_NOT_SERVING, False)
        assert len(answer.embeddings) == 1

    async def test_while_it_stops(self) -> None:
        """What was taken is answered; what comes after the port has closed is told to go elsewhere."""
        async with serving(FaultyBackend(FaultPlan())) as server:
            server.plan.gate.clear()
            held = asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello world"])))
            await until(lambda: server.engine.load().running_items == 1)
            server.begin_stop()
            await until(lambda: not server.lifecycle.accepting)
            # The connection says GOAWAY; a new one finds nobody.
            await until(lambda: server.channel.get_state() is not grpc.ChannelConnectivity.READY)
            error = await failure(server.stub.Embed(pb.EmbedRequest(texts=["hello"])))
            server.plan.gate.set()
            answer = await held
            code = await server.ended()

        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert (values(answer.embeddings[0]) == expected("hello world")).all()
        assert code == 0

    async def test_calls_are_taken_through_the_settle_time(self) -> None:
        """Balancers need a moment to look elsewhere; until then nobody is turned away."""
        async with serving(settings={"shutdown.settle_ms": "200"}) as server:
            server.begin_stop()
            await until(lambda: not server.lifecycle.accepting)
            answer = await server.stub.Embed(pb.EmbedRequest(texts=["hello"]))
            code = await server.ended()

        assert len(answer.embeddings) == 1
        assert code == 0


class TestInternal:
    """Ours: an id, never the text of an exception, and nobody else hurt."""

    async def test_a_poison_text_fails_alone(self, gated: InProcessServer) -> None:
        gated.plan.raise_on_id = poison_id()
        gated.plan.gate.clear()
        calls = [
            asyncio.ensure_future(gated.stub.Embed(pb.EmbedRequest(texts=[text])))
            for text in ("hello", "hello world", "poison", "the text")
        ]
        await until(lambda: gated.engine.requests == 4)
        gated.plan.gate.set()
        first, second, poisoned, last = await asyncio.gather(*calls, return_exceptions=True)

        assert isinstance(poisoned, grpc.aio.AioRpcError)
        error = await failure(calls[2])
        assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "ITEM_FAILED")
        assert error.metadata["error_id"] in error.message
        assert "kernel" not in error.message + str(error.trailers)
        assert error.pushback_ms == -1
        for text, answer in (("hello", first), ("hello world", second), ("the text", last)):
            assert (values(answer.embeddings[0]) == expected(text)).all()

    async def test_neighbours_in_one_batch_are_unharmed(self) -> None:
        """All in one pass: the bad text is found by halving, and only its caller is told."""
        plan = FaultPlan(raise_on_id=poison_id())
        async with serving(FaultyBackend(plan)) as server:
            plan.gate.clear()
            blocker = asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["a"])))
            await until(lambda: server.engine.load().running_items == 1)
            texts = ["hello", "world", "the poison text", "hello world", "text"]
            calls = [asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=[text]))) for text in texts]
            await until(lambda: server.engine.requests == 6)
            plan.gate.set()
            answers = await asyncio.gather(*calls, return_exceptions=True)
            await blocker

        for text, answer in zip(texts, answers, strict=True):
            if "poison" in text:
                assert isinstance(answer, grpc.aio.AioRpcError)
                assert answer.code() is grpc.StatusCode.INTERNAL
            else:
                assert (values(answer.embeddings[0]) == expected(text)).all()

    async def test_vectors_that_are_not_finite_are_never_sent(self) -> None:
        plan = FaultPlan(nan_on_id=poison_id())
        async with serving(FaultyBackend(plan)) as server:
            error = await refused(server, texts=["hello", "poison"])

        assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "NON_FINITE_OUTPUT")

    async def test_a_text_too_large_for_the_device_is_not_to_be_sent_again(self) -> None:
        plan = FaultPlan(memory_tokens=8)
        async with serving(FaultyBackend(plan)) as server:
            error = await refused(server, texts=["hello", "the text " * 8])

        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ITEM_TOO_LARGE")
        assert error.pushback_ms == -1


class TestStart:
    """A server that cannot serve says so and ends."""

    async def test_a_warm_up_that_fails(self) -> None:
        with pytest.raises(StartupError, match="ended with 1"):
            async with serving(FaultyBackend(FaultPlan(fail_warm_up="no memory"))):
                pytest.fail("it must never serve")

    async def test_settings_that_are_wrong(self) -> None:
        with pytest.raises(ConfigError) as caught:
            async with serving(settings={"limits.max_texts": "0", "server.max_request_ms": "soon"}):
                pytest.fail("it must never serve")

        assert len(caught.value.problems) == 2

    async def test_the_identity_is_the_backends(self) -> None:
        async with serving(FakeBackend(fake_identity(dimension=24))) as server:
            model = (await server.stub.GetModel(pb.GetModelRequest())).model

        assert model.dimension == 24
