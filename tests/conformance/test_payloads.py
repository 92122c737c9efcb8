"""gRPC interop: what messages of any size, compressed or not, one after the other or at once, come back as.

Case names are those of grpc's ``doc/interop-test-descriptions.md``, read against our own service.
"""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest

from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from tests.conformance.frames import EMBED, connected, data, grpc_message
from tests.integration.server.calls import LIMIT_S, expected, failure, read, values

LARGE_TEXTS = 5000
"""With 60 bytes each: a request over the specification's 271828 bytes and an answer over its 314159."""
COMPRESSIONS = [grpc.Compression.Gzip, grpc.Compression.Deflate]


def large(seed: int = 0) -> pb.EmbedRequest:
    """A request as large as the specification's, with texts of its own for each ``seed``."""
    return pb.EmbedRequest(texts=[f"hello {seed} world {i} " + "x" * 40 for i in range(LARGE_TEXTS)])


async def test_empty_unary(server: InProcessServer) -> None:
    """No bytes at all: answered where nothing is needed, INVALID_ARGUMENT where a text is."""
    assert (await server.stub.ListModels(pb.ListModelsRequest())).models
    assert (await server.stub.GetModel(pb.GetModelRequest())).model.name
    assert (await server.stub.GetLoad(pb.GetLoadRequest())).accepting_requests
    for call in (server.stub.Embed(pb.EmbedRequest()), server.stub.CountTokens(pb.CountTokensRequest())):
        error = await failure(call)
        assert (error.code, error.violations) == (grpc.StatusCode.INVALID_ARGUMENT, {"texts": "NO_TEXTS"})


async def test_large_unary(server: InProcessServer) -> None:
    request = large()
    assert request.ByteSize() > 271_828

    answer = await server.stub.Embed(request)

    assert answer.ByteSize() > 314_159
    assert len(answer.embeddings) == LARGE_TEXTS
    for i in (0, LARGE_TEXTS // 2, LARGE_TEXTS - 1):
        assert (values(answer.embeddings[i]) == expected(request.texts[i])).all()


@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_client_compressed_unary(server: InProcessServer, compression: grpc.Compression) -> None:
    """A compressed request is read; the next call on the channel may be plain again."""
    request = pb.EmbedRequest(texts=["hello world " * 20, "a text"])

    compressed = await server.stub.Embed(request, compression=compression)
    plain = await server.stub.Embed(request)

    assert [values(e).tolist() for e in compressed.embeddings] == [values(e).tolist() for e in plain.embeddings]


async def test_client_compressed_unary_without_the_flag(server: InProcessServer) -> None:
    """The flag says compressed and no encoding is named: INTERNAL by the specification, and the server goes on."""
    async with connected(server.address) as raw:
        await raw.send(
            raw.call(1), data(1, grpc_message(pb.EmbedRequest(texts=["a"]).SerializeToString(), compressed=True))
        )
        trailers = await raw.trailers(1)

    assert trailers["grpc-status"] in {"12", "13"}
    assert (await server.stub.Embed(pb.EmbedRequest(texts=["a"]))).embeddings


async def test_server_compressed_unary(server: InProcessServer) -> None:
    """Not offered: floats do not compress. A client that asks is answered plainly, which every client must take."""
    request = pb.EmbedRequest(texts=["hello world"] * 50).SerializeToString()
    async with connected(server.address) as raw:
        await raw.send(
            raw.call(1, EMBED, [("grpc-accept-encoding", "identity,deflate,gzip")]), data(1, grpc_message(request))
        )
        headers = await raw.trailers(1)

    assert headers["grpc-status"] == "0"
    assert headers.get("grpc-encoding", "identity") == "identity"
    body = b"".join(f.data for f in raw.received if f.stream_id == 1 and hasattr(f, "flow_controlled_length"))
    assert body[0] == 0
    assert len(pb.EmbedResponse.FromString(body[5:]).embeddings) == 50


async def test_an_unknown_encoding_ends_that_call_alone(server: InProcessServer) -> None:
    """UNIMPLEMENTED by gRPC's compression specification; Core 1.85 says INTERNAL, before any handler."""
    async with connected(server.address) as raw:
        zstd = raw.call(1, EMBED, [("grpc-encoding", "zstd")])
        await raw.send(zstd, data(1, grpc_message(b"\x28\xb5", compressed=True)))
        assert (await raw.trailers(1))["grpc-status"] in {"12", "13"}
        await raw.send(raw.call(3), data(3, grpc_message(pb.EmbedRequest(texts=["a"]).SerializeToString())))
        assert (await raw.trailers(3))["grpc-status"] == "0"


async def test_ping_pong(server: InProcessServer) -> None:
    """No method takes a stream of requests: calls of growing and shrinking size, one after the other on one channel."""
    for count in (31_415 // 20, 9 // 3, 2653 // 20, 58_979 // 20):
        texts = [f"text {i}" for i in range(count)]
        answer = await server.stub.Embed(pb.EmbedRequest(texts=texts))
        assert (values(answer.embeddings[-1]) == expected(texts[-1])).all()


async def test_empty_stream(server: InProcessServer) -> None:
    """A stream without a text gives no message but its status; one whose texts are all bad, errors and the summary."""
    error = await failure(read(server.stub.EmbedStream(pb.EmbedStreamRequest())))
    assert (error.code, error.violations) == (grpc.StatusCode.INVALID_ARGUMENT, {"texts": "NO_TEXTS"})

    streamed = await read(server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["", ""])))
    assert set(streamed.errors) == {0, 1}
    assert streamed.summary is not None
    assert streamed.summary.usage.texts == 0


@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_client_compressed_streaming(server: InProcessServer, compression: grpc.Compression) -> None:
    texts = [f"the text of number {i}" for i in range(100)]

    streamed = await read(server.stub.EmbedStream(pb.EmbedStreamRequest(texts=texts), compression=compression))

    assert all((streamed.vectors[i] == expected(text)).all() for i, text in enumerate(texts))


async def test_server_streaming(server: InProcessServer) -> None:
    """The specification's four sizes: every vector once, whatever came before it."""
    for count in (1571, 1, 132, 2948):
        texts = [f"text {i}" for i in range(count)]
        streamed = await read(server.stub.EmbedStream(pb.EmbedStreamRequest(texts=texts)))
        assert sorted(streamed.vectors) == list(range(count))


async def test_concurrent_large_unary() -> None:
    """Ten at once on one channel: each gets its own rows."""
    requests = [large(seed) for seed in range(10)]
    room = {"scheduling.max_queue_tokens": str(1 << 24), "admission.policies": ""}
    async with serving(settings=room) as server, asyncio.timeout(4 * LIMIT_S):
        answers = await asyncio.gather(*(server.stub.Embed(request) for request in requests))

    for request, answer in zip(requests, answers, strict=True):
        assert len(answer.embeddings) == LARGE_TEXTS
        assert (values(answer.embeddings[-1]) == expected(request.texts[-1])).all()


class TestMessageSize:
    """Both ways, on both sides of each limit."""

    LIMIT = 1 << 20

    async def test_a_request_up_to_the_limit(self) -> None:
        async with serving(settings={"server.max_receive_message_bytes": str(self.LIMIT)}) as server:
            overhead = pb.EmbedRequest(texts=["x" * (self.LIMIT - 8)]).ByteSize() - (self.LIMIT - 8)
            fits = pb.EmbedRequest(texts=["x" * (self.LIMIT - overhead)])
            assert fits.ByteSize() == self.LIMIT
            over = pb.EmbedRequest(texts=["x" * (self.LIMIT - overhead + 1)])

            taken = await server.stub.Embed(fits)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await server.stub.Embed(over)

            assert len(taken.embeddings) == 1
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert server.guard.in_flight == 0

    async def test_an_answer_up_to_the_limit_and_over_it(self) -> None:
        """What would not fit is refused before any work, with what does fit."""
        async with serving(settings={"server.max_send_message_bytes": str(self.LIMIT)}) as server:
            most = (await server.stub.GetModel(pb.GetModelRequest())).model.max_texts_unary
            answer = await server.stub.Embed(pb.EmbedRequest(texts=["hello"] * most))
            passes = len(server.backend.passes)
            error = await failure(server.stub.Embed(pb.EmbedRequest(texts=["hello"] * (most + 1))))

            assert answer.ByteSize() <= self.LIMIT
            assert error.violations == {"texts": "ANSWER_TOO_LARGE"}
            assert str(most) in error.message
            assert len(server.backend.passes) == passes

    async def test_a_client_that_takes_less_than_the_answer(self, server: InProcessServer) -> None:
        """The client's own limit ends its call alone."""
        options = [("grpc.max_receive_message_length", 1000)]
        async with grpc.aio.insecure_channel(server.address, options=options) as channel:
            small = channel.unary_unary(EMBED, pb.EmbedRequest.SerializeToString, pb.EmbedResponse.FromString)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await small(pb.EmbedRequest(texts=["hello"] * 100))

        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        again = await server.stub.Embed(pb.EmbedRequest(texts=["hello"] * 100))
        assert np.isfinite(values(again.embeddings[99])).all()
