"""Rows 43 and 45, and bursts: networks that are slow, torn or gone. An answer is right or has a clean end."""

from __future__ import annotations

import asyncio
import collections
import random
import socket

import grpc
import grpc.aio
import numpy as np
import pytest

from embedserve.testing import FaultPlan, FaultProxy, FaultyBackend
from embedserve.testing.server import InProcessServer
from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.fault.fault_server import SERVER
from tests.fault.figures import figures, settled
from tests.fault.sound import sound
from tests.fault.words import WORDS
from tests.integration.server.calls import expected, until, values
from tests.integration.server.process import QUICK, running

CLEAN = {
    "OK",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
    "RESOURCE_EXHAUSTED",
}
"""What a client may see where the network is at fault. INTERNAL and UNKNOWN would blame us."""


async def send(address: str, calls: int, *, seed: int, timeout_s: float) -> collections.Counter[str]:
    """Calls of both kinds over one channel; every vector that comes is checked."""
    rng = random.Random(seed)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 50)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = EmbeddingServiceStub(channel)

        async def one() -> str:
            texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 20))) for _ in range(rng.randint(1, 20))]
            try:
                if rng.random() < 0.3:
                    summaries = 0
                    async for message in stub.EmbedStream(pb.EmbedStreamRequest(texts=texts), timeout=timeout_s):
                        summaries += message.HasField("summary")
                        for embedding in message.embeddings:
                            assert np.array_equal(values(embedding), expected(texts[embedding.index]))
                    assert summaries == 1, "OK without a summary"
                else:
                    answer = await stub.Embed(pb.EmbedRequest(texts=texts), timeout=timeout_s)
                    for text, embedding in zip(texts, answer.embeddings, strict=True):
                        assert np.array_equal(values(embedding), expected(text))
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        return collections.Counter(await asyncio.gather(*(one() for _ in range(calls))))


async def ask(server: InProcessServer) -> None:
    """Somebody with a good line is served."""
    answer = await server.stub.Embed(pb.EmbedRequest(texts=["hello world"]), timeout=5)
    assert np.array_equal(values(answer.embeddings[0]), expected("hello world"))


class TestSlowLines:
    """Bytes that are late or few are still the right ones: nobody loses a call."""

    @pytest.mark.parametrize(
        ("faults", "calls"),
        [
            ({"latency_ms": 80, "jitter_ms": 60}, 60),
            ({"slice_bytes": 1}, 15),
            ({"bytes_per_s": 10_000}, 8),
            ({"latency_ms": 20, "jitter_ms": 20, "slice_bytes": 7, "bytes_per_s": 50_000}, 20),
        ],
        ids=["latency and jitter", "1-byte slices", "10 KB/s", "all of it"],
    )
    async def test_every_call_is_answered_right(self, faults: dict[str, float], calls: int) -> None:
        async with sound() as made, FaultProxy(made.server.address, seed=1) as proxy:
            proxy.both(**faults)
            outcomes = await send(proxy.address, calls, seed=1, timeout_s=20)
            await ask(made.server)

        assert outcomes == {"OK": calls}

    async def test_a_slow_upload_is_not_counted_as_ours(self) -> None:
        """The server's clock starts when the whole message is here: a caller of 8 KB/s costs no device time."""
        async with sound() as made, FaultProxy(made.server.address) as proxy:
            proxy.to_server(bytes_per_s=8_000)
            async with grpc.aio.insecure_channel(proxy.address) as channel:
                request = pb.EmbedRequest(texts=["hello world"] * 400)
                answer = await EmbeddingServiceStub(channel).Embed(request, timeout=20)

        assert request.ByteSize() / 8_000 > 0.5
        assert answer.timings.total_ms < 500


class TestTornLines:
    """Connections that end, stop or turn bad in the middle of calls."""

    @pytest.mark.parametrize("seed", range(3))
    async def test_resets_and_cuts_at_random_moments(self, seed: int) -> None:
        rng = random.Random(seed)
        async with sound() as made, FaultProxy(made.server.address, seed=seed) as proxy:
            proxy.both(jitter_ms=10)
            sending = asyncio.ensure_future(send(proxy.address, 150, seed=seed, timeout_s=5))
            for _ in range(8):
                await asyncio.sleep(rng.random() * 0.06)
                rng.choice([proxy.reset_connections, proxy.cut_connections])()
            outcomes = await sending
            await ask(made.server)
            await made.settled()

        assert outcomes.keys() <= CLEAN
        assert outcomes.total() == 150

    @pytest.mark.parametrize("offset", [0, 9, 24, 60, 200, 700])
    @pytest.mark.parametrize("fault", ["cut_after_bytes", "reset_after_bytes"])
    async def test_after_exactly_so_many_bytes_of_the_conversation(self, fault: str, offset: int) -> None:
        """Within the preface, a frame's header, the headers, a message: none of them leaves a handler behind."""
        async with sound() as made, FaultProxy(made.server.address) as proxy:
            proxy.to_server(**{fault: offset})
            outcomes = await send(proxy.address, 5, seed=offset, timeout_s=0.5)
            await ask(made.server)
            await made.settled()

        assert outcomes.keys() <= CLEAN

    @pytest.mark.parametrize("offset", [3, 30, 80, 150, 300, 500])
    async def test_a_turned_bit_harms_its_own_connection_only(self, offset: int) -> None:
        """TCP's checksum misses one packet in some thousands that are damaged; a turned bit in a text is a text."""
        async with sound() as made, FaultProxy(made.server.address, seed=offset) as proxy:
            proxy.to_server(corrupt_byte=offset)
            async with grpc.aio.insecure_channel(proxy.address) as channel:
                stub = EmbeddingServiceStub(channel)
                calls = [stub.Embed(pb.EmbedRequest(texts=["the text"] * 3), timeout=1) for _ in range(10)]
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
            await ask(made.server)
            await made.settled()

        assert all(isinstance(o, pb.EmbedResponse | grpc.aio.AioRpcError) for o in outcomes)
        assert made.server.lifecycle.alive

    @pytest.mark.parametrize("direction", ["to_server", "to_client", "both"])
    async def test_a_blackhole_ends_at_the_deadline_and_leaves_nothing(self, direction: str) -> None:
        async with (
            sound() as made,
            FaultProxy(made.server.address) as proxy,
            grpc.aio.insecure_channel(proxy.address) as channel,
        ):
            stub = EmbeddingServiceStub(channel)
            await stub.Embed(pb.EmbedRequest(texts=["hello"]))
            getattr(proxy, direction)(blackhole=True)
            calls = [stub.Embed(pb.EmbedRequest(texts=["hello"]), timeout=0.3) for _ in range(20)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            await ask(made.server)
            await made.settled()

        assert {o.code() for o in outcomes} == {grpc.StatusCode.DEADLINE_EXCEEDED}

    async def test_a_route_that_comes_back_goes_on_where_it_was(self) -> None:
        async with sound() as made, FaultProxy(made.server.address) as proxy:
            sending = asyncio.ensure_future(send(proxy.address, 40, seed=2, timeout_s=10))
            await until(lambda: proxy.passed_bytes["server"] > 500)
            proxy.both(held=True)
            await asyncio.sleep(0.3)  # the fault itself
            proxy.restore()
            outcomes = await sending

        assert outcomes == {"OK": 40}

    async def test_half_open_connections_and_a_server_that_is_not_told(self) -> None:
        """The client's end is gone and no RST comes to us: its calls end at their deadlines, and free their places."""
        plan = FaultPlan()
        async with (
            sound(FaultyBackend(plan)) as made,
            FaultProxy(made.server.address) as proxy,
            grpc.aio.insecure_channel(proxy.address) as channel,
        ):
            stub = EmbeddingServiceStub(channel)
            await stub.Embed(pb.EmbedRequest(texts=["hello"]))
            plan.gate.clear()
            calls = [stub.Embed(pb.EmbedRequest(texts=["hello"]), timeout=1.0) for _ in range(10)]
            await until(lambda: made.server.guard.in_flight == 10)
            proxy.half_open("client")
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            await until(lambda: made.server.guard.in_flight == 0)
            plan.gate.set()
            await made.settled()

        assert {o.code() for o in outcomes} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}

    async def test_a_client_finds_out_that_a_server_is_gone_by_its_keepalive(self) -> None:
        """The options that OPERATIONS.md advises; without them it would wait for its deadline."""
        options = [
            ("grpc.keepalive_time_ms", 1000),
            ("grpc.keepalive_timeout_ms", 500),
            ("grpc.http2.ping_timeout_ms", 500),
        ]
        plan = FaultPlan()
        async with (
            sound(FaultyBackend(plan), settings={"server.min_ping_interval_ms": "500"}) as made,
            FaultProxy(made.server.address) as proxy,
            grpc.aio.insecure_channel(proxy.address, options=options) as channel,
        ):
            stub = EmbeddingServiceStub(channel)
            await stub.Embed(pb.EmbedRequest(texts=["hello"]))
            plan.gate.clear()
            call = asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=["hello"]), timeout=20))
            await until(lambda: made.server.guard.in_flight == 1)
            proxy.half_open("server")
            ended = (await asyncio.gather(call, return_exceptions=True))[0]
            plan.gate.set()
            await made.settled()

        assert ended.code() is grpc.StatusCode.UNAVAILABLE


class TestBursts:
    """More calls at once than the event loop has taken yet."""

    async def test_each_is_answered_or_refused_by_us_and_none_dropped_by_grpc(self) -> None:
        """gRPC Core by default drops calls at random from 1000 untaken ones on, with CANCELLED and no hint."""
        plan = FaultPlan()
        async with sound(FaultyBackend(plan), settings={"limits.max_requests_in_flight": "2000"}) as made:
            server = made.server
            plan.gate.clear()
            channels = [server.connect() for _ in range(5)]
            stubs = [EmbeddingServiceStub(channel) for channel in channels]
            for stub in stubs:
                await stub.GetLoad(pb.GetLoadRequest())
            calls = [stub.Embed(pb.EmbedRequest(texts=["hello"])) for stub in stubs for _ in range(1000)]
            ending = asyncio.gather(*(_code(call) for call in calls))
            await until(lambda: server.guard.in_flight >= 1000)
            plan.gate.set()
            outcomes = collections.Counter(await ending)
            await made.settled()
            for channel in channels:
                await channel.close()

        assert outcomes.keys() <= {"OK", "RESOURCE_EXHAUSTED"}
        assert outcomes["OK"] >= 1000


async def _code(call: object) -> str:
    try:
        await call  # type: ignore[misc]
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


@pytest.mark.process
class TestCrowds:
    """Connections that do nothing, under a limit of descriptors."""

    def test_those_that_were_there_are_served_and_the_limit_is_survived(self) -> None:
        """256 descriptors and 400 connections: the rest wait or are turned away; who is in is served all along."""
        with running(*QUICK, command=("-c", WITH_FEW_DESCRIPTORS, "256", *SERVER[1:])) as server:
            host, port = server.address.split(":")
            with grpc.insecure_channel(server.address) as channel:
                stub = EmbeddingServiceStub(channel)
                stub.Embed(pb.EmbedRequest(texts=["hello"]), timeout=10)
                crowd = []
                try:
                    for _ in range(400):
                        idle = socket.create_connection((host, int(port)), timeout=5)
                        idle.setblocking(False)
                        crowd.append(idle)
                    for _ in range(50):
                        answer = stub.Embed(pb.EmbedRequest(texts=["hello world"]), timeout=5)
                        assert np.array_equal(values(answer.embeddings[0]), expected("hello world"))
                finally:
                    for idle in crowd:
                        idle.close()
            # Once they have gone, anybody may come again.
            with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                EmbeddingServiceStub(channel).Embed(pb.EmbedRequest(texts=["hello"]), wait_for_ready=True, timeout=10)
            settled(server)
            assert figures(server).total("rpc_server_call_duration_seconds_count", rpc_response_status_code="OK") == 52
            assert server.stop() == 0


WITH_FEW_DESCRIPTORS = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
sys.argv[0] = sys.argv.pop(1)
runpy.run_module("tests.fault.fault_server", run_name="__main__")
"""
