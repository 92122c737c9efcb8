"""The plugin that looks for texts in all output finds one that comes out, and says nothing where none does."""

from __future__ import annotations

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

async def test_leak():
    async with serving() as server:
        await server.stub.Embed(EmbedRequest(texts=[TEXT]))
    LEAK
"""

WAYS = {
    "standard output": "print('given', TEXT[4:])",
    "standard error": "print(TEXT[:40], file=sys.stderr)",
    "a log record": "logging.getLogger('grpc').warning('cannot embed %s', TEXT)",
    "a traceback": "logging.getLogger('grpc').error('oh', exc_info=ValueError(TEXT))",
    "a structured line at debug level": "structlog.get_logger().debug('batch', first=TEXT)",
}


def session(tmp_path: Path, leak: str) -> subprocess.CompletedProcess[str]:
    """A pytest run of its own, over one test that ends with ``leak``."""
    (tmp_path / "test_planted.py").write_text(PLANTED.replace("LEAK", leak))
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
    @pytest.mark.parametrize("way", WAYS)
    def test_a_planted_leak_fails_a_session_whose_tests_pass(self, way: str, tmp_path: Path) -> None:
        """The exit code says so, and the summary names the test."""
        done = session(tmp_path, WAYS[way])

        assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
        assert "1 passed" in done.stdout
        assert "texts of callers came out" in done.stdout
        assert "test_planted.py::test_leak" in done.stdout

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
