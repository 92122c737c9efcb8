"""A scenario driven against a target, in one client process or several: the load test as a library.

Decides how clients are begun, started at one instant, and merged. Must never know a protocol: ``make_target`` is called
once in each client process and gives what ``target.py`` describes.

    result = await drive(load_scenario("short"), partial(EmbedserveTarget, "localhost:50051"))
    print(result.figures()["phases"][0]["calls_per_s"])

``make_target`` travels to the client processes by pickle: a class or a function at the top of a module, or a
``functools.partial`` of one; not a lambda, and nothing defined in ``__main__``. With ``processes=0`` the caller's own
event loop is the client and anything will do.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loadtest.client import GRACE_S, Account, Client, Job
from loadtest.environment import without_foreign
from loadtest.figures import ClientUse, figures_of
from loadtest.ledger import Ledger
from loadtest.scenario import Phase, Scenario
from loadtest.schedule import Span, timetable
from loadtest.target import Target
from loadtest.tether import tethered

__all__ = ["MakeTarget", "Progress", "Result", "TargetFailed", "drive"]

MakeTarget = Callable[[], Target]
ROOT = Path(__file__).resolve().parent.parent
HEAD_START_S = 0.2
"""From the word that starts the clients to their first call."""
PREPARE_S = 120.0
"""A client that is not connected and warm so long after its warm-up's end hangs."""


class TargetFailed(Exception):
    """A client could not do its work; the message is a sentence for whoever started the test."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    seconds: float
    """Since the run began; negative before."""
    of: float
    calls: int
    failed: int


@dataclass(frozen=True)
class Result:
    """What one run found. ``figures()`` is what people want; ``ledger`` has every call."""

    scenario: Scenario
    ledger: Ledger
    clients: tuple[ClientUse, ...]
    capacity: float | None = None
    """Calls a second, given or measured; ``None`` where no phase refers to it."""

    @property
    def spans(self) -> list[Span]:
        """The phases with their begin, end and rate."""
        return timetable(self.scenario, self.capacity)

    @cached_property
    def _figures(self) -> dict[str, Any]:
        return figures_of(self.scenario, self.spans, self.ledger, self.clients, self.capacity)

    def figures(self) -> dict[str, Any]:
        """Everything that is reported, ready for JSON; ``figures.py`` names the keys."""
        return self._figures

    @property
    def void(self) -> list[str]:
        """Why this run proves nothing; empty when it counts."""
        reasons: list[str] = self._figures["void"]
        return reasons


async def drive(
    scenario: Scenario,
    make_target: MakeTarget,
    *,
    processes: int | None = None,
    capacity: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_start: Callable[[], None] | None = None,
) -> Result:
    """Run ``scenario`` once.

    Args:
        scenario: as ``load_scenario`` reads it.
        make_target: called once in each client process.
        processes: so many client processes; absent: as the scenario says; 0: in this event loop.
        capacity: calls a second that phases refer to; absent: measured first where a phase needs it.
        on_progress: called about twice a second.
        on_start: called once, when every client is connected and warm and the first phase is about to begin.

    Raises:
        TargetFailed: a client could not connect, or a target raised.
        ValueError: ``make_target`` cannot be pickled.
    """
    tell = on_progress or (lambda _progress: None)
    if capacity is None and scenario.needs_capacity:
        capacity = await _measured(scenario, make_target, processes, tell)
    count = scenario.client_processes() if processes is None else processes
    jobs = [
        Job(scenario=scenario, make_target=make_target, capacity=capacity, part=part, parts=max(1, count))
        for part in range(max(1, count))
    ]
    starting = on_start or (lambda: None)
    accounts = await (_fleet(jobs, tell, starting) if count else _alone(jobs[0], tell, starting))
    clients = tuple(ClientUse(a.cpu_s, a.took_s, len(a.ledger.rows), a.unsent) for a in accounts)
    return Result(scenario, Ledger.merged(a.ledger for a in accounts), clients, capacity)


async def _measured(
    scenario: Scenario, make_target: MakeTarget, processes: int | None, tell: Callable[[Progress], None]
) -> float:
    """Answers a second of a closed loop with the same texts."""
    wanted = scenario.capacity
    phase = Phase(name="capacity", seconds=wanted.seconds, callers=wanted.callers)
    result = await drive(
        scenario.model_copy(update={"phases": (phase,)}), make_target, processes=processes, on_progress=tell
    )
    rate: float = result.figures()["phases"][0]["calls_per_s"]
    if not rate:
        raise TargetFailed("the capacity could not be measured: no call was answered")
    return rate


async def _alone(job: Job, tell: Callable[[Progress], None], starting: Callable[[], None]) -> list[Account]:
    client = Client(job)
    await client.prepare()
    starting()
    start = time.monotonic()
    playing = asyncio.ensure_future(client.play(start))
    while not (await asyncio.wait({playing}, timeout=0.5))[0]:
        scribe = client.scribe
        tell(Progress(time.monotonic() - start, job.scenario.seconds, scribe.calls, scribe.failed))
    return [await playing]


async def _fleet(jobs: list[Job], tell: Callable[[Progress], None], starting: Callable[[], None]) -> list[Account]:
    try:
        pickled = [pickle.dumps(job) for job in jobs]
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"make_target must be importable by a client process: {error}") from None
    make = jobs[0].make_target
    if getattr(getattr(make, "func", make), "__module__", None) == "__main__":
        raise ValueError("make_target must live in a module that a client process can import, not in __main__")
    fleet = _Fleet(jobs, pickled, tell, starting)
    try:
        return await fleet.run()
    finally:
        await fleet.end()


class _Fleet:
    """The client processes of one run."""

    def __init__(
        self,
        jobs: list[Job],
        pickled: list[bytes],
        tell: Callable[[Progress], None],
        starting: Callable[[], None],
    ) -> None:
        self._scenario = jobs[0].scenario
        self._pickled = pickled
        self._tell = tell
        self._starting = starting
        self._processes: list[asyncio.subprocess.Process] = []
        self._so_far = [(0, 0)] * len(pickled)

    async def run(self) -> list[Account]:
        for job in self._pickled:
            process = await asyncio.create_subprocess_exec(
                *tethered([sys.executable, "-m", "loadtest.client"]),
                cwd=ROOT,
                env=without_foreign(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                process_group=0,  # Ctrl-C is for us, who end the clients
            )
            self._processes.append(process)
            self._send(process, pickle.dumps(sys.path))
            self._send(process, job)
        limit = self._scenario.warm_up_s + self._scenario.timeout_s + PREPARE_S
        try:
            async with asyncio.timeout(limit):
                await asyncio.gather(*(self._hear(i, "ready") for i in range(len(self._processes))))
        except TimeoutError:
            raise TargetFailed(f"a client was not ready after {limit:.0f} s: does the server answer?") from None
        self._starting()
        start = time.monotonic() + HEAD_START_S
        for process in self._processes:
            self._send(process, pickle.dumps(start))
        telling = asyncio.ensure_future(self._keep_telling(start))
        limit = self._scenario.seconds + self._scenario.timeout_s + GRACE_S + PREPARE_S
        try:
            async with asyncio.timeout(limit):
                return await asyncio.gather(*(self._hear(i, "done") for i in range(len(self._processes))))
        except TimeoutError:
            raise TargetFailed(f"a client had not ended {limit:.0f} s after its start") from None
        finally:
            telling.cancel()

    async def end(self) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    @staticmethod
    def _send(process: asyncio.subprocess.Process, data: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(len(data).to_bytes(8, "big") + data)

    async def _hear(self, which: int, wanted: str) -> Any:
        process = self._processes[which]
        assert process.stdout is not None
        while True:
            try:
                size = int.from_bytes(await process.stdout.readexactly(8), "big")
                kind, value = pickle.loads(await process.stdout.readexactly(size))
            except asyncio.IncompleteReadError:
                code = await process.wait()
                raise TargetFailed(f"a client process ended with {code}; what it said is above") from None
            if kind == "failed":
                raise TargetFailed(value)
            if kind == "so far":
                self._so_far[which] = value
            if kind == wanted:
                return value

    async def _keep_telling(self, start: float) -> None:
        while True:
            calls, failed = (sum(column) for column in zip(*self._so_far, strict=True))
            self._tell(Progress(time.monotonic() - start, self._scenario.seconds, calls, failed))
            await asyncio.sleep(0.25)
