"""A real server process: started, asked, told to stop, and read to its last line."""

from __future__ import annotations

import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.canary import WATCH
from tests.integration.server.fork_server import Fork, ForkServer

ROOT = Path(__file__).parents[3]
START_LIMIT_S = 60.0
"""Torch is imported and a model loaded, on a machine that does other things too."""
END_LIMIT_S = 20.0
LOOPBACK = ("--server.address", "127.0.0.1:0", "--operations.address", "127.0.0.1:0")
QUICK = ("--shutdown.settle_ms", "0", "--shutdown.telemetry_flush_ms", "500")


@dataclass
class ServerProcess:
    """A process, with its output as it comes."""

    process: subprocess.Popen[bytes] | Fork
    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)
    ready: dict[str, Any] = field(default_factory=dict)
    _lines: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)
    _readers: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        def read(stream: Any, lines: list[str], *, tell: bool) -> None:
            for raw in stream:
                line = raw.decode().rstrip("\n")
                WATCH.saw("a server's output", line)
                lines.append(line)
                if tell:
                    self._lines.put(line)
            if tell:
                self._lines.put(None)

        for stream, lines, tell in (
            (self.process.stdout, self.stdout, True),
            (self.process.stderr, self.stderr, False),
        ):
            thread = threading.Thread(target=read, args=(stream, lines), kwargs={"tell": tell}, daemon=True)
            thread.start()
            self._readers.append(thread)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def address(self) -> str:
        return str(self.ready["address"])

    @property
    def operations(self) -> str:
        return f"http://{self.ready['operations']}"

    def wait_ready(self) -> None:
        """Until the ready line; fails when the process ends first."""
        line = self._lines.get(timeout=START_LIMIT_S)
        assert line is not None, f"ended with {self.process.wait()} before it was ready:\n" + "\n".join(self.stderr)
        self.ready = json.loads(line)

    def wait_log(self, event: str) -> dict[str, Any]:
        """The log line of ``event``, once it is there."""
        return self.wait(lambda: next((line for line in self.log if line.get("event") == event), None), event)

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """What ``condition`` gives, once it is something."""
        ends = time.monotonic() + END_LIMIT_S
        while not (found := condition()):
            assert time.monotonic() < ends, f"{what} never came; log:\n" + "\n".join(self.stderr[-20:])
            time.sleep(0.01)
        return found

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """The exit code, with all output read."""
        code = self.process.wait(END_LIMIT_S)
        for reader in self._readers:
            reader.join(END_LIMIT_S)
        return code

    @property
    def log(self) -> list[dict[str, Any]]:
        """The log's lines that are JSON, which all of ours are."""
        return [json.loads(line) for line in self.stderr if line.startswith("{")]

    def stub(self, channel: grpc.Channel) -> EmbeddingServiceStub:
        return EmbeddingServiceStub(channel)

    def cpu_ms(self) -> float:
        """Processor time of all its threads so far, to the nanosecond where /proc/PID/stat counts in ticks of 10 ms."""
        schedstats = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(schedstat.read_text().split()[0]) for schedstat in schedstats) / 1e6


def environment(**more: str) -> dict[str, str]:
    """Of a process: no setting and no OTEL variable of this machine."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("EMBEDSERVE_", "OTEL_"))}
    path = os.pathsep.join([str(ROOT / "service"), str(ROOT)])
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "2", **more}


@functools.cache
def _fork_server() -> ForkServer:
    """The one of this session."""
    return ForkServer(ROOT, environment())


def _process(command: Sequence[str], env: dict[str, str]) -> subprocess.Popen[bytes] | Fork:
    """A fork where the module is one of the tests, with a fake model, and all of the server is one process."""
    if command[0] == "-m" and command[1].startswith("tests.") and "--server.frontends" not in command:
        return _fork_server().start(command[1:], env)
    return subprocess.Popen(
        [sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )


@contextmanager
def started(command: Sequence[str], **env: str) -> Iterator[ServerProcess]:
    """A process that may still be starting; ended at the end of the block, by force if need be."""
    process = _process(command, environment(**env))
    server = ServerProcess(process)
    try:
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        server.ended()


@contextmanager
def running(
    *flags: str, command: Sequence[str] = ("-m", "embedserve", "serve", *LOOPBACK), **env: str
) -> Iterator[ServerProcess]:
    """A server that is ready: the real model unless ``command`` says otherwise."""
    with started([*command, *flags], **env) as server:
        server.wait_ready()
        yield server


FAKE = ("-m", "tests.integration.server.fake_server", *LOOPBACK)
"""The real process around a fake model: starts in a tenth of a second."""
