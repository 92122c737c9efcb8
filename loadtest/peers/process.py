"""A peer's server process: started, waited for, frozen while others are measured, weighed, ended.

Decides when a server is ready (it has given a vector), and that it costs nothing while another is measured: coral polls
every millisecond and infinity's threads wake all the time, so each but the measured one is stopped by SIGSTOP. Must
never know what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from loadtest.environment import without_foreign
from loadtest.peers.peer import HOST, Launch, Peer, VectorTarget
from loadtest.tether import tethered

__all__ = ["PeerProcess", "running"]

ROOT = Path(__file__).resolve().parents[2]
START_S_MAX = 120.0
"""Importing torch and loading a small model takes 5 to 20 s on two busy cores."""
END_S_MAX = 15.0
POLL_S = 0.2
SETTLE_S_MAX = 90.0
SETTLE_WINDOW_S = 1.0
SETTLED_CORES = 0.15
"""What an idle server may use: coral's polling takes 0.04 of a core."""
PEERS = ("INFINITY_", "METRICS_", "BACKPRESSURE_", "MODEL_", "PYTHONPATH")
"""How more variables of the caller's begin that would change one of these servers."""
LOG_LINES_TOLD = 15


class PeerProcess:
    """A running peer."""

    def __init__(self, peer: Peer, process: subprocess.Popen[bytes], address: str, model: Path) -> None:
        """Made by ``running``."""
        self.peer = peer
        self.address = address
        self.model = model
        self.pid = process.pid
        self._process = process

    def target(self) -> VectorTarget:
        """A new client for it."""
        return self.peer.target(self.address, self.model)

    def freeze(self) -> None:
        """Stop every process of it where it is."""
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.killpg(self.pid, signal.SIGCONT)

    def cpu_s(self) -> float:
        """CPU seconds, user and system, of all its processes so far, in ticks of 10 ms."""
        return sum(sum(stat.ticks) for stat in _group(self.pid)) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self) -> float:
        """Resident memory of all its processes now."""
        return sum(stat.pages for stat in _group(self.pid)) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def settle(self, window_s: float | None = None) -> bool:
        """Wait until it has nothing to do, at most ``SETTLE_S_MAX``; whether it came to that.

        A model may still be compiled after the start, and calls that nobody waits for any more are still computed by
        servers that do not notice: neither may fall into a turn. Idle is one ``window_s`` of under ``SETTLED_CORES``.
        """
        window_s = window_s or SETTLE_WINDOW_S
        ends = time.monotonic() + SETTLE_S_MAX
        while time.monotonic() < ends:
            before = self.cpu_s()
            time.sleep(window_s)
            if self.cpu_s() - before < SETTLED_CORES * window_s:
                return True
        return False

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None


class _Stat(NamedTuple):
    ticks: tuple[int, ...]
    """User and system time, its own and that of children that have ended."""
    pages: int


def _group(leader: int) -> list[_Stat]:
    """Every process of the group that ``leader`` leads."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name is in parentheses and may hold spaces; what follows begins with field 3 of proc(5).
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == leader:
            found.append(_Stat(tuple(int(ticks) for ticks in fields[11:15]), int(fields[21])))
    return found


@contextlib.contextmanager
def running(peer: Peer, python: Path, model: Path, folder: Path) -> Iterator[PeerProcess]:
    """Start ``peer``, wait until it gives a vector, end it afterwards.

    What it prints goes to ``folder/server-VARIANT.log``.
    Raises ``RuntimeError`` with the log's last lines where it ends or is not ready after ``START_S_MAX``.
    """
    port = _free_port()
    launch = peer.launch(python, model, port)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"server-{peer.variant}.log"
    with log.open("wb") as out:
        # Tethered: a frozen server whose starter was killed would stay for ever.
        process = subprocess.Popen(
            tethered(launch.command), cwd=ROOT, env=_environment(launch), stdin=subprocess.DEVNULL, stdout=out,
            stderr=out, start_new_session=True,
        )  # fmt: skip
    server = PeerProcess(peer, process, f"{HOST}:{port}", model)
    try:
        _wait_until_ready(server, log)
        yield server
    finally:
        _end(server, process)


def _environment(launch: Launch) -> dict[str, str]:
    return {**without_foreign(*PEERS), **launch.env}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(server: PeerProcess, log: Path) -> None:
    ends = time.monotonic() + START_S_MAX
    host, _, port = server.address.rpartition(":")
    while True:
        if not server.alive():
            raise RuntimeError(f"{server.peer.label} ended while it started; {log} ends with:\n{_tail(log)}")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            break
        if time.monotonic() > ends:
            raise RuntimeError(f"{server.peer.label} did not listen after {START_S_MAX:.0f} s; {log}:\n{_tail(log)}")
        time.sleep(POLL_S)
    try:
        asyncio.run(asyncio.wait_for(_first_vector(server), max(1.0, ends - time.monotonic())))
    except (TimeoutError, ConnectionError) as error:
        raise RuntimeError(f"{server.peer.label} listens and gives no vector: {error}; {log}:\n{_tail(log)}") from error


async def _first_vector(server: PeerProcess) -> None:
    while True:
        target = server.target()
        try:
            await target.open()
            await target.vectors(["ready?"])
            return
        except ConnectionError:
            # embedserve's port is open before its model is loaded.
            if not server.alive():
                raise
            await asyncio.sleep(POLL_S)
        finally:
            await target.close()


def _end(server: PeerProcess, process: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, END_S_MAX), (signal.SIGKILL, END_S_MAX)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
            os.killpg(server.pid, signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_TOLD:])
