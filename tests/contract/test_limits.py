"""Every limit, once: at it a request passes, over it the answer has the promised status, reason and the setting's name.

The last class fails when a setting is added that looks like a limit and is neither here nor excused.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import pytest

from embedserve.config import Config
from embedserve.settings import settings_of
from embedserve.testing import FaultPlan, FaultyBackend
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from tests.integration.server.calls import failure, read, until
from tests.log_fixtures import silent_log  # noqa: F401 - an autouse fixture of this module

INVALID, EXHAUSTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
MIB = 1 << 20
Act = Callable[[InProcessServer], Awaitable[object]]


def embed(texts: list[str], **options: object) -> Act:
    metadata = options.pop("metadata", ())
    return lambda server: server.stub.Embed(pb.EmbedRequest(texts=texts, **options), metadata=metadata)


def stream(texts: list[str]) -> Act:
    return lambda server: read(server.stub.EmbedStream(pb.EmbedStreamRequest(texts=texts)))


def count(texts: list[str]) -> Act:
    return lambda server: server.stub.CountTokens(pb.CountTokensRequest(texts=texts))


def raw(size: int) -> Act:
    """A request of so many bytes on the wire: one text, and a model's name as padding that is refused later."""

    async def act(server: InProcessServer) -> object:
        request = pb.EmbedRequest(texts=["hello"], expected_revision="x" * (size - 10))
        assert request.ByteSize() == size
        return await server.stub.Embed(request)

    return act


def unary_texts(more: int) -> Act:
    """As many texts as the model's description says that one answer has room for, and ``more``."""

    async def act(server: InProcessServer) -> object:
        model = (await server.stub.GetModel(pb.GetModelRequest())).model
        return await server.stub.Embed(pb.EmbedRequest(texts=["a"] * (model.max_texts_unary + more)))

    return act


def headers(size: int) -> Act:
    return embed(["hello"], metadata=tuple((f"x-header-{i}", "x" * 1000) for i in range(size // 1000)))


@asynccontextmanager
async def held(server: InProcessServer, texts: list[str], calls: int) -> AsyncIterator[None]:
    """So many calls that stay: the device waits at its gate."""
    server.plan.gate.clear()
    tasks = []
    for _ in range(calls):
        tasks.append(asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=texts))))
        await until(lambda: server.engine.requests == len(tasks))
    await until(lambda: server.engine.load().queue_depth + server.engine.load().running_items == calls * len(texts))
    try:
        yield
    finally:
        server.plan.gate.set()
        await asyncio.gather(*tasks)


def beside(calls: int, texts: list[str], act: Act) -> Act:
    """``act`` while so many other calls of ``texts`` are there; it is answered when they are."""

    async def both(server: InProcessServer) -> object:
        async with held(server, texts, calls):
            mine = asyncio.ensure_future(act(server))
            await until(lambda: mine.done() or server.engine.requests > calls)
            await asyncio.sleep(0)
            server.plan.gate.set()
            return await mine

    return both


@dataclass(frozen=True)
class Limit:
    """One setting, at a value that a test can reach."""

    setting: str
    value: int
    at: Act
    over: Act
    code: grpc.StatusCode
    reason: str
    """Of ErrorInfo, or of the first violation; empty where gRPC itself answers."""
    says: str = ""
    """Words of the message; the setting's name unless given."""
    others: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, str]:
        return {"admission.policies": "none", self.setting: str(self.value), **self.others}


ONE_BY_ONE = {"scheduling.max_batch_items": "1", "scheduling.batches_in_flight": "1"}
WORDS = "a " * 30
"""32 tokens."""

LIMITS = [
    Limit("limits.max_texts", 4, embed(["a"] * 4), embed(["a"] * 5), INVALID, "TOO_MANY_TEXTS"),
    Limit("limits.max_texts", 4, stream(["a"] * 4), stream(["a"] * 5), INVALID, "TOO_MANY_TEXTS"),
    Limit("limits.max_text_bytes", 8, embed(["x" * 8, "é" * 4]), embed(["é" * 4 + "x"]), INVALID, "TEXT_TOO_LARGE"),
    Limit(
        "limits.max_tenant_bytes",
        8,
        embed(["a"], metadata=(("x-embedserve-tenant", "t" * 8),)),
        embed(["a"], metadata=(("x-embedserve-tenant", "t" * 9),)),
        INVALID,
        "BAD_TENANT",
    ),
    Limit(
        "limits.max_requests_in_flight",
        3,
        beside(2, ["a"], embed(["a"])),
        beside(3, ["a"], embed(["a"])),
        EXHAUSTED,
        "TOO_MANY_REQUESTS_IN_FLIGHT",
    ),
    Limit(
        "limits.max_requests_in_flight",
        3,
        beside(2, ["a"], count(["a"])),
        beside(3, ["a"], count(["a"])),
        EXHAUSTED,
        "TOO_MANY_REQUESTS_IN_FLIGHT",
    ),
    Limit(
        "limits.max_requests_in_flight",
        1,
        count(["a"]),
        lambda server: while_tokenizing(server, embed(["a"]), count(LONG)),
        EXHAUSTED,
        "TOO_MANY_REQUESTS_IN_FLIGHT",
        others={"tokenizer.threads": "1", "tokenizer.inline_chars": "0"},
    ),
    Limit(
        "server.max_send_message_bytes",
        16384,
        unary_texts(0),
        unary_texts(1),
        INVALID,
        "ANSWER_TOO_LARGE",
        others={"server.stream_message_bytes": "4096"},
    ),
    Limit(
        "server.max_receive_message_bytes",
        2048,
        raw(2048),
        raw(2049),
        EXHAUSTED,
        "",
        says="Received message larger than max (2049 vs. 2048)",
        others={"limits.max_text_bytes": "1024"},
    ),
    Limit(
        "server.max_metadata_bytes",
        16384,
        headers(14000),
        headers(17000),
        EXHAUSTED,
        "",
        says="metadata size exceeds",
    ),
    Limit(
        "server.max_request_ms",
        100,
        embed(["a"]),
        lambda server: never_run(server, embed(["a"])),
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "DEADLINE_EXPIRED",
    ),
    Limit(
        "scheduling.max_queue_items",
        4,
        beside(2, ["a"], embed(["a"] * 2)),
        beside(2, ["a"], embed(["a"] * 3)),
        EXHAUSTED,
        "QUEUE_FULL",
        others={**ONE_BY_ONE, "limits.max_texts": "4"},
    ),
    Limit(
        "scheduling.max_queue_tokens",
        128,
        beside(2, [WORDS], embed([WORDS] * 2)),
        beside(2, [WORDS], embed([WORDS] * 3)),
        EXHAUSTED,
        "QUEUE_FULL",
        others={**ONE_BY_ONE, "scheduling.max_batch_tokens": "128"},
    ),
    Limit(
        "scheduling.max_queue_tokens",
        128,
        embed([WORDS] * 4),
        embed([WORDS] * 5),
        EXHAUSTED,
        "SUBMISSION_EXCEEDS_QUEUE",
        others={**ONE_BY_ONE, "scheduling.max_batch_tokens": "128"},
    ),
]


LONG = ["a " * 250] * 2000
"""Half a second of a tokenizer, in pieces."""
THREADS = {"tokenizer.threads": "1", "tokenizer.inline_chars": "0"}
LIMITS += [
    Limit(
        "tokenizer.max_pending",
        1,
        embed(["a"]),
        lambda server: while_tokenizing(server, embed(["a"])),
        EXHAUSTED,
        "TOKENIZER_QUEUE_FULL",
        others=THREADS,
    ),
    Limit(
        "tokenizer.max_request_ms",
        1,
        embed(["a"]),
        embed(LONG, truncate=pb.TRUNCATE_END),
        EXHAUSTED,
        "TOKENIZER_TIME_EXCEEDED",
        others=THREADS,
    ),
]


async def while_tokenizing(server: InProcessServer, act: Act, other_act: Act | None = None) -> object:
    """``act`` while the only thread works for another."""
    other = asyncio.ensure_future((other_act or embed(LONG, truncate=pb.TRUNCATE_END))(server))
    await until(lambda: server.engine.tokenizer_use.pending == 1)
    try:
        return await act(server)
    finally:
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)


async def never_run(server: InProcessServer, act: Act) -> object:
    """``act`` while the device does nothing."""
    server.plan.gate.clear()
    try:
        return await act(server)
    finally:
        server.plan.gate.set()


def named(limit: Limit) -> str:
    return f"{limit.setting}-{limit.reason or 'gRPC'}"


class TestRefusals:
    """What a caller meets."""

    @pytest.mark.parametrize("limit", LIMITS, ids=named)
    async def test_at_the_limit_a_request_passes(self, limit: Limit) -> None:
        async with serving(FaultyBackend(FaultPlan()), settings=limit.settings) as server:
            if limit.setting == "server.max_receive_message_bytes":  # it arrives, and is refused for its content
                assert (await failure(limit.at(server))).reason == "REVISION_MISMATCH"
            else:
                await limit.at(server)

    @pytest.mark.parametrize("limit", LIMITS, ids=named)
    async def test_over_it_the_answer_names_the_setting(self, limit: Limit) -> None:
        async with serving(FaultyBackend(FaultPlan()), settings=limit.settings) as server:
            error = await failure(limit.over(server))
            await server.stub.GetLoad(pb.GetLoadRequest())  # and the server goes on

        assert error.code is limit.code
        assert limit.reason in (error.reason, *error.violations.values())
        assert (limit.says or limit.setting) in error.message


class TestBounds:
    """Limits that refuse nobody: they hold work back, or cut it into pieces."""

    async def test_server_max_concurrent_streams(self) -> None:
        """The third call of a connection waits its turn; another connection is not held up."""
        async with serving(FaultyBackend(FaultPlan()), settings={"server.max_concurrent_streams": "2"}) as server:
            await server.stub.Embed(pb.EmbedRequest(texts=["a"]))  # the server's SETTINGS are here
            async with held(server, ["a"], 2):
                third = asyncio.ensure_future(server.stub.GetLoad(pb.GetLoadRequest()))
                async with server.connect() as other:
                    call = other.unary_unary("/embedserve.v1.EmbeddingService/GetLoad")
                    for _ in range(20):
                        await call(b"")
                assert not third.done()
            await third

    @pytest.mark.parametrize(("limit", "all_served"), [("64", True), ("1", False)])
    async def test_server_max_pending_calls(self, limit: str, all_served: bool) -> None:
        """What comes while the event loop is away is held up to the limit, and beyond it dropped by gRPC."""
        async with serving(FaultyBackend(FaultPlan()), settings={"server.max_pending_calls": limit}) as server:
            with grpc.insecure_channel(server.address) as channel:
                grpc.channel_ready_future(channel).result(5)
                ask = channel.unary_unary("/embedserve.v1.EmbeddingService/GetLoad")
                calls = [ask.future(b"", timeout=10) for _ in range(40)]
                time.sleep(0.3)  # noqa: ASYNC251 - the loop is away: the fault
                await until(lambda: all(call.done() for call in calls))
            codes = {call.code() for call in calls}
            await server.stub.GetLoad(pb.GetLoadRequest())

        assert (codes == {grpc.StatusCode.OK}) is all_served, codes

    @pytest.mark.parametrize(
        ("setting", "value", "text", "held_items"),
        [("scheduling.max_batch_items", 8, "a", 8), ("scheduling.max_batch_tokens", 192, WORDS, 2)],
    )
    async def test_scheduling_max_batch(self, setting: str, value: int, text: str, held_items: int) -> None:
        """A larger request takes several passes, each full; in tokens two fifths full, which leaves room for others."""
        async with serving(FaultyBackend(FaultPlan()), settings={setting: str(value)}) as server:
            await server.stub.Embed(pb.EmbedRequest(texts=[text] * 4 * held_items))
            rows = [rows for rows, _ in server.backend.passes]
            tokens = [tokens for _, tokens in server.backend.passes]

        assert sum(rows) == 4 * held_items
        assert max(rows) == held_items
        assert max(tokens) <= 128

    async def test_server_stream_window_items(self) -> None:
        """No more of one stream is in the queue and on the device, however large it is."""
        settings = {"server.stream_window_items": "8", "scheduling.max_batch_items": "2"}
        async with serving(FaultyBackend(FaultPlan()), settings=settings) as server:
            server.plan.gate.clear()
            call = asyncio.ensure_future(stream(["a"] * 100)(server))

            def there() -> int:
                load = server.engine.load()
                return load.queue_depth + load.running_items

            await until(lambda: there() == 8)
            for _ in range(20):  # turns in which more could come
                await server.stub.GetLoad(pb.GetLoadRequest())
            assert there() == 8
            server.plan.gate.set()
            got = await call

        assert len(got.vectors) == 100

    async def test_server_stream_message_bytes(self) -> None:
        """A batch's rows are sent in as many messages as it takes."""
        settings = {"server.stream_message_bytes": "1024"}
        async with serving(FaultyBackend(FaultPlan()), settings=settings) as server:
            got = await stream(["a"] * 100)(server)

        assert len(got.vectors) == 100
        assert 512 < max(got.sizes) <= 1024

    async def test_limits_max_tenants(self) -> None:
        """More tenants are not refused; those over it share a place."""
        async with serving(FaultyBackend(FaultPlan()), settings={"limits.max_tenants": "2"}) as server:
            server.plan.gate.clear()
            calls = [
                asyncio.ensure_future(embed(["a"], metadata=(("x-embedserve-tenant", f"t{i}"),))(server))
                for i in range(5)
            ]
            await until(lambda: server.engine.requests == 5)
            server.plan.gate.set()

            assert len(await asyncio.gather(*calls)) == 5


ELSEWHERE = {
    "server.frontend_memory_bytes": "of several processes: tests/integration/frontends/test_remote.py has it",
    "server.max_connection_idle_ms": "a connection's life: tests/integration/api/test_server.py has the option",
    "server.max_connection_age_ms": "a connection's life: tests/integration/api/test_server.py has the option",
    "server.max_connection_age_grace_ms": "a connection's life: tests/integration/api/test_server.py has the option",
    "tokenizer.chunk_texts": "how work is cut up; nobody is refused or held back by it",
    "tokenizer.chunk_chars": "how work is cut up; nobody is refused or held back by it",
    "tokenizer.inline_chars": "where work is done; nobody is refused or held back by it",
    "scheduling.oom_rise_tokens": "how fast a budget recovers; nobody is refused or held back by it",
    "scheduling.max_queue_delay_ms": "how long a free worker waits; tests/unit/scheduling have it",
    "scheduling.max_wait_ms": "who goes first; tests/unit/scheduling have it",
}
"""Settings that look like limits, and where or why they are not above."""


class TestCompleteness:
    """A limit cannot be added without a test."""

    def test_every_limit_is_in_a_table(self) -> None:
        sections = ("server.", "limits.", "tokenizer.", "scheduling.")
        sizes = re.compile(r"\.max_|_(bytes|items|tokens|texts|chars|pending)$")
        limits = {s.path for s in settings_of(Config) if s.path.startswith(sections) and sizes.search(s.path)}
        bounds = "".join(name.removeprefix("test_") + " " for name in vars(TestBounds) if name.startswith("test_"))
        in_bounds = {
            name for name in limits if name.replace(".", "_") in bounds or name.startswith("scheduling.max_batch_")
        }

        assert limits == {limit.setting for limit in LIMITS} | in_bounds | ELSEWHERE.keys()

    def test_every_default_is_far_from_what_an_ordinary_call_needs(self) -> None:
        """32 texts of 500 characters, from a tenant with a name."""
        config = Config()

        assert config.limits.max_texts >= 32
        assert config.limits.max_text_bytes >= 500 * 4
        assert config.server.max_receive_message_bytes >= 32 * 500 * 4
        assert config.limits.max_requests_in_flight > config.server.max_concurrent_streams >= 100
