"""Golden timelines: small worlds whose every line is known; only ``--rewrite`` of the simulation writes them."""

from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from tests.simulation.simulator import Simulator
from tests.simulation.workloads import MS, SCENARIOS

GOLDEN = {
    "burst": 40 * MS,
    "bulk_beside_interactive_bucketed": 60 * MS,
    "cancel_storm": 25 * MS,
    "classes": 15 * MS,
    "heavy_tail_bucketed": 120 * MS,
    "poisoned": 250 * MS,
    "out_of_memory": 150 * MS,
    "tiny_deadlines": 60 * MS,
}
"""Scenario to the instant until which requests arrive."""
SEED = 17


def golden_path(name) -> Path:
    return Path(__file__).parent / f"{name}.txt"


def golden_text(name) -> str:
    scenario, until = SCENARIOS[name], GOLDEN[name]

    def requests(rng):
        arrivals = sorted(scenario.requests(rng), key=lambda request: request.at_ns)
        for request in takewhile(lambda request: request.at_ns < until, arrivals):
            yield replace(request, tokens=request.tokens[:500])

    simulator = Simulator(SEED, replace(scenario, requests=requests)).run()
    lines = [
        f"{name} seed={SEED} until={until // MS}ms",
        *simulator.lines,
        str(dict(sorted(simulator.outcomes().items()))),
    ]
    return "\n".join(lines) + "\n"
