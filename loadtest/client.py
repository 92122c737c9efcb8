"""One client: sends the calls of a scenario to one target, from one event loop.

Decides how a call is timed and when it is sent. An open loop's call counts from the instant at which it was *meant* to
be sent; nothing is retried and nobody is spared. Must never know a protocol or a figure.

``python -m loadtest.client`` is such a client as a process: a pickled ``Job`` comes on standard input, then the
instant of the start; ``("ready", None)``, ``("so far", (calls, failed))`` and ``("done", Account)`` go to standard
output.
"""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from loadtest.corpus import calls_of
from loadtest.deadline import is_late
from loadtest.ledger import Ledger, Scribe
from loadtest.pacer import Pacer
from loadtest.plan import Crowd, Plan, Player
from loadtest.scenario import Scenario
from loadtest.schedule import Span, arrivals, timetable
from loadtest.target import Reply, Target

__all__ = ["Account", "Client", "Job", "read", "write"]

GRACE_S = 2.0
"""After its deadline a call is waited for so long; then its target hangs, and it is counted as expired."""
IN_FLIGHT_MAX = 20_000
"""Calls of one process that may be open at once; those beyond it are not sent, and the run is void."""
BREATH = 64
"""Calls that are begun in one go when the client is behind; then the loop reads what has come in."""
TELL_S = 0.5
"""How often a process tells how far it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one client does: its part of a scenario."""

    scenario: Scenario
    make_target: Callable[[], Target]
    capacity: float | None = None
    part: int = 0
    """Which of ``parts``, from 0: every ``parts``-th arrival and caller is ours."""
    parts: int = 1


@dataclass(frozen=True, slots=True)
class Account:
    """What one client has to tell."""

    ledger: Ledger
    cpu_s: float
    """CPU seconds of the process during the run, all threads."""
    took_s: float
    unsent: int
    """Calls of the schedule that were never sent, because ``IN_FLIGHT_MAX`` were open."""


class Client:
    """One run of one job."""

    def __init__(self, job: Job) -> None:
        """Texts and schedule are made here, before any clock runs."""
        self._job = job
        self._calls = calls_of(job.scenario)
        self._spans = timetable(job.scenario, job.capacity)
        self._arrivals = arrivals(self._spans, job.scenario.seed)[job.part :: job.parts].tolist()
        self._timeout_s = job.scenario.timeout_s
        self._target = job.make_target()
        self._turn = job.part
        self._open: set[asyncio.Task[None]] = set()
        self._broken: BaseException | None = None
        self._start = 0.0
        self._unsent = 0
        self._played: tuple[int, int] | None = None
        self.scribe = Scribe()

    @property
    def so_far(self) -> tuple[int, int]:
        """Calls that have ended, and how many of them failed."""
        return self._played or (self.scribe.calls, self.scribe.failed)

    async def prepare(self) -> None:
        """Connect and warm up."""
        await self._target.open()
        scenario = self._job.scenario
        if scenario.warm_up_s:
            callers = scenario.phases[0].callers or 8
            ends = time.monotonic() + scenario.warm_up_s
            await asyncio.gather(
                *(self._warm(ends) for _ in range(len(range(self._job.part, callers, self._job.parts))))
            )
        # What was made until now stays: the collector need not look at it again and again during the run.
        gc.collect()
        gc.freeze()

    async def play(self, start: float) -> Account:
        """The run itself, from the instant ``start`` of ``time.monotonic``."""
        if isinstance(self._target, Player):
            return await self._handed_over(self._target, start)
        self._start = start
        pacer = Pacer()
        await pacer.until(start)
        cpu, begun = time.process_time(), time.monotonic()
        try:
            await asyncio.gather(self._open_loop(pacer), *(self._closed_phase(i) for i in range(len(self._spans))))
            if self._open:
                await asyncio.wait(self._open, timeout=self._timeout_s + GRACE_S)
            for task in self._open:  # a target that hangs: _call notes it as expired
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)
        finally:
            pacer.close()
            await self._target.close()
        if self._broken is not None:
            raise self._broken
        return Account(self.scribe.ledger(), time.process_time() - cpu, time.monotonic() - begun, self._unsent)

    async def _handed_over(self, target: Player, start: float) -> Account:
        """The run by a target that needs no telling of each call."""
        job, spans = self._job, self._spans
        edges = np.array([span.ends for span in spans[:-1]])
        crowds = [
            Crowd(span.begins, span.ends, len(range(job.part, span.phase.callers, job.parts)), number)
            for number, span in enumerate(spans)
            if span.phase.callers is not None
        ]
        arrivals = np.array(self._arrivals)
        plan = Plan(
            calls=self._calls,
            turn=job.part,
            step=job.parts,
            arrivals=arrivals,
            phases=np.searchsorted(edges, arrivals, side="right").astype(np.uint16),
            crowds=crowds,
            start=start,
            ends=spans[-1].ends + self._timeout_s + GRACE_S,
            in_flight_max=IN_FLIGHT_MAX,
        )

        def tell(calls: int, failed: int) -> None:
            self._played = (calls, failed)

        try:
            played = await target.play(plan, self._note, tell, timeout_s=self._timeout_s)
        finally:
            await self._target.close()
        return Account(self.scribe.ledger(), played.cpu_s, played.took_s, played.unsent)

    def _note(self, meant: float, sent: float, ended: float, phase: int, texts: int, reply: Reply) -> None:
        if reply.status == "OK" and is_late(sent, ended, self._timeout_s):
            reply = Reply("DEADLINE_EXCEEDED", "LATE_ANSWER")
        self.scribe.note(meant, sent, ended, phase, texts, reply)

    async def _warm(self, ends: float) -> None:
        while time.monotonic() < ends:
            await self._target.embed(self._next(), timeout_s=self._timeout_s)

    def _next(self) -> tuple[str, ...]:
        texts = self._calls[self._turn % len(self._calls)]
        self._turn += self._job.parts
        return texts

    async def _open_loop(self, pacer: Pacer) -> None:
        spans, phase = self._spans, 0
        self._turn = self._job.part
        for number, meant in enumerate(self._arrivals):
            while meant >= spans[phase].ends:
                phase += 1
            if meant > time.monotonic() - self._start:
                await pacer.until(self._start + meant)
            elif number % BREATH == 0:
                await asyncio.sleep(0)
            if self._broken is not None:
                return
            if len(self._open) >= IN_FLIGHT_MAX:
                self._unsent += 1
                continue
            task = asyncio.ensure_future(self._call(self._next(), meant, phase))
            self._open.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._open.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._broken = self._broken or error

    async def _closed_phase(self, phase: int) -> None:
        span = self._spans[phase]
        if span.phase.callers is None:
            return
        await asyncio.sleep(max(0.0, self._start + span.begins - time.monotonic()))
        own = len(range(self._job.part, span.phase.callers, self._job.parts))
        # The last calls of a phase may end in the next one: the next one begins on time all the same.
        tasks = [asyncio.ensure_future(self._caller(phase, span)) for _ in range(own)]
        for task in tasks:
            self._open.add(task)
            task.add_done_callback(self._ended)
        # A broken target ends its callers at once, and so the phase.
        if tasks:
            await asyncio.wait(tasks, timeout=max(0.0, self._start + span.ends - time.monotonic()))

    async def _caller(self, phase: int, span: Span) -> None:
        ends = self._start + span.ends
        while time.monotonic() < ends and self._broken is None:
            await self._call(self._next(), None, phase)

    async def _call(self, texts: tuple[str, ...], meant: float | None, phase: int) -> None:
        clock, start = time.monotonic, self._start
        sent = clock() - start
        try:
            reply = await self._target.embed(texts, timeout_s=self._timeout_s)
        except asyncio.CancelledError:
            reply = Reply("DEADLINE_EXCEEDED", "NO_ANSWER")
            self.scribe.note(sent if meant is None else meant, sent, clock() - start, phase, len(texts), reply)
            raise
        ended = clock() - start
        self._note(sent if meant is None else meant, sent, ended, phase, len(texts), reply)


def write(stream: BinaryIO, message: Any) -> None:
    """One message to another process."""
    data = pickle.dumps(message)
    stream.write(len(data).to_bytes(8, "big") + data)
    stream.flush()


def read(stream: BinaryIO) -> Any:
    """The next message; ``EOFError`` when there is none."""
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError
    return pickle.loads(stream.read(int.from_bytes(size, "big")))


async def _serve(job: Job, hear: BinaryIO, say: BinaryIO) -> None:
    client = Client(job)
    await client.prepare()
    write(say, ("ready", None))
    start: float = await asyncio.get_running_loop().run_in_executor(None, read, hear)
    playing = asyncio.ensure_future(client.play(start))
    while not (await asyncio.wait({playing}, timeout=TELL_S))[0]:
        write(say, ("so far", client.so_far))
    write(say, ("done", await playing))


def main() -> int:
    """The process."""
    import uvloop  # noqa: PLC0415 - a client in the caller's own loop needs none

    hear = sys.stdin.buffer
    # What a target prints must not come between our messages.
    say = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        sys.path[:0] = read(hear)
        job: Job = read(hear)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(job, hear, say))
    except ConnectionError as error:
        write(say, ("failed", str(error)))
        return 1
    except (ImportError, AttributeError) as error:
        write(say, ("failed", f"{type(error).__name__}: {error}"))
        return 1
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # whoever began us is gone
        return 1
    return 0


if __name__ == "__main__":
    # What is pickled belongs to ``loadtest.client``, not to ``__main__``.
    from loadtest.client import main as main_of_module

    sys.exit(main_of_module())
