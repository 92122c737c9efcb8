"""The plugin that looks for texts in all output finds one that comes out, and says nothing where none does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.canary import WINDOW_BYTES, Watch
from tests.integration.server.process import ROOT, environment

TEXT = "the quick brown fox jumps over the lazy dog of number 17"

PLANTED = f"""
import logging, sys, pytest, structlog
from embedserve.testing import FaultPlan, FaultyBackend
from embedserve.testing.server import serving
from embedserve.v1.embedding_pb2 import EmbedRequest

TEXT = {TEXT!r}

async def embed():
    async with serving() as server:
        await server.stub.Embed(EmbedRequest(texts=[TEXT]))
"""

WAYS = {
    "captured stdout": "print('given', TEXT[4:])",
    "captured stderr": "print(TEXT[:40], file=sys.stderr)",
    "a log record": "logging.getLogger('grpc').warning('cannot embed %s', TEXT)",
    "a log record's traceback": "logging.getLogger('grpc').error('oh', exc_info=ValueError(TEXT))",
    "a structured log line": "structlog.get_logger().debug('batch', first=TEXT)",
}


def session(tmp_path: Path, *leaks: str) -> subprocess.CompletedProcess[str]:
    """A pytest run of its own, over tests ``test_leak_0`` and so on, each of which ends with one of ``leaks``."""
    tests = [f"async def test_leak_{n}():\n    await embed()\n    {leak}\n" for n, leak in enumerate(leaks)]
    (tmp_path / "test_planted.py").write_text("\n\n".join([PLANTED, *tests]))
    command = [sys.executable, "-m", "pytest", "-p", "tests.canary", "-c", str(ROOT / "pyproject.toml")]
    command += [
        "--rootdir",
        str(tmp_path),
        "-o",
        f"pythonpath={ROOT}/service {ROOT}",
        str(tmp_path / "test_planted.py"),
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=60, check=False)


@pytest.mark.process
class TestSession:
    def test_planted_leaks_fail_a_session_whose_tests_pass(self, tmp_path: Path) -> None:
        """The exit code says so, and the summary names the way and the test of each."""
        done = session(tmp_path, *WAYS.values())

        assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
        assert f"{len(WAYS)} passed" in done.stdout
        assert "texts of callers came out" in done.stdout
        for number, way in enumerate(WAYS):
            assert re.search(rf"through {way}( call)? in \S*test_planted.py::test_leak_{number}\b", done.stdout), way

    def test_without_a_leak_the_session_passes(self, tmp_path: Path) -> None:
        done = session(tmp_path, "print('17 tokens')")

        assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
        assert "no text came out: 1 sent" in done.stdout


class TestWatch:
    @pytest.mark.parametrize("start", range(10))
    def test_any_stretch_of_two_windows_is_found(self, start: int) -> None:
        watch = Watch()
        watch.send([TEXT])
        stretch = TEXT[start : start + 2 * WINDOW_BYTES - 1]

        watch.saw("the log", f'{{"event": "x", "value": "{stretch}"}}')

        assert len(watch.finish()) == 1

    @pytest.mark.parametrize("output", [TEXT[: WINDOW_BYTES - 1], "the fox and the dog", "", "a" * 100])
    def test_less_is_not(self, output: str) -> None:
        watch = Watch()
        watch.send([TEXT, "a" * 100])

        watch.saw("the log", output)

        assert watch.finish() == []

    def test_the_last_of_many_large_outputs_is_read_too(self) -> None:
        watch = Watch()
        watch.send([TEXT])
        for _ in range(5):
            watch.saw("the log", bytes(1_000_000))

        watch.saw("the log", b"\xff" + TEXT.encode() + b"\xff")

        (leak,) = watch.finish()
        assert "the log" in leak
