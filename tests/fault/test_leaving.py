"""Rows 38 to 42: callers that go, at every stage, by every way. Their places are free at once."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from embedserve.model.tokenizer import TextTokenizer
from embedserve.testing import FakeBackend, FaultPlan, FaultProxy, FaultyBackend
from embedserve.testing.backends import fake_identity
from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.fault.sound import sound
from tests.integration.server.calls import expected, failure, until, values

NO_POLICY = {"admission.policies": "none"}


class TestCancel:
    """While it waits for a tokenizer, waits for the device, runs, and in races with each end."""

    async def test_while_it_waits_for_a_tokenizer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One thread, held by a long request: those behind it go before it comes to them."""
        settings = NO_POLICY | {"tokenizer.threads": "1", "tokenizer.inline_chars": "0"}
        at_work, go_on = threading.Event(), threading.Event()
        count = TextTokenizer.count

        def held(tokenizer: TextTokenizer, *args: Any, **options: Any) -> Any:
            at_work.set()
            assert go_on.wait(30)
            return count(tokenizer, *args, **options)

        monkeypatch.setattr(TextTokenizer, "count", held)
        backend = FakeBackend()
        async with sound(backend, settings=settings) as made:
            server = made.server
            long = server.stub.CountTokens(pb.CountTokensRequest(texts=["hello world"]))
            asked = asyncio.ensure_future(long)
            try:
                await until(at_work.is_set)
                calls = [server.stub.Embed(pb.EmbedRequest(texts=["hello"])) for _ in range(50)]
                await until(lambda: server.guard.in_flight == 51)
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
                await until(lambda: server.guard.in_flight == 1)
            finally:
                go_on.set()
            await asked
            await made.settled()

        assert backend.passes == []

    async def test_while_it_waits_for_the_device(self) -> None:
        plan = FaultPlan()
        backend = FaultyBackend(plan)
        async with sound(backend, settings=NO_POLICY | {"scheduling.batches_in_flight": "1"}) as made:
            server = made.server
            plan.gate.clear()
            first = asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello"])))
            await until(lambda: server.engine.load().running_items == 1)
            calls = [server.stub.Embed(pb.EmbedRequest(texts=["world"] * 3)) for _ in range(100)]
            await until(lambda: server.engine.load().queue_depth == 300)
            for call in calls:
                call.cancel()
            await until(lambda: server.engine.load().queue_depth == 0)
            plan.gate.set()
            await first
            found = await made.settled()

        assert backend.passes == [(1, 3)]
        assert found.by("embedserve_items_settled_total", "verdict") == {"done": 1, "cancelled": 300}
        assert found.by("embedserve_requests_total", "verdict") == {"done": 1, "cancelled": 100}

    async def test_while_it_runs(self) -> None:
        """What runs cannot be stopped; the result is dropped and a neighbour in the same pass keeps its own."""
        plan = FaultPlan()
        async with sound(FaultyBackend(plan), settings=NO_POLICY) as made:
            server = made.server
            plan.gate.clear()
            first = asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello"])))
            await until(lambda: server.engine.load().running_items == 1)
            gone = server.stub.Embed(pb.EmbedRequest(texts=["world"] * 3))
            stays = asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["the text"])))
            await until(lambda: server.guard.in_flight == 3)
            gone.cancel()
            await until(lambda: server.guard.in_flight == 2)
            plan.gate.set()
            await first
            answer = await stays
            found = await made.settled()

        assert np.array_equal(values(answer.embeddings[0]), expected("the text"))
        assert found.by("embedserve_requests_total", "verdict") == {"done": 2, "cancelled": 1}

    @pytest.mark.parametrize("seed", range(3))
    async def test_races_with_every_end(self, seed: int) -> None:
        """Cancels at random instants around the answer: each item settles once, each call is counted once."""
        rng = random.Random(seed)
        backend = FakeBackend(pass_ns=lambda batch: 20_000 * len(batch.offsets))
        async with sound(backend, settings=NO_POLICY | {"scheduling.max_batch_items": "16"}) as made:
            server = made.server

            async def one() -> str:
                await asyncio.sleep(rng.random() * 0.5)
                if rng.random() < 0.3:
                    call = server.stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"] * rng.randint(1, 40)))
                    ending = asyncio.ensure_future(_read_all(call))
                else:
                    call = server.stub.Embed(pb.EmbedRequest(texts=["world"] * rng.randint(1, 20)))
                    ending = asyncio.ensure_future(_await(call))
                await asyncio.sleep(rng.random() * rng.choice([0.03, 1.0]))  # a busy machine is in time for some, too
                call.cancel()
                return await ending

            outcomes = await asyncio.gather(*(one() for _ in range(400)))
            found = await made.settled()

        assert set(outcomes) == {"OK", "CANCELLED"}, "a run in which all or none were in time tells nothing"
        counted = found.by("rpc_server_call_duration_seconds_count", "rpc_response_status_code")
        assert counted.keys() <= {"OK", "CANCELLED"}
        # What is cancelled before its headers are sent never reaches the server.
        assert outcomes.count("OK") <= sum(counted.values()) <= 400

    async def test_five_thousand_in_a_second(self) -> None:
        plan = FaultPlan()
        backend = FaultyBackend(plan)
        settings = NO_POLICY | {
            "scheduling.batches_in_flight": "1", "limits.max_requests_in_flight": "8192",
            "server.max_concurrent_streams": "8192",
        }  # fmt: skip
        async with sound(backend, settings=settings) as made:
            server = made.server
            plan.gate.clear()
            first = asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello"])))
            await until(lambda: server.engine.load().running_items == 1)
            request = pb.EmbedRequest(texts=["world"])
            calls = [server.stub.Embed(request) for _ in range(5000)]
            await until(lambda: server.engine.load().queue_depth == 5000, 60)
            begun = time.monotonic()
            for call in calls:
                call.cancel()
            await until(lambda: server.engine.load().queue_depth == 0, 20)
            took = time.monotonic() - begun
            plan.gate.set()
            await first
            await asyncio.gather(*calls, return_exceptions=True)
            found = await made.settled()

        assert backend.passes == [(1, 3)]
        assert found.by("embedserve_items_settled_total", "verdict") == {"done": 1, "cancelled": 5000}
        assert took < 8, "client and server share two slow cores here: some 0.3 ms a call"


async def _await(call: object) -> str:
    try:
        await call  # type: ignore[misc]
    except asyncio.CancelledError:
        return "CANCELLED"
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def _read_all(call: grpc.aio.UnaryStreamCall) -> str:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
        code = await call.code()
    except asyncio.CancelledError:
        return "CANCELLED"
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return code.name


class TestDeadline:
    """Time that runs out, has run out, or was never set."""

    @pytest.mark.parametrize("timeout_s", [0.0, 0.001])
    async def test_too_short_is_told_and_no_pass_is_run(self, timeout_s: float) -> None:
        backend = FaultyBackend(FaultPlan())
        async with sound(backend) as made:
            server = made.server
            backend.plan.gate.clear()
            errors = await asyncio.gather(
                *(
                    failure_code(server.stub.Embed(pb.EmbedRequest(texts=["hello"]), timeout=timeout_s))
                    for _ in range(50)
                )
            )
            backend.plan.gate.set()
            await made.settled()

        assert set(errors) <= {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        # One may be closed into a batch within its millisecond, since the device is free; the rest must not follow.
        assert len(backend.passes) <= 2

    async def test_without_one_the_servers_own_holds(self) -> None:
        plan = FaultPlan()
        async with sound(FaultyBackend(plan), settings={"server.max_request_ms": "400"}) as made:
            server = made.server
            plan.gate.clear()
            running = asyncio.ensure_future(failure(server.stub.Embed(pb.EmbedRequest(texts=["hello"]))))
            await until(lambda: server.engine.load().running_items == 1)
            waiting = asyncio.ensure_future(failure(server.stub.Embed(pb.EmbedRequest(texts=["hello"]))))
            errors = [await running, await waiting]
            plan.gate.set()
            await made.settled()

        assert {error.code for error in errors} == {grpc.StatusCode.DEADLINE_EXCEEDED}

    async def test_a_thousand_that_time_out_on_one_channel_leave_nothing(self) -> None:
        plan = FaultPlan()
        backend = FaultyBackend(plan)
        async with sound(backend, settings=NO_POLICY | {"scheduling.batches_in_flight": "1"}) as made:
            server = made.server
            plan.gate.clear()
            first = asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello"])))
            await until(lambda: server.engine.load().running_items == 1)
            request = pb.EmbedRequest(texts=["world"])
            codes = await asyncio.gather(*(failure_code(server.stub.Embed(request, timeout=2.0)) for _ in range(1000)))
            plan.gate.set()
            await first
            await made.settled()

        # The longer the device hangs, the longer it is expected to: who comes late may be refused for it.
        assert set(codes) <= {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert codes.count(grpc.StatusCode.DEADLINE_EXCEEDED) > 500
        assert backend.passes == [(1, 3)]


async def failure_code(call: object) -> grpc.StatusCode:
    try:
        await call  # type: ignore[misc]
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


WIDE = NO_POLICY | {"server.stream_window_items": "32", "scheduling.max_batch_items": "16", "limits.max_texts": "4096"}


class TestStreamReaders:
    """A reader behind a network that stops, or that is gone."""

    async def test_one_behind_a_line_that_stopped_holds_a_window_and_is_ended(self) -> None:
        backend = FakeBackend(fake_identity(dimension=4096))
        async with sound(backend, settings=WIDE | {"server.stream_stall_ms": "500"}) as made:
            server = made.server
            async with FaultProxy(server.address) as proxy, grpc.aio.insecure_channel(proxy.address) as channel:
                stream = EmbeddingServiceStub(channel).EmbedStream(pb.EmbedStreamRequest(texts=["hello"] * 4000))
                await stream.read()
                proxy.to_client(held=True)
                others = [await server.stub.Embed(pb.EmbedRequest(texts=["the text"])) for _ in range(20)]
                await until(lambda: server.guard.in_flight == 0)
                rows = sum(rows for rows, _ in backend.passes)
                await made.settled()
                stream.cancel()

        assert all(np.array_equal(values(a.embeddings[0]), values(others[0].embeddings[0])) for a in others)
        # 64 MiB of vectors were asked for; what flow control and our window hold is a part of that.
        assert rows < 2000

    async def test_one_whose_line_is_cut_mid_stream_leaves_nothing_queued(self) -> None:
        plan = FaultPlan()
        backend = FaultyBackend(plan)
        async with sound(backend, settings=WIDE | {"server.stream_window_items": "1024"}) as made:
            server = made.server
            async with FaultProxy(server.address) as proxy, grpc.aio.insecure_channel(proxy.address) as channel:
                stream = EmbeddingServiceStub(channel).EmbedStream(pb.EmbedStreamRequest(texts=["hello"] * 4000))
                await stream.read()
                plan.gate.clear()
                await until(lambda: server.engine.load().queue_depth > 200)
                proxy.reset_connections()
                await until(lambda: server.engine.load().queue_depth == 0 and server.guard.in_flight == 0)
                error = await failure_code(_drain(stream))
                plan.gate.set()
                found = await made.settled()

        assert error is grpc.StatusCode.UNAVAILABLE
        assert found.total("embedserve_items_settled_total", verdict="cancelled") > 200
        assert sum(rows for rows, _ in backend.passes) < 2000


async def _drain(stream: grpc.aio.UnaryStreamCall) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass
