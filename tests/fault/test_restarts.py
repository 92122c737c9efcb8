"""Rows 23, 26 and 27: processes that are told to stop, are killed, or are stopped and go on. Clients lose nothing."""

from __future__ import annotations

import asyncio
import collections
import json
import random
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.fault.fault_server import SERVER
from tests.fault.figures import figures, get, settled
from tests.fault.words import WORDS
from tests.integration.server.calls import expected, until, values
from tests.integration.server.process import QUICK, ServerProcess, running

pytestmark = pytest.mark.process

SERVICE = "embedserve.v1.EmbeddingService"
FOLLOWS = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": SERVICE},
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
}
"""What OPERATIONS.md tells clients: follow health, and retry what may go well later."""


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class Load:
    """Calls at a fixed rate, whatever becomes of them: each one's end is kept, and each vector checked."""

    def __init__(self, target: str, rate: float, *, seed: int = 3) -> None:
        self.ended: collections.Counter[str] = collections.Counter()
        self._rng = random.Random(seed)
        self._rate = rate
        self._target = target
        self._stop = asyncio.Event()

    async def drive(self) -> None:
        options = [
            ("grpc.service_config", json.dumps(FOLLOWS)),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 300),
        ]
        async with grpc.aio.insecure_channel(self._target, options=options) as channel:
            stub = EmbeddingServiceStub(channel)
            await stub.Embed(pb.EmbedRequest(texts=["first"]), wait_for_ready=True, timeout=20)
            begun, calls = time.monotonic(), []
            while not self._stop.is_set():
                calls.append(asyncio.ensure_future(self._one(stub)))
                await asyncio.sleep(max(0.0, begun + len(calls) / self._rate - time.monotonic()))
            await asyncio.gather(*calls)

    async def _one(self, stub: EmbeddingServiceStub) -> None:
        texts = [" ".join(self._rng.choices(WORDS, k=self._rng.randint(1, 8))) for _ in range(3)]
        try:
            answer = await stub.Embed(pb.EmbedRequest(texts=texts), wait_for_ready=True, timeout=20)
        except grpc.aio.AioRpcError as error:
            self.ended[f"{error.code().name}: {error.details()}"] += 1
        else:
            right = all(np.array_equal(values(e), expected(t)) for t, e in zip(texts, answer.embeddings, strict=True))
            self.ended["OK" if right else "WRONG"] += 1

    @asynccontextmanager
    async def driving(self) -> AsyncIterator[None]:
        driven = asyncio.ensure_future(self.drive())
        try:
            yield
        finally:
            self._stop.set()
            await driven


class TestRollingRestart:
    """Twenty SIGTERMs under load, over servers of which one at least is there: no call fails."""

    RESTARTS = 20

    async def test_no_call_is_lost(self) -> None:
        ports = free_ports(4)  # of one that ends, one that serves and two that start
        load = Load("ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports), rate=100)
        flags = (*QUICK, "--shutdown.settle_ms", "300")
        codes, cut_off = [], []

        def start(stack: ExitStack, number: int) -> ServerProcess:
            address = f"127.0.0.1:{ports[number % 4]}"
            return stack.enter_context(running(*flags, "--server.address", address, command=SERVER, PASS_MS="5"))

        def end(server: ServerProcess) -> None:
            codes.append(server.stop())
            cut_off.extend(line["cut_off"] for line in server.log if line["event"] == "stopped")

        with ExitStack() as stack:
            coming = collections.deque(asyncio.ensure_future(asyncio.to_thread(start, stack, n)) for n in range(3))
            try:
                serving, ending = await coming.popleft(), None
                async with load.driving():
                    for number in range(1, self.RESTARTS + 1):
                        newest = await coming.popleft()
                        if ending is not None:
                            await ending
                        ending = asyncio.ensure_future(asyncio.to_thread(end, serving))
                        serving = newest
                        if number + 2 <= self.RESTARTS:
                            coming.append(asyncio.ensure_future(asyncio.to_thread(start, stack, number + 2)))
                    assert ending is not None
                    await ending
            finally:
                await asyncio.gather(*coming, return_exceptions=True)  # what has started is then ended
            await asyncio.to_thread(end, serving)

        assert load.ended.keys() == {"OK"}, load.ended
        assert load.ended["OK"] > 500
        assert codes == [0] * (self.RESTARTS + 1)
        assert cut_off == [0] * (self.RESTARTS + 1)


class TestKilled:
    """SIGKILL in mid-load, and the same port again: clients that retry see nothing of it."""

    async def test_every_call_succeeds_with_the_same_vectors(self) -> None:
        (port,) = free_ports(1)
        load = Load(f"ipv4:127.0.0.1:{port}", rate=100)
        flags = (*QUICK, "--server.address", f"127.0.0.1:{port}")
        ready_ms = []
        with ExitStack() as stack:
            server = await asyncio.to_thread(stack.enter_context, running(*flags, command=SERVER, PASS_MS="20"))
            async with load.driving():
                for kill in range(1, 4):
                    await until(lambda: load.ended["OK"] > 40 * kill)  # noqa: B023
                    # Not before the server holds calls: the kill must find some in flight.
                    await asyncio.to_thread(server.wait, lambda: _in_flight(server), "calls in flight")  # noqa: B023
                    assert await asyncio.to_thread(server.stop, signal.SIGKILL) == -signal.SIGKILL
                    server = await asyncio.to_thread(stack.enter_context, running(*flags, command=SERVER, PASS_MS="20"))
                    ready_ms.append(server.ready["startup_ms"])
            assert await asyncio.to_thread(server.stop) == 0

        assert load.ended.keys() == {"OK"}, load.ended
        assert max(ready_ms) < 10_000


def _in_flight(server: ServerProcess) -> bool:
    return figures(server).total("embedserve_rpc_active_calls") > 0


class TestStopped:
    """SIGSTOP for longer than every deadline, then SIGCONT: a paused machine, a debugger, a frozen container."""

    STOPPED_S = 1.6

    async def test_expired_work_is_dropped_and_not_run_late(self) -> None:
        with running(*QUICK, command=SERVER, PASS_MS="40") as server:
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub = EmbeddingServiceStub(channel)
                await stub.Embed(pb.EmbedRequest(texts=["warm"]), timeout=5)
                running_ones = [
                    asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=["hello"] * 50), timeout=1))
                    for _ in range(30)
                ]
                await asyncio.to_thread(server.wait, lambda: _in_flight(server), "calls in flight")
                server.process.send_signal(signal.SIGSTOP)
                stopped = time.monotonic()
                try:
                    late = [
                        asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=["world"] * 50), timeout=1))
                        for _ in range(200)
                    ]
                    ended = await asyncio.gather(*late, return_exceptions=True)
                    await asyncio.gather(*running_ones, return_exceptions=True)
                    await asyncio.sleep(max(0.0, self.STOPPED_S - (time.monotonic() - stopped)))  # the fault itself
                finally:
                    server.process.send_signal(signal.SIGCONT)
                went_on = time.monotonic()
                health = health_pb2_grpc.HealthStub(channel)
                status = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
                answer = await stub.Embed(pb.EmbedRequest(texts=["hello world"]), timeout=5)
                took = time.monotonic() - went_on
            found = await asyncio.to_thread(settled, server)
            assert get(server.operations + "/livez")[0] == 200
            assert server.process.poll() is None
            assert server.stop() == 0

        assert {error.code() for error in ended} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert status.status == health_pb2.HealthCheckResponse.SERVING
        assert np.array_equal(values(answer.embeddings[0]), expected("hello world"))
        assert took < 1.5
        # 30 x 50 texts had come before the stop, 200 x 50 after it. Of the latter none may reach the device.
        assert found.total("embedserve_items_settled_total", verdict="done") <= 30 * 50 + 2
