"""Where a process writes to is full, gone or read by nobody: serving goes on, and a command says what failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.fault.fault_server import SERVER
from tests.fault.figures import get, wait_for
from tests.integration.server.process import END_LIMIT_S, QUICK, ROOT, environment, running

pytestmark = pytest.mark.process


@contextmanager
def spawned(command: list[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process with standard streams of its own making."""
    with subprocess.Popen(command, env=environment(), cwd=ROOT, **options) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def call_often(address: str, times: int) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = EmbeddingServiceStub(channel)
        for _ in range(times):
            assert len(stub.Embed(pb.EmbedRequest(texts=["hello"]), timeout=5).embeddings) == 1


class TestStandardError:
    """The log."""

    def test_a_pipe_that_nobody_reads_holds_up_no_call(self) -> None:
        reading, writing = os.pipe()
        command = [sys.executable, *SERVER, *QUICK, "--telemetry.log_requests", "all"]
        try:
            with spawned(command, stdout=subprocess.PIPE, stderr=writing) as server:
                assert server.stdout is not None
                ready = json.loads(server.stdout.readline())
                call_often(ready["address"], 1000)  # some 250 lines fill the pipe
                held = os.read(reading, 1 << 20)
                call_often(ready["address"], 1)
                server.terminate()
                assert server.wait(END_LIMIT_S) == 0
            held += os.read(reading, 1 << 20)
        finally:
            os.close(reading)
            os.close(writing)

        events = [json.loads(line) for line in held.splitlines()]
        (lost,) = [line for line in events if line["event"] == "log_lines_dropped"]
        assert sum(line["event"] == "rpc" for line in events) + lost["lines"] == 1001
        assert events[-1]["event"] == "stopped"

    def test_a_full_disk_stops_neither_the_start_nor_a_call_nor_the_end(self) -> None:
        command = [sys.executable, *SERVER, *QUICK, "--telemetry.log_requests", "all"]
        with Path("/dev/full").open("wb") as full, spawned(command, stdout=subprocess.PIPE, stderr=full) as server:
            assert server.stdout is not None
            call_often(json.loads(server.stdout.readline())["address"], 20)
            server.terminate()
            assert server.wait(END_LIMIT_S) == 0

    def test_closed_standard_streams(self, tmp_path: Path) -> None:
        """Descriptors 1 and 2 become sockets then: a line to them would go to a client."""
        command = ["sh", "-c", 'exec "$0" "$@" >&- 2>&-', sys.executable, *SERVER, *QUICK]
        address = f"unix:{tmp_path / 'socket'}"
        with spawned([*command, "--server.address", address]) as server:
            with grpc.insecure_channel(address) as channel:
                stub = EmbeddingServiceStub(channel)
                answer = stub.Embed(pb.EmbedRequest(texts=["hello"]), wait_for_ready=True, timeout=20)
            server.terminate()
            assert server.wait(END_LIMIT_S) == 0
        assert len(answer.embeddings) == 1


class TestStandardOutput:
    """The ready line."""

    def test_a_full_disk_costs_the_ready_line_only(self) -> None:
        command = [sys.executable, *SERVER, *QUICK]
        with Path("/dev/full").open("wb") as full, spawned(command, stdout=full, stderr=subprocess.PIPE) as server:
            assert server.stderr is not None
            serving, lost = json.loads(server.stderr.readline()), json.loads(server.stderr.readline())
            call_often(serving["address"], 5)
            server.terminate()
            assert server.wait(END_LIMIT_S) == 0

        assert (serving["event"], lost["event"]) == ("serving", "ready_line_lost")
        assert "No space left" in lost["reason"]


class TestEmbedCommand:
    """``embedserve embed`` onto a disk that is full."""

    @pytest.mark.parametrize("into", ["--output", "standard output"])
    def test_it_says_so_and_fails(self, into: str, tmp_path: Path) -> None:
        texts = tmp_path / "texts.txt"
        texts.write_text("hello world\n" * 2000)
        with running(*QUICK, command=SERVER) as server, Path("/dev/full").open("wb") as full:
            told = ["--output", "/dev/full"] if into == "--output" else []
            done = subprocess.run(
                [sys.executable, "-m", "embedserve", "embed", str(texts), "--server", server.address, *told],
                env=environment(), stdout=full, stderr=subprocess.PIPE, cwd=ROOT, timeout=60, check=False,
            )  # fmt: skip
            wait_for(lambda: b'"running_items":0' in get(server.operations + "/health")[1], "an idle server")

        said = done.stderr.decode()
        assert done.returncode == 1, said
        assert "No space left on device" in said
        assert "Traceback" not in said
