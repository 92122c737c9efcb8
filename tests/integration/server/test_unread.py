"""A server that sheds: calls that are refused before their message is read, those that are not, and who is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from embedserve.engine import unread
from embedserve.telemetry.logs import flush_lines
from embedserve.telemetry.settings import TelemetrySettings
from embedserve.telemetry.setup import Telemetry, setup_telemetry
from embedserve.testing import FaultPlan, FaultyBackend
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from tests.canary import WATCH
from tests.fault.figures import Figures
from tests.integration.server.calls import SERVICE, expected, failure, read, until, values

ROOM = 6
"""Texts that the queue of these servers takes, the running one included."""
SETTINGS = {
    "scheduling.max_queue_items": str(ROOM),
    "scheduling.max_batch_items": "1",
    "scheduling.batches_in_flight": "1",
    "limits.max_texts": str(ROOM),
    "admission.policies": "none",
}
HELLO = pb.EmbedRequest(texts=["hello"])
CANARY = "xylophonequartz"


@pytest.fixture(autouse=True)
def long_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine must not end it between two calls of a test."""
    monkeypatch.setattr(unread, "WATCH_NS", 60_000_000_000)


@asynccontextmanager
async def shedding(
    free: int = 0, telemetry: Telemetry | None = None, **settings: str
) -> AsyncIterator[InProcessServer]:
    """A server that has refused a call a moment ago, and has room for so many texts now."""
    async with serving(FaultyBackend(FaultPlan()), settings={**SETTINGS, **settings}, telemetry=telemetry) as server:
        await server.stub.Embed(HELLO)
        await read(server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"])))
        for priority in ("interactive", "bulk"):
            await server.stub.Embed(HELLO, metadata=(("x-embedserve-priority", priority),))
        server.plan.gate.clear()
        held = [asyncio.ensure_future(server.stub.Embed(HELLO)) for _ in range(ROOM - free)]
        await until(lambda: server.engine.requests == ROOM - free)
        error = await failure(server.stub.Embed(pb.EmbedRequest(texts=["hello"] * ROOM)))
        assert error.reason == "QUEUE_FULL"
        try:
            yield server
        finally:
            server.plan.gate.set()
            await asyncio.gather(*held)
        await until(lambda: server.guard.in_flight == 0)


def headers_only(server: InProcessServer, method: str, *metadata: tuple[str, str]) -> Any:
    """A call that sends nothing but its headers."""
    if method == "EmbedStream":
        return server.channel.stream_stream(f"/{SERVICE}/{method}")(metadata=metadata).read()
    return server.channel.stream_unary(f"/{SERVICE}/{method}")(metadata=metadata)


class TestRefused:
    @pytest.mark.parametrize("method", ["Embed", "EmbedStream"])
    async def test_on_the_headers_alone_in_the_words_of_every_refusal(self, method: str) -> None:
        async with shedding() as server:
            ordinary = await failure(server.stub.Embed(HELLO))
            error = await failure(headers_only(server, method))

        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (error.reason, error.message, error.metadata) == (ordinary.reason, ordinary.message, ordinary.metadata)
        assert error.metadata["policy"] == "queue"
        assert error.retry_ms is not None
        assert error.pushback_ms == round(error.retry_ms)

    async def test_an_interactive_call_is_not_refused_for_a_bulk_callers_sake(self) -> None:
        """By throughput: what waits in bulk is not before it."""
        bulk, interactive = (("x-embedserve-priority", "bulk"),), (("x-embedserve-priority", "interactive"),)
        settings = {"admission.policies": "latency_p95", "admission.latency_p95.slo_ms": "500"}
        async with serving(Slow(FaultPlan()), settings={**SETTINGS, **settings, **LARGE}) as server:
            for texts in (1, 2, 1, 3, 1):
                await server.stub.Embed(pb.EmbedRequest(texts=["hello"] * texts), metadata=bulk)
                await server.stub.Embed(HELLO, metadata=interactive)
            server.plan.gate.clear()
            held = []
            while not held or not held[-1].done():
                held.append(asyncio.ensure_future(server.stub.Embed(HELLO, metadata=bulk)))
                await until(lambda: server.engine.requests == len(held) or held[-1].done())
            assert server.engine.unread.watched(0)
            for _ in range(3):
                assert (await failure(headers_only(server, "Embed", *bulk))).metadata["policy"] == "latency_p95"
            before = server.engine.requests
            mine = asyncio.ensure_future(server.stub.Embed(HELLO, metadata=interactive))
            await until(lambda: server.engine.requests > before or mine.done())
            server.plan.gate.set()
            answer = await mine
            await asyncio.gather(*held, return_exceptions=True)

        assert len(answer.embeddings) == 1


LARGE = {"scheduling.max_queue_items": "1000"}


class Slow(FaultyBackend):
    """20 ms a pass."""

    def __init__(self, plan: FaultPlan) -> None:
        super().__init__(plan)
        self._pass_ns = lambda _batch: 20_000_000


class TestRead:
    """Who has room is read, and judged by what it is."""

    async def test_it_is_answered_as_ever(self) -> None:
        async with shedding(free=3) as server:
            unary = asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello world", "the text"])))
            await until(lambda: server.engine.load().queue_depth == ROOM - 2)
            stream = server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"]))
            await until(lambda: server.engine.load().queue_depth == ROOM - 1)
            server.plan.gate.set()
            answer, streamed = await unary, await read(stream)
            watched = server.engine.unread.watched(0)

        assert watched
        for embedding, text in zip(answer.embeddings, ("hello world", "the text"), strict=True):
            assert (values(embedding) == expected(text)).all()
        assert (streamed.vectors[0] == expected("hello")).all()
        timings = {field.name: value for field, value in answer.timings.ListFields()}
        total_ms = timings.pop("total_ms")
        assert sum(timings.values()) == pytest.approx(total_ms, abs=0.01)
        assert total_ms > 0

    async def test_its_bytes_are_those_of_a_server_that_has_room(self) -> None:
        request = pb.EmbedRequest(texts=["hello world"])
        async with shedding(free=2) as server:
            call = asyncio.ensure_future(server.stub.Embed(request))
            await until(lambda: server.engine.load().queue_depth == ROOM - 2)
            server.plan.gate.set()
            answers = [await call]
            server.guard.door = None
            answers.append(await server.stub.Embed(request))
        for answer in answers:
            answer.ClearField("timings")

        assert answers[0].SerializeToString(deterministic=True) == answers[1].SerializeToString(deterministic=True)

    async def test_one_that_is_larger_than_it_was_taken_for_is_refused_on_its_estimate(self) -> None:
        async with shedding(free=1) as server:
            error = await failure(server.stub.Embed(pb.EmbedRequest(texts=["hello"] * 3)))
            fits = asyncio.ensure_future(server.stub.Embed(HELLO))
            await until(lambda: server.engine.load().queue_depth == ROOM - 1)
            server.plan.gate.set()
            await fits

        assert (error.reason, error.metadata["items"]) == ("QUEUE_FULL", "3")

    @pytest.mark.parametrize("method", ["Embed", "EmbedStream"])
    async def test_its_lot_is_drawn_once(self, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where it was judged unread it is judged on its estimate without; a call that nobody asked about is not."""
        asked: list[tuple[str, bool]] = []
        async with shedding(free=2) as server:
            scheduler = server.engine.scheduler
            judge = scheduler.judge

            def note(*size: int, unread: bool = False, drawn: bool = False, **how: Any) -> Any:
                asked.append(("unread" if unread else "estimate", drawn))
                return judge(*size, unread=unread, drawn=drawn, **how)

            monkeypatch.setattr(scheduler, "judge", note)
            server.plan.gate.set()
            for _ in range(2):
                if method == "Embed":
                    await server.stub.Embed(HELLO)
                else:
                    await read(server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"])))
                server.guard.door = None

        assert asked == [("unread", False), ("estimate", True), ("estimate", False)]

    async def test_a_stream_longer_than_its_window(self) -> None:
        async with shedding(free=3, **{"server.stream_window_items": "2"}) as server:
            texts = ["hello world", "the text"] * 3
            stream = asyncio.ensure_future(read(server.stub.EmbedStream(pb.EmbedStreamRequest(texts=texts))))
            await until(lambda: server.engine.requests == ROOM - 2)
            server.plan.gate.set()
            streamed = await stream

        assert len(streamed.vectors) == len(texts)
        assert all((streamed.vectors[i] == expected(text)).all() for i, text in enumerate(texts))

    async def test_what_is_wrong_with_it_is_told(self) -> None:
        async with shedding(free=2) as server:
            empty = await failure(server.stub.Embed(pb.EmbedRequest(texts=["", "a"])))
            garbage = await failure(server.channel.unary_unary(f"/{SERVICE}/Embed")(b"\xff\xff"))

        assert empty.violations == {"texts[0]": "TEXT_EMPTY"}
        assert garbage.violations == {"": "MALFORMED_MESSAGE"}

    @pytest.mark.parametrize(
        ("key", "value", "reason"),
        [("x-embedserve-priority", "urgent", "UNKNOWN_PRIORITY"), ("x-embedserve-tenant", "x" * 65, "BAD_TENANT")],
    )
    async def test_wrong_headers_are_told_with_no_room_at_all(self, key: str, value: str, reason: str) -> None:
        async with shedding() as server:
            error = await failure(server.stub.Embed(HELLO, metadata=((key, value),)))

        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.violations == {f"metadata.{key}": reason}

    async def test_other_methods_are_answered(self) -> None:
        async with shedding() as server:
            load = await server.stub.GetLoad(pb.GetLoadRequest())
            count = await server.stub.CountTokens(pb.CountTokensRequest(texts=["hello"]))
            models = await server.stub.ListModels(pb.ListModelsRequest())

        assert load.state == pb.LOAD_STATE_OVERLOADED
        assert len(count.counts) == len(models.models) == 1

    async def test_a_server_that_stops_says_so(self) -> None:
        async with shedding() as server:
            server.engine.drain()
            error = await failure(server.stub.Embed(HELLO))

        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING")


class TestTold:
    """One refusal counts once, wherever it is shown; and of the message nothing is, for nobody read it."""

    async def test_metrics_the_line_and_the_page(self, capfd: pytest.CaptureFixture[str]) -> None:
        telemetry = setup_telemetry(TelemetrySettings(log_requests="all", log_format="json"))
        metadata = (("x-embedserve-tenant", "blue"), ("x-embedserve-priority", "bulk"))
        request = pb.EmbedRequest(texts=[f"{CANARY} {n}" for n in range(3)])
        async with shedding(telemetry=telemetry, **{"operations.enabled": "true"}) as server:
            before = await scrape(telemetry)
            error = await failure(server.stub.Embed(request, metadata=metadata))
            stream = server.stub.EmbedStream(pb.EmbedStreamRequest(texts=request.texts), metadata=metadata)
            again = await failure(stream.read())
            after = await scrape(telemetry)
            async with httpx.AsyncClient(base_url=server.operations_url) as client:
                page = (await client.get("/statusz.json")).text
            server.engine.unread._watched_until_ns = 0  # so that it ends with a call that is read
        flush_lines()
        log = capfd.readouterr().err
        WATCH.saw("the log", log)

        decisions = "embedserve_admission_decisions_total"
        rejected = {"decision": "rejected", "policy": "queue", "reason": "QUEUE_FULL"}
        for name, labels in (
            (decisions, {**rejected, "stage": "unread"}),
            (decisions, rejected),
            ("embedserve_requests_total", {"verdict": "rejected"}),
            ("embedserve_requests_total", {}),
            ("rpc_server_call_duration_seconds_count", {"rpc_response_status_code": "RESOURCE_EXHAUSTED"}),
        ):
            assert after.total(name, **labels) - before.total(name, **labels) == 2, (name, labels)
        lines = [line for line in map(json.loads, log.splitlines()) if line["event"] == "rpc" and "tenant" in line]
        assert [line["method"].rpartition("/")[2] for line in lines] == ["Embed", "EmbedStream"]
        for line in lines:
            assert (line["status"], line["tenant"], line["policy"]) == ("RESOURCE_EXHAUSTED", "blue", "queue")
            assert line["error_type"] == "QUEUE_FULL"
        shown = json.loads(page)
        (refusal,) = shown["admission"]["refusals"]
        assert (refusal["policy"], refusal["reason"], refusal["total"]) == ("queue", "QUEUE_FULL", 3)
        assert [(c["tenant"], c["policy"], c["texts"]) for c in shown["requests"]["refused"] if c["tenant"]] == [
            ("blue", "queue", None),
            ("blue", "queue", None),
        ]
        for said in (log, page, error.message, str(error.trailers), again.message, str(again.trailers)):
            assert CANARY not in said


async def scrape(telemetry: Telemetry) -> Figures:
    render = telemetry.render_metrics
    assert render is not None
    _, body = await asyncio.to_thread(render, "")
    WATCH.saw("/metrics", body.decode())
    assert CANARY not in body.decode()
    return Figures(body.decode())
