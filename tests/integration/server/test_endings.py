"""How the process begins and ends: exit codes, what it says, and that no call that was taken is lost."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedserve.stop_signal import TOGETHER_S
from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.server.process import FAKE, QUICK, ServerProcess, environment, running, started

pytestmark = pytest.mark.process

SLOW, DIE = "~", "#"


def embed(server: ServerProcess, text: str = "hello", **options: object) -> pb.EmbedResponse:
    with grpc.insecure_channel(server.address) as channel:
        return EmbeddingServiceStub(channel).Embed(pb.EmbedRequest(texts=[text]), **options)


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


HEALTH_CHECKING = json.dumps(
    {
        "healthCheckConfig": {"serviceName": "embedserve.v1.EmbeddingService"},
        "loadBalancingConfig": [{"round_robin": {}}],
    }
)


ALL_IN = ("--admission.policies", "none")
"""Slow passes make admission refuse; here the ends of calls count."""


class TestStopUnderLoad:
    """SIGTERM while an open-loop client sends: what was taken is answered, and the exit is clean."""

    RATE = 150.0

    async def drive(
        self, server: ServerProcess, options: list[tuple[str, object]]
    ) -> tuple[collections.Counter[str], float]:
        """Send at a fixed rate over four channels, stop the server a second in, and count how the calls ended.

        Also the longest round trip of a second on this machine, in seconds, of a call that waits for no device.
        """
        ended: collections.Counter[str] = collections.Counter()
        round_trips_s: list[float] = []
        channels = [
            grpc.aio.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1), *options])
            for _ in range(4)
        ]
        stubs = [EmbeddingServiceStub(channel) for channel in channels]

        async def call(number: int) -> None:
            stub, text = stubs[number % 4], SLOW if number % 20 == 0 else "hello world"
            try:
                if number % 5:
                    await stub.Embed(pb.EmbedRequest(texts=[text] * 3), timeout=20)
                else:
                    summaries = 0
                    async for message in stub.EmbedStream(pb.EmbedStreamRequest(texts=[text] * 3), timeout=20):
                        summaries += message.HasField("summary")
                    assert summaries == 1, "a stream ended with OK and without its summary"
                ended["OK"] += 1
            except grpc.aio.AioRpcError as error:
                ended[error.code().name] += 1

        async def ping() -> None:
            while not told:
                sent = time.monotonic()
                await stubs[0].GetLoad(pb.GetLoadRequest())
                round_trips_s.append(time.monotonic() - sent)
                await asyncio.sleep(0.02)

        calls, begun, told = [], time.monotonic(), False
        pinging = asyncio.ensure_future(ping())
        while (now := time.monotonic() - begun) < 2.0:
            calls.append(asyncio.ensure_future(call(len(calls))))
            if now > 1 and not told:
                told = True
                await pinging
                server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(max(0.0, begun + len(calls) / self.RATE - time.monotonic()))
        await asyncio.gather(*calls)
        await asyncio.gather(*(channel.close() for channel in channels))
        assert told
        assert ended["OK"] >= self.RATE
        return ended, max(round_trips_s[1:])  # the first one connects

    async def test_clients_that_follow_health_lose_nothing(self) -> None:
        """They leave in the settle time; what they had sent is answered, the rest they keep to themselves."""
        with running(*QUICK, *ALL_IN, "--shutdown.settle_ms", "400", command=FAKE) as server:
            ended, _ = await self.drive(server, [("grpc.service_config", HEALTH_CHECKING)])
            code = server.ended()

        assert ended.keys() <= {"OK", "UNAVAILABLE"}
        assert code == 0
        assert server.log[-1]["event"] == "stopped"
        assert server.log[-1]["cut_off"] == 0

    async def test_clients_that_know_nothing_lose_next_to_nothing(self) -> None:
        """gRPC ends what arrives in the round trip in which a client learns of the end with CANCELLED (grpc#41785)."""
        with running(*QUICK, *ALL_IN, command=FAKE) as server:
            ended, round_trip_s = await self.drive(server, [])
            code = server.ended()

        assert ended.keys() <= {"OK", "UNAVAILABLE", "CANCELLED"}
        assert ended["CANCELLED"] <= 3 + self.RATE * round_trip_s
        assert code == 0
        assert server.log[-1]["cut_off"] == 0


class TestSignals:
    """What each signal does, and when."""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_one_ends_cleanly(self, number: signal.Signals) -> None:
        with running(*QUICK, command=FAKE) as server:
            embed(server)
            assert server.stop(number) == 0

        assert [line["event"] for line in server.log][-2:] == ["draining", "stopped"]
        assert len(server.stdout) == 1

    def test_a_second_one_ends_at_once(self) -> None:
        with running("--shutdown.settle_ms", "60000", command=FAKE) as server:
            server.process.send_signal(signal.SIGTERM)
            server.wait_log("draining")
            begun = time.monotonic()
            while server.process.poll() is None and time.monotonic() - begun < 10:
                server.process.send_signal(signal.SIGTERM)  # the first few are the same wish
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.process.wait(0.05)
            code = server.process.returncode

        assert code == 143
        assert TOGETHER_S - 0.2 < time.monotonic() - begun < TOGETHER_S + 1

    def test_one_that_make_passes_on_is_the_same(self) -> None:
        with running("--shutdown.settle_ms", "100", command=FAKE) as server:
            server.process.send_signal(signal.SIGTERM)
            server.wait_log("draining")
            assert server.stop(signal.SIGTERM) == 0

        assert "stopped_at_once" not in [line["event"] for line in server.log]

    def test_one_while_the_model_loads_ends_cleanly_and_soon(self) -> None:
        with started([*FAKE, *QUICK, "--operations.address", "127.0.0.1:0"], WARM_UP="30") as server:
            server.wait(lambda: _listens(server.pid), "a port")
            begun = time.monotonic()
            code = server.stop()

        assert code == 0
        assert time.monotonic() - begun < 3
        assert server.stdout == []

    async def test_a_grace_that_is_too_short_exits_3_and_says_so(self) -> None:
        with running(*QUICK, "--shutdown.grace_ms", "100", command=FAKE) as server:
            async with grpc.aio.insecure_channel(server.address) as channel:
                # 12 batches of 300 ms: far more than the grace.
                stub = EmbeddingServiceStub(channel)
                calls = [asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=[SLOW]))) for _ in range(2)]
                await asyncio.to_thread(
                    server.wait,
                    lambda: _load(server)["running_items"] + _load(server)["queue_depth"],
                    "a running batch",
                )
                code = await asyncio.to_thread(server.stop)
                await asyncio.gather(*calls, return_exceptions=True)

        exceeded = next(line for line in server.log if line["event"] == "grace_exceeded")
        assert code == 3
        assert exceeded["cut_off"] >= 1

    def test_readyz_says_503_while_it_drains_and_livez_200(self) -> None:
        with running("--shutdown.settle_ms", "800", command=FAKE) as server:
            server.process.send_signal(signal.SIGTERM)
            server.wait_log("draining")
            assert status_of(server.operations + "/readyz") == 503
            assert status_of(server.operations + "/livez") == 200
            assert len(embed(server).embeddings) == 1, "the settle time serves on"
            assert server.ended() == 0


def _load(server: ServerProcess) -> dict[str, int]:
    with urllib.request.urlopen(server.operations + "/health", timeout=5) as answer:
        return dict(json.load(answer))


def _listens(pid: int) -> bool:
    """Whether a process listens on TCP: its sockets' inodes are in the kernel's table, in state 0A."""
    try:
        links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return any(row[3] == "0A" and f"socket:[{row[9]}]" in links for row in rows)


class TestStart:
    """What stops a start, in a sentence, before anything is promised."""

    def fails(self, *arguments: str, **env: str) -> tuple[int, str, ServerProcess]:
        with started(arguments, **env) as server:
            code = server.ended()
        assert server.stdout == []
        return code, "\n".join(server.stderr), server

    def test_a_port_that_is_taken_is_named(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            code, said, _ = self.fails(*FAKE, "--server.address", address)

        assert code == 1
        assert address in said
        assert "Traceback" not in said

    def test_an_operations_port_that_is_taken_is_named(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            code, said, _ = self.fails(*FAKE, "--operations.address", address)

        assert code == 1
        assert address in said

    def test_a_batch_that_the_models_longest_text_does_not_fit(self) -> None:
        """Known only once the checkpoint is read, and a wrong setting all the same."""
        code, said, _ = self.fails(*FAKE, "--scheduling.max_batch_tokens", "64")

        assert code == 2
        assert "scheduling.max_batch_tokens = 64" in said
        assert "128 tokens" in said
        assert "Traceback" not in said

    def test_bad_settings_are_all_listed_and_no_port_is_bound(self) -> None:
        """The port is held by somebody: had it been tried, that would be the error."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            code, said, _ = self.fails(
                *FAKE, "--server.address", address, "--limits.max_texts", "0", EMBEDSERVE_MODEL_DTYPE="int3"
            )

        assert code == 2
        for word in ("limits.max_texts", "--limits.max_texts", "model.dtype", "EMBEDSERVE_MODEL_DTYPE"):
            assert word in said
        assert address not in said
        assert "Traceback" not in said

    @pytest.mark.parametrize("source", ["/nonexistent/model", "nobody/has-this-model", "package:no_such_package"])
    def test_a_model_that_is_not_there(self, source: str) -> None:
        code, said, _ = self.fails("-m", "embedserve", "serve", "--model.source", source)

        assert code in (1, 2)
        assert source.removeprefix("package:") in said
        assert "Traceback" not in said

    def test_a_warm_up_that_fails_exits_1_and_never_says_serving(self) -> None:
        code, said, server = self.fails(*FAKE, WARM_UP="fail")

        assert code == 1
        assert "no memory left" in said
        assert not any(line.get("event") == "serving" for line in server.log)

    def test_while_it_loads_probes_meet_a_server_that_is_not_ready(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with started([*FAKE, *QUICK, "--server.address", f"127.0.0.1:{port}"], WARM_UP="1.5") as server:
            server.wait(lambda: _listens(server.pid), "a port")
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                health = health_pb2_grpc.HealthStub(channel)
                request = health_pb2.HealthCheckRequest()
                loading = health.Check(request, timeout=5, wait_for_ready=True).status
                with pytest.raises(grpc.RpcError) as refused:
                    EmbeddingServiceStub(channel).Embed(pb.EmbedRequest(texts=["hello"]), timeout=5)
                server.wait_ready()
                ready = health.Check(request, timeout=5).status

        assert loading == health_pb2.HealthCheckResponse.NOT_SERVING
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert ready == health_pb2.HealthCheckResponse.SERVING


class TestWorkerDeath:
    """The device's thread ends: everybody is told, and the process is gone for its supervisor to start anew."""

    async def test_those_in_flight_are_told_and_the_process_exits_70(self) -> None:
        with running(*QUICK, command=FAKE) as server:
            async with grpc.aio.insecure_channel(server.address) as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                statuses = [(await watch.read()).status]
                stub = EmbeddingServiceStub(channel)
                slow = asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=[SLOW])))
                await asyncio.to_thread(server.wait, lambda: _load(server)["running_items"], "a running batch")
                begun = time.monotonic()
                doomed = [asyncio.ensure_future(stub.Embed(pb.EmbedRequest(texts=[DIE]))) for _ in range(4)]
                statuses.append((await watch.read()).status)
                outcomes = await asyncio.gather(*doomed, return_exceptions=True)
                answered = await slow
                code = await asyncio.to_thread(server.ended)
                took = time.monotonic() - begun

        assert statuses == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
        assert {error.code() for error in outcomes} == {grpc.StatusCode.INTERNAL}
        assert all("told to die" not in str(error.details()) for error in outcomes)
        assert len(answered.embeddings) == 1
        assert code == 70
        assert took < 5
        assert any(line["event"] == "failed" and "told to die" in line["reason"] for line in server.log)


class TestUnixSocket:
    """A socket file serves like a port, and one that a killed server left behind is no obstacle."""

    def healthcheck(self, address: str) -> int:
        return subprocess.run(
            [sys.executable, "-m", "embedserve", "healthcheck", "--server.address", address],
            env=environment(), capture_output=True, timeout=60, check=False,
        ).returncode  # fmt: skip

    def test_it_serves_survives_sigkill_and_starts_again(self, tmp_path: Path) -> None:
        address = f"unix:{tmp_path / 'embedserve.sock'}"
        with running(*QUICK, "--server.address", address, command=FAKE) as server:
            assert server.address == address
            assert len(embed(server).embeddings) == 1
            assert self.healthcheck(address) == 0
            assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        assert self.healthcheck(address) == 1

        with running(*QUICK, "--server.address", address, command=FAKE) as again:
            assert len(embed(again).embeddings) == 1
            with started([*FAKE, "--server.address", address]) as second:
                assert second.ended() == 1, "two servers on one socket"
            assert address in "\n".join(second.stderr)
            assert len(embed(again).embeddings) == 1
            assert again.stop() == 0
