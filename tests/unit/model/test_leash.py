"""Whatever ends the process, the command that it runs ends with it, and all that the command has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embedserve.model.native.compilation import SOURCE
from embedserve.model.native.leash import run_on_leash

ROOT = Path(__file__).parents[3]
LIMIT_S = 20.0
LONG = 'sleep 600 & echo $$ $! > "$0.fresh"; mv "$0.fresh" "$0"; wait'
"""Writes down its own process and one that it has started."""


def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether it runs: one that nobody has asked for its exit code does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Callable[[], list[int]]]:
    """Of the processes that ``LONG`` has written to ``tmp_path / "pids"``, once it has."""
    file = tmp_path / "pids"

    def read() -> list[int]:
        until(file.exists)
        return [int(word) for word in file.read_text().split()]

    yield read
    for pid in read() if file.exists() else []:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def run_python(code: str, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=os.environ | {"PYTHONPATH": str(ROOT / "service")} | env
    )


class TestEnds:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_with_the_process(self, tmp_path: Path, pids: Callable[[], list[int]], number: signal.Signals) -> None:
        code = (
            "import sys; from embedserve.model.native.leash import run_on_leash as run; run(sys.argv[1:], timeout_s=60)"
        )
        with run_python(code, "sh", "-c", LONG, str(tmp_path / "pids")) as process:
            running = pids()
            assert all(map(is_alive, running))
            process.send_signal(number)

        until(lambda: not any(map(is_alive, running)))
        assert [pid for pid in running if is_alive(pid)] == []

    def test_the_compiler_with_a_server_that_is_killed(self, tmp_path: Path, pids: Callable[[], list[int]]) -> None:
        """cc1plus would go on for seconds, and keep a core from whoever starts next."""
        compiler = tmp_path / "cxx"
        compiler.write_text(f"#!/bin/sh\nset -- '{tmp_path}/pids'\n{LONG.replace('$0', '$1')}\n")
        compiler.chmod(0o700)
        code = (
            "import sys; from pathlib import Path; from embedserve.model.native.compiler import compile_library; "
            "compile_library(*map(Path, sys.argv[1:]))"
        )
        with run_python(code, str(SOURCE), str(tmp_path / "kept"), CXX=str(compiler)) as process:
            running = pids()
            assert all(map(is_alive, running))
            process.kill()

        until(lambda: not any(map(is_alive, running)))
        assert [pid for pid in running if is_alive(pid)] == []

    def test_when_its_time_is_over(self, tmp_path: Path, pids: Callable[[], list[int]]) -> None:
        with pytest.raises(subprocess.TimeoutExpired):
            run_on_leash(["sh", "-c", LONG, str(tmp_path / "pids")], timeout_s=1.5)

        until(lambda: not any(map(is_alive, pids())))


class TestResult:
    def test_is_the_commands(self) -> None:
        done = run_on_leash(["sh", "-c", "cat; echo out; echo told >&2; exit 7"], timeout_s=LIMIT_S)

        assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"told\n")

    def test_words_stay_as_they_are(self) -> None:
        done = run_on_leash(["printf", "%s|", "a b", "$HOME", "'", "*"], timeout_s=LIMIT_S)

        assert done.stdout == b"a b|$HOME|'|*|"

    def test_of_a_command_that_a_signal_ends(self) -> None:
        assert run_on_leash(["sh", "-c", "kill -KILL $$"], timeout_s=LIMIT_S).returncode == 128 + signal.SIGKILL

    def test_of_a_command_that_is_not_there(self) -> None:
        done = run_on_leash(["/no/such/command"], timeout_s=LIMIT_S)

        assert done.returncode == 127
        assert b"not found" in done.stderr

    def test_nothing_is_left_of_it(self) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        before, others = set(Path("/proc/self/fd").iterdir()), set(children.read_text().split())
        run_on_leash(["true"], timeout_s=LIMIT_S)

        assert set(Path("/proc/self/fd").iterdir()) == before
        assert set(children.read_text().split()) <= others
