"""Requests that are no requests, through the whole server: each gets a status that is meant, and nothing breaks.

``tests/property/fuzzing.py`` says how to run it for longer.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from embedserve.api import wire
from embedserve.api.validation import RequestLimits, RequestValidator
from embedserve.errors import CallerError
from embedserve.testing.backends import fake_identity
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from tests.conformance.frames import EMBED as PATH
from tests.conformance.frames import connected, data, grpc_message
from tests.integration.server.calls import SERVICE, expected, until, values
from tests.property.fuzzing import PROFILE, mutated, seeds

SEEDS = 2400
ONE_S_MAX = 5.0
Code = grpc.StatusCode
ALLOWED = {
    Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION, Code.UNIMPLEMENTED,
    Code.RESOURCE_EXHAUSTED,
}  # fmt: skip
"""INTERNAL would be a fault of ours, UNKNOWN an exception that went past the guard."""

EMBED = pb.EmbedRequest(
    model="fake/model", texts=["hello world", "the text", "x" * 300], truncate=pb.TRUNCATE_END, dimensions=8,
    normalize=True, prompt_name="query", encoding=pb.ENCODING_INT8,
)  # fmt: skip
TOKENS = pb.EmbedRequest(token_ids=[pb.TokenIds(ids=[1, 2, 3]), pb.TokenIds(ids=[4] * 40)], truncate=pb.TRUNCATE_START)
GOOD: tuple[tuple[str, bytes], ...] = (
    ("Embed", EMBED.SerializeToString()),
    ("Embed", TOKENS.SerializeToString()),
    ("EmbedStream", EMBED.SerializeToString()),
    ("EmbedStream", TOKENS.SerializeToString()),
    ("CountTokens", pb.CountTokensRequest(texts=["hello", "world"], prompt_name="query").SerializeToString()),
    ("GetModel", pb.GetModelRequest(model="fake/model").SerializeToString()),
    ("ListModels", b"\x0a\x01x"),
    ("GetLoad", b"\x08\x01"),
)


@pytest.fixture(autouse=True)
def errors() -> Iterator[list[dict[str, Any]]]:
    """What the server logs at error level and above; empty at the end."""
    logged: list[dict[str, Any]] = []

    def keep(_logger: Any, method: str, event: dict[str, Any]) -> dict[str, Any]:
        if method in ("error", "critical", "exception"):
            logged.append(event)
        raise structlog.DropEvent

    structlog.configure(processors=[keep])
    yield logged
    structlog.reset_defaults()
    assert logged == []


@pytest.fixture
async def server() -> AsyncIterator[InProcessServer]:
    async with serving(settings={"health.stall_ms": "60000", "health.hang_ms": "120000"}) as made:
        yield made
        await until(lambda: made.guard.in_flight == 0)
        assert made.engine.load().queue_depth == 0


async def status(server: InProcessServer, method: str, raw: bytes, metadata: Any = ()) -> tuple[Code, str]:
    """How a call with these bytes ends."""
    path = f"/{SERVICE}/{method}"
    if method == "EmbedStream":
        stream = server.channel.unary_stream(path)(raw, metadata=metadata, timeout=ONE_S_MAX)
        try:
            while await stream.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        return await stream.code(), await stream.details()
    call = server.channel.unary_unary(path)(raw, metadata=metadata, timeout=ONE_S_MAX)
    return await call.code(), await call.details()


async def test_mutations_of_every_request(server: InProcessServer) -> None:
    """Each call has its status in time; a good call afterwards has its own vector."""

    async def one(seed: int) -> None:
        method, good = GOOD[seed % len(GOOD)]
        raw = mutated(good, random.Random(seed))
        begun = time.monotonic()
        code, details = await status(server, method, raw)
        assert code in ALLOWED, f"FUZZ_SEED={seed}: {method} {raw!r}: {code} {details}"
        assert "Traceback" not in details
        assert time.monotonic() - begun < ONE_S_MAX, f"FUZZ_SEED={seed}"

    pending: set[asyncio.Task[None]] = set()
    for seed in seeds(SEEDS):
        pending.add(asyncio.create_task(one(seed)))
        if len(pending) >= 16:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
    await asyncio.gather(*pending)

    answer = await server.stub.Embed(pb.EmbedRequest(texts=["hello world"]))
    assert (values(answer.embeddings[0]) == expected("hello world")).all()


METADATA = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(
                ["x-embedserve-tenant", "x-embedserve-priority", "traceparent", "tracestate", "baggage", "te"]
            ),
            st.one_of(
                st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200),
                st.sampled_from(["interactive", "bulk", "", "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "a=b," * 300]),
            ),
        ),
        st.tuples(
            st.sampled_from(["x-embedserve-tenant-bin", "grpc-trace-bin", "grpc-tags-bin"]), st.binary(max_size=100)
        ),
    ),
    max_size=6,
)


async def test_metadata_of_any_kind(server: InProcessServer) -> None:
    """Wrong priorities and tenants are the caller's fault; what is not ours is ignored."""
    loop = asyncio.get_running_loop()

    @PROFILE
    @given(METADATA)
    def try_all(metadata: list[tuple[str, Any]]) -> None:
        call = status(server, "Embed", EMBED.SerializeToString(), metadata)
        code, details = asyncio.run_coroutine_threadsafe(call, loop).result(ONE_S_MAX)
        assert code in {Code.OK, Code.INVALID_ARGUMENT}, f"{metadata}: {code} {details}"

    await asyncio.to_thread(try_all)


UINT32 = st.integers(0, 2**32 - 1)
INT32 = st.integers(-(2**31), 2**31 - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


def token_ids(ids: list[int]) -> pb.TokenIds:
    return pb.TokenIds(ids=ids)


OPTIONS: dict[str, Any] = {
    "model": st.one_of(st.just(""), TEXT),
    "texts": st.one_of(st.lists(TEXT, max_size=8), st.integers(0, 70).map(lambda n: [""] * n)),
    "truncate": st.one_of(st.integers(0, 3), INT32),
    "dimensions": st.one_of(st.none(), st.integers(0, 17), UINT32),
    "normalize": st.one_of(st.none(), st.booleans()),
    "prompt_name": st.one_of(st.none(), st.sampled_from(["", "query"]), TEXT),
    "encoding": st.one_of(st.integers(0, 7), INT32),
    "expected_revision": st.one_of(st.just(""), TEXT),
    "token_ids": st.lists(st.lists(st.one_of(st.integers(0, 1000), UINT32), max_size=200).map(token_ids), max_size=4),
}
LIMITS = RequestLimits(max_texts=64, max_text_bytes=100, max_send_message_bytes=4096)
VALIDATOR = RequestValidator(fake_identity(), LIMITS)


@PROFILE
@given(st.fixed_dictionaries({}, optional=OPTIONS), METADATA, st.booleans())
def test_validation_over_the_whole_space_of_requests(options: dict[str, Any], metadata: Any, stream: bool) -> None:
    """A call within every limit, or an error that is the caller's and says so; no other exception."""
    raw = pb.EmbedRequest(**options).SerializeToString()
    try:
        if stream:
            valid = VALIDATOR.embed_stream(wire.parse_embed_stream_request(raw), metadata)
        else:
            valid = VALIDATOR.embed(wire.parse_embed_request(raw), metadata)
    except CallerError as error:
        assert str(error)  # noqa: PT017
        return
    assert 1 <= valid.dimensions <= 16
    assert (valid.texts is None) is (valid.tokens is not None)
    count = len(valid.texts) if valid.texts is not None else len(valid.tokens.lengths)  # type: ignore[union-attr]
    assert count == len(valid.indexes)
    assert count + len(valid.bad_texts) <= LIMITS.max_texts
    assert all(len(text.encode()) <= LIMITS.max_text_bytes for text in valid.texts or ())
    if valid.tokens is not None:
        assert (valid.tokens.lengths <= 128).all()
        assert (valid.tokens.ids < 1000).all()
    assert len(valid.tenant) <= LIMITS.max_tenant_bytes


@PROFILE
@given(st.fixed_dictionaries({}, optional={k: OPTIONS[k] for k in ("model", "texts", "prompt_name")}))
def test_validation_of_token_counts(options: dict[str, Any]) -> None:
    try:
        valid = VALIDATOR.count_tokens(pb.CountTokensRequest(**options))
    except CallerError as error:
        assert str(error)  # noqa: PT017
        return
    assert 1 <= len(valid.texts) <= LIMITS.max_texts


TIMEOUTS = [
    "0n",
    "0H",
    "1n",
    "99999999n",
    "99999999H",
    "99999999S",
    "00000001S",
    "100000000H",
    "",
    "S",
    "-1S",
    "1",
    "1x",
]
TIMEOUTS += ["1.5S", " 1S", "9" * 300 + "S", "\u0661S"]


@pytest.mark.parametrize("header", TIMEOUTS)
async def test_timeouts_of_any_kind(server: InProcessServer, header: str) -> None:
    """Served, expired or refused by the transport; never a call that hangs."""
    async with connected(server.address) as raw:
        message = grpc_message(EMBED.SerializeToString())
        await raw.send(raw.call(1, PATH, [("grpc-timeout", header)]), data(1, message))
        frame = await raw.until(lambda f: f.type in (3, 7) or (f.stream_id == 1 and "END_STREAM" in f.flags))
        if frame.type == 1:
            assert raw.headers[1].get("grpc-status") in {"0", "4", "8", "13"}
