"""One scenario against one server or several, again and again, in turns.

Decides the order: A B, B A, A B, so that neither side always runs first. Must never know how a result is shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest import store
from loadtest.deployment import Deployment, Reach, deployed
from loadtest.drive import drive
from loadtest.report import page_of
from loadtest.result import Run
from loadtest.scenario import Phase, Scenario
from loadtest.summary import judged, summarised
from loadtest.table import Teller, number

__all__ = ["repeated", "run_in_turns", "saved", "warmed"]

PAUSE_S = 0.5
"""Between two runs: what the last one left in queues is gone."""
COMPILE_S = 20.0
"""A server that has not said by then how its compiled model came out is measured as it is."""
WARM_CALLERS = 8
"""Before an open loop."""


def run_in_turns(
    scenario: Scenario,
    sides: Sequence[tuple[str, Reach]],
    *,
    repeat: int,
    teller: Teller,
    command: str,
    capacity: float | None = None,
    processes: int | None = None,
) -> list[dict[str, Any]]:
    """Run ``scenario`` against each of ``sides`` (a target and the way to it) ``repeat`` times; a result for each.

    Raises:
        TargetFailed: a server could not be started or reached.
    """
    noted = Run(scenario.name)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(deployed(spec, scenario, reach)) for spec, reach in sides]
        for server, (_, reach) in zip(servers, sides, strict=True):
            warmed(server, scenario, reach, teller)
        repetitions: list[list[dict[str, Any]]] = [[] for _ in servers]
        for turn in range(repeat):
            order = range(len(servers)) if turn % 2 == 0 else reversed(range(len(servers)))
            for side in order:
                if turn or side:
                    time.sleep(PAUSE_S)
                title = f"{scenario.name} on {servers[side].name}, {turn + 1} of {repeat}"
                found = repeated(scenario, servers[side], teller, title, capacity=capacity, processes=processes)
                repetitions[side].append(found)
    results = []
    for server, runs in zip(servers, repetitions, strict=True):
        summary = summarised(runs)
        results.append(
            {
                "kind": "run",
                **noted.facts(command),
                "target": server.name,
                "client": server.client,
                "scenario": scenario.model_dump(mode="json"),
                "summary": summary,
                "marks": judged(scenario.marks, summary),
                "repetitions": runs,
            }
        )
    return results


def repeated(
    scenario: Scenario,
    server: Deployment,
    teller: Teller,
    title: str,
    *,
    capacity: float | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """One repetition: its figures, and what the server's own metrics say of it."""
    with teller.bar(title) as show:
        before: dict[str, float] = {}

        def start() -> None:
            before.update(server.sample())

        run = drive(
            scenario, server.make_target, processes=processes, capacity=capacity, on_progress=show, on_start=start
        )
        result = asyncio.run(run)
    figures = dict(result.figures())
    if (lost := server.lost()) is None:
        figures["server"] = server.difference(before)
    else:  # it has no metrics any more
        figures |= {"server": {}, "void": [*figures["void"], lost]}
    best = max(figures["phases"], key=lambda phase: phase["texts_per_s"])
    latency = best["latency_ms"] or {}
    teller.say(
        f"{title}: {number(best['calls_per_s'])} calls/s, {number(best['texts_per_s'])} texts/s, "
        f"p50 {number(latency.get('p50'))} ms, p99 {number(latency.get('p99'))} ms"
        + (" VOID" if figures["void"] else "")
    )
    return figures


def warmed(server: Deployment, scenario: Scenario, reach: Reach, teller: Teller) -> None:
    """Load a server that was started for the test until its compiled model serves, or it says that there is none."""
    if server.name != "serve:":
        return
    phase = Phase(name="warm-up", seconds=1.0, callers=scenario.phases[0].callers or WARM_CALLERS)
    short = scenario.model_copy(update={"phases": (phase,)})
    ends = time.monotonic() + COMPILE_S
    while True:
        repeated(short, server, teller, "warming up, not counted")
        ended = server.sample().get("embedserve_model_compile_duration_seconds_count", 0.0)
        if ended or "--model.compile" in reach.settings or time.monotonic() > ends:
            return


def saved(folder: Path, result: dict[str, Any]) -> None:
    """Write the result and its report."""
    store.save(folder, result, page_of(result))
