"""One caller with 1 % poison at full load, and three others.

Goal: the poison costs its owner, not the others. Method: the same world with the rules and without them (halves, no
budget, no quarantine), four seeds; figures are means.
"""

from dataclasses import replace
from statistics import mean

import pytest

from embedserve.scheduling.item import Verdict
from embedserve.scheduling.retry import RetryLadder
from tests.simulation.simulator import Simulator
from tests.simulation.workloads import MS, SCENARIOS, S

SEEDS = (1, 2, 3, 4)


def run(name, seed, **changes):
    scenario = SCENARIOS[name]
    scenario = replace(scenario, settings=replace(scenario.settings, **changes))
    return Simulator(seed, scenario, slots=2, prepare_ahead_ns=1 * MS, checked=False, trace=False).run()


def served(simulator, name="innocent"):
    asked = [s for s in simulator.named(name) if 2 * S <= s.arrived_ns < 20 * S]
    return sum(s.outcome == "done" for s in asked) / len(asked)


def p95_ns(simulator):
    return sorted(s.sojourn_ns for s in simulator.named("innocent") if s.outcome == "done")[-len(SEEDS)]


class TestPoisonStream:
    def test_innocents_are_served_in_spite_of_it(self, monkeypatch):
        """84 % of those who ask are served, 73 % without the rules; the device is asked for 1.1 of its capacity."""
        after = mean(served(run("poison_stream", seed)) for seed in SEEDS)
        monkeypatch.setattr(RetryLadder, "WAYS", 2)
        before = mean(served(run("poison_stream", seed, retry_share=0.99, quarantine_ns=0)) for seed in SEEDS)

        assert after >= before + 0.07
        assert after >= 0.8

    def test_anonymous_callers_are_helped_by_the_cheaper_search(self, monkeypatch):
        """Who has no name cannot ride apart."""
        after = mean(served(run("poison_stream_anonymous", seed)) for seed in SEEDS)
        monkeypatch.setattr(RetryLadder, "WAYS", 2)
        before = mean(served(run("poison_stream_anonymous", seed, retry_share=0.99)) for seed in SEEDS)

        assert after >= before + 0.05

    @pytest.mark.parametrize("seed", SEEDS)
    def test_no_innocent_expires_and_none_is_blamed(self, seed):
        simulator = run("poison_stream", seed)

        assert {s.outcome for s in simulator.named("innocent")} <= {"done", "refused deadline", "refused throughput"}
        assert all(set(s.verdicts) <= {Verdict.DONE} for s in simulator.named("innocent"))

    def test_poison_is_found_though_it_waits_for_its_budget(self):
        simulator = run("poison_stream", 1)
        told = [s for s in simulator.named("mallory") if s.request.poison and s.outcome == "done"]

        assert len(told) >= 3
        assert {verdict for s in told for verdict in s.verdicts} == {Verdict.ITEM_ERROR}
