"""A client in a process of its own: open loop by a schedule, or closed loop by so many callers.

Decides how a call is timed: an open loop's latency counts from the instant at which the call was *meant* to be sent
(wrk2), so that a server that holds the client up does not hide it. Must never know what the figures prove. Nothing is
retried, and of an answer only the status is read. The client in C++ sends, where it can be built: ``wire_client.py``
says why it is not grpc.aio.

    job = Job(target, requests, seconds=60, rate=226, timeout_s=1.0)
    calls = run(job)          # numpy record array, one row a call

``python -m loadtest.caller`` is the process: a pickled job on standard input, an array on standard output.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.answer import DEADLINE_EXCEEDED, OK
from loadtest.deadline import is_late
from loadtest.environment import without_foreign
from loadtest.native.volley import Ended, Unavailable, Volley, load_library
from loadtest.plan import Crowd, Plan
from loadtest.tether import tethered
from loadtest.wire_client import Connection, head_of

__all__ = ["CALLS", "Calls", "Job", "begin", "run"]

ROOT = Path(__file__).resolve().parent.parent
EMBED = "/embedserve.v1.EmbeddingService/Embed"
GRACE_S = 0.5
"""After its deadline a call is waited for so long; an answer that comes then counts as expired."""
HEAD_START_S = 0.1
"""For the connections, before the first call."""
IN_FLIGHT_MAX = 100_000
"""Never reached: it would not be an open loop."""
OVERRUN_S = 30.0
"""A client that has not ended so long after its time hangs."""

CALLS = np.dtype([("meant", "f8"), ("sent", "f8"), ("ended", "f8"), ("code", "i2"), ("pushback_ms", "f4")])
"""Seconds since the start of the run; ``pushback_ms`` is NaN where the answer gave none."""

Calls = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one client process does."""

    target: str
    requests: Sequence[bytes]
    """Serialised requests, sent in turn."""
    seconds: float
    rate: float | None = None
    """Calls per second, Poisson; ``None``: closed loop."""
    bursts: Sequence[tuple[float, float, float]] = ()
    """``(from, to, rate)`` in seconds: another rate for a while."""
    callers: int = 64
    """Of a closed loop."""
    timeout_s: float | None = None
    metadata: Sequence[tuple[str, str]] = ()
    connections: int = 4
    seed: int = 17


def schedule(job: Job) -> list[float]:
    """Instants of a Poisson process whose rate may change for a while."""
    assert job.rate is not None
    random = Random(job.seed)
    at, instants = 0.0, []
    while True:
        rate = next((r for begin, end, r in job.bursts if begin <= at < end), job.rate)
        at += random.expovariate(rate)
        if at >= job.seconds:
            return instants
        instants.append(at)


def begin(job: Job) -> subprocess.Popen[bytes]:
    """Start the process; ``finish`` takes what it found."""
    process = subprocess.Popen(
        tethered([sys.executable, "-m", "loadtest.caller"]),
        cwd=ROOT, env=without_foreign(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(pickle.dumps(job))
    process.stdin.close()
    process.stdin = None
    return process


def finish(process: subprocess.Popen[bytes], job: Job) -> Calls:
    """Wait for a process of ``begin``."""
    try:
        out, _ = process.communicate(timeout=job.seconds + (job.timeout_s or 0.0) + OVERRUN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    if process.returncode:
        raise SystemExit(f"a client ended with {process.returncode}")
    return np.frombuffer(out, dtype=CALLS)


def run(job: Job) -> Calls:
    """Do a job in another process."""
    return finish(begin(job), job)


class _Client:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._connections: list[Connection] = []
        self._turn = itertools.count()
        self.rows: list[tuple[float, float, float, int, float]] = []
        self.start = 0.0

    async def connect(self) -> None:
        loop, job = asyncio.get_running_loop(), self._job
        host, _, port = job.target.rpartition(":")
        for _ in range(job.connections):
            _, connection = await loop.create_connection(
                lambda: Connection(job.target, EMBED, job.timeout_s, tuple(job.metadata)), host, int(port)
            )
            await asyncio.wait_for(connection.ready(), 10)
            self._connections.append(connection)
        self.start = time.perf_counter()

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    async def call(self, meant: float | None) -> None:
        job, turn = self._job, next(self._turn)
        which = turn % len(job.requests)
        connection = self._connections[turn % len(self._connections)]
        sent = time.perf_counter() - self.start
        try:
            # The server ends the call at its deadline; a client gives it up itself when that does not come.
            code, pushback = await asyncio.wait_for(
                connection.call(job.requests[which]), None if job.timeout_s is None else job.timeout_s + GRACE_S
            )
        except TimeoutError:
            code, pushback = DEADLINE_EXCEEDED, float("nan")
        ended = time.perf_counter() - self.start
        if code == OK and is_late(sent, ended, job.timeout_s):
            code = DEADLINE_EXCEEDED
        self.rows.append((sent if meant is None else meant, sent, ended, code, pushback))

    async def closed(self) -> None:
        async def caller() -> None:
            while time.perf_counter() - self.start < self._job.seconds:
                await self.call(None)

        await asyncio.gather(*(caller() for _ in range(self._job.callers)))

    async def open(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        for meant in schedule(self._job):
            wait = meant - (time.perf_counter() - self.start)
            if wait > 0:
                await asyncio.sleep(wait)
            task = asyncio.ensure_future(self.call(meant))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        while tasks:
            await asyncio.wait(tasks)


def _sent_by(library: ctypes.CDLL, job: Job) -> Calls:
    """The job by the client in C++."""
    arrivals = np.array([] if job.rate is None else schedule(job))
    crowds = () if job.rate is not None else (Crowd(0.0, job.seconds, job.callers, 0),)
    give_up_s = None if job.timeout_s is None else job.timeout_s + GRACE_S
    plan = Plan(
        calls=job.requests,
        arrivals=arrivals,
        phases=np.zeros(len(arrivals), np.uint16),
        crowds=crowds,
        start=time.monotonic() + HEAD_START_S,
        ends=job.seconds + (give_up_s or OVERRUN_S / 2),
        in_flight_max=IN_FLIGHT_MAX,
    )
    head = head_of(job.target, EMBED, job.timeout_s, job.metadata)
    volley = Volley(
        library, job.target, head, job.requests, plan, connections=job.connections, give_up_s=give_up_s, keep=False
    )
    try:
        volley.run()
        return np.array([_row(ended, job.timeout_s) for ended in volley.take()], dtype=CALLS)
    finally:
        volley.close()


def _row(ended: Ended, timeout_s: float | None) -> tuple[float, float, float, int, float]:
    code = ended.answer.code
    if code == OK and is_late(ended.sent, ended.ended, timeout_s):
        code = DEADLINE_EXCEEDED
    return ended.meant, ended.sent, ended.ended, code, ended.answer.pushback_ms


async def _act(job: Job) -> Calls:
    client = _Client(job)
    await client.connect()
    await (client.closed() if job.rate is None else client.open())
    client.close()
    return np.array(client.rows, dtype=CALLS)


def _main() -> None:
    import uvloop  # noqa: PLC0415

    job = pickle.loads(sys.stdin.buffer.read())
    try:
        library = load_library()
    except Unavailable:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            calls = runner.run(_act(job))
    else:
        calls = _sent_by(library, job)
    sys.stdout.buffer.write(calls.tobytes())


if __name__ == "__main__":
    # The job is pickled as ``loadtest.caller.Job``, not as ``__main__.Job``.
    from loadtest.caller import _main as main_of_module

    main_of_module()
