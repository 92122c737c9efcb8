"""Rows 29 to 32: a machine that gives little. The server starts and serves within it, or says what is missing."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.fault.fault_server import SERVER
from tests.fault.figures import get, rss_bytes, settled
from tests.integration.server.calls import expected, values
from tests.integration.server.process import QUICK, ROOT, ServerProcess, environment, running, started

pytestmark = pytest.mark.process

MIB = 1 << 20


class TestWrongStarts:
    """Exit 2 before a port is bound, every error in one message, no traceback."""

    @pytest.mark.parametrize(
        ("flags", "env", "said"),
        [
            (["--server.address", "nowhere"], {}, ["server.address"]),
            (["--server.address", "127.0.0.1:99999"], {}, ["server.address"]),
            (["--limits.max_texts", "many"], {}, ["limits.max_texts", "many"]),
            (["--limits.max_texts", "-1"], {}, ["limits.max_texts"]),
            ([], {"EMBEDSERVE_LIMITS_MAX_TEXT": "8"}, ["EMBEDSERVE_LIMITS_MAX_TEXT", "EMBEDSERVE_LIMITS_MAX_TEXTS"]),
            ([], {"EMBEDSERVE_SERVER_REFLECTION": "perhaps"}, ["server.reflection", "perhaps"]),
            (
                ["--server.stream_message_bytes", "500000", "--server.max_send_message_bytes", "100000"],
                {"EMBEDSERVE_MODEL_DTYPE": "int3"},
                ["server.stream_message_bytes", "model.dtype", "int3"],
            ),
            (["--config", "/nonexistent.toml"], {}, ["/nonexistent.toml"]),
            (["--model.source", "/nonexistent/model"], {}, ["/nonexistent/model"]),
            ([], {"OTEL_EXPORTER_OTLP_PROTOCOL": "carrier-pigeon", "OTEL_TRACES_EXPORTER": "otlp"}, ["carrier-pigeon"]),
        ],
    )
    def test_it_ends_with_2_and_names_each(self, flags: list[str], env: dict[str, str], said: list[str]) -> None:
        with socket.socket() as taken:
            # Had the port been tried, that would be the error.
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = f"127.0.0.1:{taken.getsockname()[1]}"
            asked = flags if "--server.address" in flags else ["--server.address", port, *flags]
            with started([*SERVER[:2], "--operations.address", "127.0.0.1:0", *asked], **env) as server:
                code = server.ended()

        told = "\n".join(server.stderr)
        assert code == 2, told
        assert server.stdout == []
        for word in said:
            assert word in told
        assert "Traceback" not in told
        assert port not in told


def root_only() -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("setpriv") is None:
        pytest.skip("needs root, unshare and setpriv")
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")


def serves(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        answer = EmbeddingServiceStub(channel).Embed(pb.EmbedRequest(texts=["hello world"] * 20), timeout=10)
    assert np.array_equal(values(answer.embeddings[19]), expected("hello world"))
    assert get(server.operations + "/readyz")[0] == 200
    assert server.stop() == 0


RUN = """
import os, runpy, sys
{before}
sys.argv[:] = ["fault_server", *sys.argv[1:]]
runpy.run_module("tests.fault.fault_server", run_name="__main__")
"""


def command(before: str) -> tuple[str, ...]:
    """The server, in a process that runs ``before`` first."""
    return ("-c", RUN.format(before=before), *SERVER[2:])


def unshared(mounts: str) -> str:
    """Python that enters a mount namespace of its own, runs ``mounts`` in a shell and goes on as it was."""
    script = mounts + ' && exec "$0" "$@"'
    return (
        "if 'INSIDE' not in os.environ:\n"
        "    os.environ['INSIDE'] = '1'\n"
        f"    os.execvp('unshare', ['unshare', '-m', 'sh', '-c', {script!r}, sys.executable,\n"
        "        '-c', sys.orig_argv[2], *sys.argv[1:]])"
    )


def as_user(uid: int) -> str:
    """Python that goes on as a user whom the system does not know, who may read what root may: the interpreter."""
    return (
        "os.environ.pop('HOME', None), os.environ.pop('USER', None)\n"
        "if 'INSIDE' not in os.environ:\n"
        "    os.environ['INSIDE'] = '1'\n"
        f"    os.execvp('setpriv', ['setpriv', '--reuid={uid}', '--regid={uid}', '--clear-groups',\n"
        "        '--inh-caps=+dac_read_search', '--ambient-caps=+dac_read_search', sys.executable,\n"
        "        '-c', sys.orig_argv[2], *sys.argv[1:]])"
    )


class TestPoorMachines:
    """What containers take away."""

    def test_a_file_system_that_is_read_only(self) -> None:
        root_only()
        mounts = "mount --make-rprivate / && mount -o remount,bind,ro / && ! touch /written 2>/dev/null"
        with running(*QUICK, command=command(unshared(mounts))) as server:
            serves(server)

    def test_a_full_temporary_directory(self, tmp_path: Path) -> None:
        root_only()
        mounts = f"mount -t tmpfs -o size=4k none {tmp_path} && ! cat /dev/zero > {tmp_path}/full"
        with running(*QUICK, command=command(unshared(mounts)), TMPDIR=str(tmp_path)) as server:
            serves(server)

    def test_no_home_and_a_user_that_nobody_knows(self) -> None:
        root_only()
        with running(*QUICK, command=command(as_user(54321))) as server:
            assert f"\nUid:\t{54321}" in Path(f"/proc/{server.pid}/status").read_text()
            serves(server)

    def test_64_descriptors(self) -> None:
        before = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
        with running(*QUICK, command=command(before)) as server:
            serves(server)

    def test_too_few_threads_ends_the_start_with_a_reason(self) -> None:
        """RLIMIT_NPROC counts the user's threads, and root's are not counted: it needs a user of its own."""
        root_only()
        before = "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (2, 2))\n" + as_user(54322)
        done = subprocess.run(
            [sys.executable, *command(before)], env=environment(), capture_output=True, text=True, cwd=ROOT,
            timeout=60, check=False,
        )  # fmt: skip

        assert done.returncode not in (0, 2)
        assert done.stdout == "", "never ready"
        assert "thread" in done.stderr.lower() or "Resource temporarily unavailable" in done.stderr


@contextmanager
def cgroup(kind: str) -> Iterator[Path]:
    """A control group of version 1, made for the test and removed with it."""
    group = Path(f"/sys/fs/cgroup/{kind}/embedserve-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group of {kind} here: {error}")
    try:
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (group.parent / "cgroup.procs").write_text(pid)
        group.rmdir()


async def hammer(server: ServerProcess, texts: list[str], calls: int, timeout_s: float) -> list[object]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = EmbeddingServiceStub(channel)
        pending = [stub.Embed(pb.EmbedRequest(texts=texts), timeout=timeout_s) for _ in range(calls)]
        return list(await asyncio.gather(*pending, return_exceptions=True))


def address_space_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * 4096


class TestMemory:
    """A limit on memory: the queue's own limit comes first, and a death is a clean one."""

    async def test_the_queues_limit_refuses_before_memory_ends(self) -> None:
        """40 MB of texts are sent to a device that takes half a second a pass, into 120 MiB of room."""
        with cgroup("memory") as group, running(*QUICK, command=SERVER, PASS_MS="500") as server:
            limit = rss_bytes(server.pid) + 120 * MIB
            (group / "memory.limit_in_bytes").write_text(str(limit))
            (group / "cgroup.procs").write_text(str(server.pid))
            outcomes = await hammer(server, ["hello world " * 40] * 400, 200, 3.0)
            found = await asyncio.to_thread(settled, server)
            assert server.process.poll() is None
            assert server.stop() == 0

        codes = {o.code().name for o in outcomes if isinstance(o, grpc.aio.AioRpcError)}
        assert codes <= {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
        assert "RESOURCE_EXHAUSTED" in codes
        assert found.total("embedserve_admission_decisions_total", decision="rejected") > 0

    async def test_a_process_that_gets_no_memory_dies_cleanly_for_its_clients_and_starts_again(self) -> None:
        with running(*QUICK, command=SERVER, PASS_MS="50") as server:
            used = address_space_bytes(server.pid)
            resource.prlimit(server.pid, resource.RLIMIT_AS, (used + 8 * MIB, used + 8 * MIB))
            outcomes = await hammer(server, ["hello world " * 40] * 4000, 40, 5.0)
            alive = server.process.poll() is None
            code = server.stop()

        ends = {o.code().name if isinstance(o, grpc.aio.AioRpcError) else "OK" for o in outcomes}
        # UNKNOWN is gRPC's own, where it has no memory for the message itself: no handler of ours has begun then.
        assert ends <= {"OK", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "INTERNAL", "UNKNOWN"}
        assert ends != {"OK"}, "the limit was not felt"
        assert alive or code != 0, "a process that ended by itself did not end well"
        with running(*QUICK, command=SERVER) as again:
            await asyncio.to_thread(serves, again)


class TestProcessor:
    """A tenth of one processor."""

    async def test_no_wrong_answers_deadlines_hold_and_liveness_lives(self) -> None:
        with cgroup("cpu") as group, running(*QUICK, command=SERVER, PASS_MS="5") as server:
            (group / "cpu.cfs_period_us").write_text("100000")
            (group / "cpu.cfs_quota_us").write_text("10000")
            (group / "cgroup.procs").write_text(str(server.pid))
            begun = time.monotonic()
            calls = asyncio.ensure_future(hammer(server, ["hello world"] * 5, 150, 3.0))
            probes = []
            while not calls.done():
                asked = time.monotonic()
                status, _ = await asyncio.to_thread(get, server.operations + "/livez", 10)
                probes.append((status, time.monotonic() - asked))
                await asyncio.sleep(0.2)  # probes are sent at a pace
            outcomes = await calls
            took = time.monotonic() - begun
            (group / "cpu.cfs_quota_us").write_text("-1")
            assert server.stop() == 0

        for outcome in outcomes:
            if isinstance(outcome, pb.EmbedResponse):
                assert np.array_equal(values(outcome.embeddings[4]), expected("hello world"))
            else:
                assert isinstance(outcome, grpc.aio.AioRpcError)
                assert outcome.code().name in {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
        assert any(isinstance(outcome, pb.EmbedResponse) for outcome in outcomes)
        assert took < 6, "3 s and what the client's own event loop needs"
        assert {status for status, _ in probes} == {200}
        assert max(s for _, s in probes) < 5
