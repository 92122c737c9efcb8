"""A server in a process of its own: started, waited for, weighed, ended.

Decides how CPU time is read: ``schedstat`` of each thread, in nanoseconds, exact for a thread that sleeps. Must never
know what is measured.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loadtest.environment import without_foreign
from loadtest.scrape import samples
from loadtest.tether import tethered

__all__ = ["Server", "Thread", "echo_server", "null_server", "product", "soak_server"]

ROOT = Path(__file__).resolve().parent.parent
START_S = 120
"""A model on a busy machine is warm after 20 s."""
SCRAPE_S = 5.0
LOG_LINES_TOLD = 10
"""Of a server that did not start."""
PORTS = ("--server.address", "127.0.0.1:0", "--operations.address", "127.0.0.1:0", "--shutdown.settle_ms", "0")


class Thread(NamedTuple):
    """One thread's use of the machine so far."""

    name: str
    cpu_ns: int
    switches: int
    """Times that it was taken off a CPU, or gave it up: a thread that never wakes has none."""


class Server:
    """A running server process."""

    def __init__(self, process: subprocess.Popen[str], ready: Mapping[str, Any]) -> None:
        """Made by ``null_server`` or ``product``."""
        self._process = process
        self.ready = ready
        self.target = str(ready["address"])
        self.pid = process.pid

    def line(self) -> str:
        """The next line of its standard output."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return self._process.wait(60)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels, those of one name added up under the bare name too.

        A scrape waits for the event loop, which may be behind: it is tried again for some seconds.
        """
        ends = time.monotonic() + SCRAPE_S
        while True:
            try:
                return samples(f"http://{self.ready['operations']}/metrics", SCRAPE_S)
            except OSError:
                if time.monotonic() > ends:
                    raise

    def threads(self) -> dict[int, Thread]:
        """Every thread of the process, by its id. The first one, whose id is the process's, runs the event loop."""
        found = {}
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            cpu_ns = int((task / "schedstat").read_text().split()[0])
            status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines() if ":" in line)
            switches = int(status["voluntary_ctxt_switches"]) + int(status["nonvoluntary_ctxt_switches"])
            found[int(task.name)] = Thread(status["Name"].strip(), cpu_ns, switches)
        return found

    def loop_cpu_ns(self) -> int:
        """CPU time of the event loop's thread so far."""
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text().split()[0])

    def cpu_ns(self) -> int:
        """CPU time of all threads that live now."""
        return sum(thread.cpu_ns for thread in self.threads().values())


def null_server(
    checkpoint: Path,
    *settings: str,
    slices: bool = False,
    device: str | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> contextlib.AbstractContextManager[Server]:
    """The product on the null model, as a context manager; ``device`` is ``US:NS``, as ``null_server.py`` says."""
    command = [sys.executable, "-m", "loadtest.null_server", str(checkpoint), *(["--slices"] if slices else [])]
    command += ["--device", device] if device else []
    return _started([*command, *PORTS, *settings], env or {}, log)


def product(
    *settings: str, env: Mapping[str, str] | None = None, log: Path | None = None
) -> contextlib.AbstractContextManager[Server]:
    """``embedserve serve`` as it is, as a context manager."""
    return _started([sys.executable, "-m", "embedserve", "serve", *PORTS, *settings], env or {}, log)


def soak_server(*settings: str) -> contextlib.AbstractContextManager[Server]:
    """``soak_server.py``: the product that answers SIGUSR1, as a context manager."""
    return _started([sys.executable, "-m", "loadtest.soak_server", *PORTS, *settings], {})


def echo_server(texts: int, dimension: int) -> contextlib.AbstractContextManager[Server]:
    """``echo_server.py``: gRPC alone, as a context manager."""
    return _started([sys.executable, "-m", "loadtest.echo_server", str(texts), str(dimension)], {})


@contextlib.contextmanager
def _started(command: Sequence[str], env: Mapping[str, str], log: Path | None = None) -> Iterator[Server]:
    with contextlib.ExitStack() as opened:
        errors = opened.enter_context(log.open("wb")) if log is not None else None
        # A group of its own: Ctrl-C is for us, who end the server once its clients are gone. Not a session: Linux may
        # share processors out by sessions (sched_autogroup), and the figures would be others.
        process = subprocess.Popen(
            tethered(command), cwd=ROOT, env={**without_foreign(), **env}, stdout=subprocess.PIPE, stderr=errors,
            text=True, process_group=0,
        )  # fmt: skip
    watchdog = threading.Timer(START_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        watchdog.cancel()
        if not line:
            told = (
                "" if log is None else "".join(f"\n{line}" for line in log.read_text().splitlines()[-LOG_LINES_TOLD:])
            )
            raise SystemExit(f"the server did not start: {' '.join(command)} ended with {process.wait()}{told}")
        yield Server(process, json.loads(line))
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
