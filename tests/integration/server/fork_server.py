"""Servers around a fake model as forks of one process that has imported everything.

The import is nine tenths of such a start (0.75 of 0.83 s of a core), and the same each time. What follows it is the
whole command, from its arguments to the interpreter's own end: a fork has its own environment, standard streams and
exit code. Whoever needs a process from its very beginning, as for the real model and for front ends, starts one.

Run as a module it is that process: it takes orders over the socket whose descriptor is its argument, and tells ends.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import queue
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

__all__ = ["LOST", "Fork", "ForkServer"]

START_LIMIT_S: Final = 60.0
"""Of the first fork, before which everything is imported."""
LOST: Final = -1000
"""Exit code of those whose fork server has gone: nobody can know it."""
ORDER_BYTES: Final = 1 << 17
"""Of one order: a command line and an environment."""
IMPORTED: Final = (
    "embedserve.app", "embedserve.cli", "embedserve.frontends.supervisor", "embedserve.probe", "embedserve.testing",
    "grpc.aio", "grpc_health.v1.health_pb2_grpc", "grpc_reflection.v1alpha.reflection", "uvloop",
)  # fmt: skip


class Fork:
    """A process of the fork server, as ``subprocess.Popen`` would show it."""

    stdout: IO[bytes]
    stderr: IO[bytes]

    def __init__(self, pid: int) -> None:
        """Of a process that runs already."""
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def end(self, code: int) -> None:
        """The server says how it ended."""
        self.returncode = code
        self._ended.set()

    def poll(self) -> int | None:
        """The exit code, minus the signal's number where one ended it; ``None`` while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing, where it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The tests' side: one process, which ends when this one does."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """``environment`` is that of the imports; each fork gets its own, and ``folder`` as its working directory."""
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                env=environment, cwd=folder, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
        self._one_at_a_time = threading.Lock()
        self._started: queue.SimpleQueue[Fork | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True, name="fork-server").start()
        atexit.register(self.end)

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Fork:
        """``python -m`` with ``arguments``, its standard output and error as pipes."""
        order = json.dumps({"arguments": list(arguments), "environment": dict(environment)}).encode()
        (stdout, their_stdout), (stderr, their_stderr) = os.pipe(), os.pipe()
        with self._one_at_a_time:
            socket.send_fds(self._orders, [order], [their_stdout, their_stderr])
            os.close(their_stdout)
            os.close(their_stderr)
            fork = self._started.get(timeout=START_LIMIT_S)
        assert fork is not None, "the fork server has ended"
        fork.stdout, fork.stderr = os.fdopen(stdout, "rb"), os.fdopen(stderr, "rb")
        return fork

    def end(self) -> None:
        """Its forks go on, as processes do whose parent has gone."""
        self._orders.shutdown(socket.SHUT_RDWR)
        self._process.wait()

    def _listen(self) -> None:
        """In a thread: hand out forks as they start, and tell each how it ended."""
        forks: dict[int, Fork] = {}
        while message := self._orders.recv(ORDER_BYTES):
            said = json.loads(message)
            if "started" in said:
                forks[said["started"]] = fork = Fork(said["started"])
                self._started.put(fork)
            else:
                forks.pop(said["ended"]).end(said["code"])
        self._started.put(None)
        for fork in forks.values():
            fork.end(LOST)


# ------------------------------------------------------------------------------------------------------ the other side


def serve(orders: socket.socket) -> list[str] | None:
    """Start forks and tell their ends, until nobody can order any more. In a fork: returns what it is to run."""
    with selectors.DefaultSelector() as ready:
        ready.register(orders, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.data is not None:
                    _tell_end(orders, key.data)
                    ready.unregister(key.fd)
                    os.close(key.fd)
                    continue
                order, streams, *_ = socket.recv_fds(orders, ORDER_BYTES, 2)
                if not order:
                    return None
                if not (pid := os.fork()):
                    return _become(json.loads(order), streams, [orders.fileno(), *ready.get_map()])
                orders.send(json.dumps({"started": pid}).encode())
                ready.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                for stream in streams:
                    os.close(stream)


def _tell_end(orders: socket.socket, pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    orders.send(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}).encode())


def _become(order: Mapping[str, Any], streams: Sequence[int], inherited: Sequence[int]) -> list[str]:
    """A process of its own: nothing of the fork server's is left but what it has imported."""
    for stream, number in zip(streams, (1, 2), strict=True):
        os.dup2(stream, number)
    for descriptor in {*streams, *inherited}:
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    return list(order["arguments"])


def main() -> None:
    """Import, then serve; a fork goes on from here as ``python -m`` does from its beginning."""
    orders = socket.socket(fileno=int(sys.argv[1]))
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    arguments = serve(orders)
    if arguments is not None:
        orders.detach()
        module, *sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
