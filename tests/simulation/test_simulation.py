"""Whole stories, checked for every invariant and for what callers were promised.

Method: fixed seeds over all scenarios, fresh seeds whose number is printed when they fail, golden timelines byte for
byte, and a handful of stories with a figure. ``make simulate SEED=17 SCENARIO=burst`` shows any of them.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from random import SystemRandom
from statistics import median

import pytest

from embedserve.scheduling.item import Verdict
from tests.simulation.__main__ import main
from tests.simulation.checkers import INVARIANTS
from tests.simulation.simulator import Simulator
from tests.simulation.traces import GOLDEN, golden_path, golden_text
from tests.simulation.workloads import BURSTS, MS, OVERLOADS, SCENARIOS, Device, Request, S, bucketed, length, poisson

LONG = {
    **dict.fromkeys(("poison_stream", "poison_stream_anonymous", "overload_2x", "overload_2x_latency"), 700 * MS),
    **dict.fromkeys(("bulk_beside_interactive", "bulk_beside_interactive_bucketed"), 700 * MS),
    **dict.fromkeys(("long_among_short", "long_among_short_bucketed", "classes", "classes_bucketed"), 300 * MS),
}
"""Scenarios that are watched in their first part: by then the queue is as long as it will become."""
QUICK = [name for name in SCENARIOS if name not in LONG and name not in OVERLOADS and name not in BURSTS]


def tokens_within(simulator, start_ns, end_ns):
    step = 100 * MS
    return sum(n for slot, n in simulator.tokens_done.items() if start_ns <= slot * step < end_ns)


@cache
def overloaded(name):
    """The story of 3 s at twice the capacity, which several promises are about."""
    return Simulator(23, name, checked=False, trace=False).run()


@pytest.fixture(scope="module", autouse=True)
def forget_stories() -> Iterator[None]:
    yield
    overloaded.cache_clear()


class TestInvariants:
    @pytest.mark.parametrize("slots", [1, 2])
    @pytest.mark.parametrize("name", QUICK)
    def test_hold_for_fixed_seeds(self, name, slots):
        """With one batch running, and with one more prepared."""
        Simulator(17, name, slots=slots).run()

    @pytest.mark.parametrize(
        ("name", "slots"), [(name, slots) for name in LONG for slots in (1, 2) if slots == 1 or LONG[name] < 700 * MS]
    )
    def test_hold_under_load(self, name, slots):
        scenario = SCENARIOS[name]

        def requests(rng):
            return (request for request in scenario.requests(rng) if request.at_ns < LONG[name])

        Simulator(17, replace(scenario, requests=requests), slots=slots).run()

    def test_hold_for_fresh_seeds(self):
        """Seeds that nobody chose; the failing one is printed with the command that replays it."""
        fresh = SystemRandom()
        for _ in range(int(os.environ.get("SIMULATION_FRESH_SEEDS", "5"))):
            seed, name = fresh.randrange(10**9), fresh.choice(QUICK)
            try:
                Simulator(seed, name, slots=fresh.choice([1, 2]), trace=False).run()
            except AssertionError as violation:
                pytest.fail(f"make simulate SEED={seed} SCENARIO={name}: {violation}")

    def test_every_invariant_is_checked_by_some_scenario(self):
        checks = Simulator(17, "cancel_storm_bucketed").run().scheduler.checks

        assert [name for name in INVARIANTS if not checks[name]] == []


class TestTraces:
    @pytest.mark.parametrize("name", GOLDEN)
    def test_replays_byte_for_byte(self, name):
        """``python -m tests.simulation --rewrite`` writes them anew, on purpose only."""
        assert golden_text(name).encode() == golden_path(name).read_bytes()

    def test_the_command_prints_a_verdict_on_each_invariant(self, capsys):
        assert main(["17", "burst"]) == 0

        printed = capsys.readouterr().out

        assert all(promise in printed for promise in INVARIANTS.values())
        assert main(["17", "no_such"]) == 2


class TestOverload:
    """Twice the capacity (coral's goodput there: 13 % by its throughput policy, 41 % by its latency policy: D10)."""

    @pytest.mark.parametrize("name", ["overload_2x", "overload_2x_latency"])
    def test_goodput_stays_at_the_capacity(self, name):
        scenario = SCENARIOS[name]
        simulator = overloaded(name)
        capacity = scenario.device.tokens_per_second(scenario.settings, 29.0)
        offered = sum(sum(s.request.tokens) for s in simulator.stories.values()) / 3
        goodput = tokens_within(simulator, 500 * MS, 3 * S) / 2.5

        assert offered >= 1.9 * capacity
        assert goodput >= 0.95 * capacity

    @pytest.mark.parametrize("name", ["overload_2x", "overload_2x_latency"])
    def test_no_admitted_request_expires(self, name):
        outcomes = overloaded(name).outcomes()

        assert outcomes["timed_out"] == 0
        assert outcomes["done"] > 5_000

    def test_the_deadline_rule_alone_keeps_goodput(self):
        """With no policy selected, what may not meet its deadline is refused: all who are admitted are in time."""
        simulator = Simulator(23, replace(SCENARIOS["overload_2x"], policies=list), checked=False).run()
        outcomes = simulator.outcomes()
        capacity = simulator.scenario.device.tokens_per_second(simulator.scenario.settings, 29.0)

        assert outcomes["timed_out"] == 0
        assert tokens_within(simulator, 500 * MS, 3 * S) / 2.5 >= 0.95 * capacity

    def test_the_latency_policy_keeps_its_promise(self):
        """P95 of those who were served stays at the SLO of 250 ms."""
        simulator = overloaded("overload_2x_latency")
        sojourns = sorted(s.sojourn_ns for s in simulator.stories.values() if s.outcome == "done")

        assert sojourns[int(0.95 * len(sojourns))] <= 1.1 * 250 * MS


class TestBulkBesideOne:
    @pytest.mark.parametrize("slots", [1, 2])
    @pytest.mark.parametrize("settings", [SCENARIOS["steady"].settings, bucketed()], ids=["packed", "bucketed"])
    def test_a_bulk_submission_delays_a_caller_by_one_batch_at_most(self, settings, slots):
        """10,000 texts wait; a single text rides in the next batch that is closed after it came."""
        scenario = replace(SCENARIOS["bulk_beside_interactive"], settings=settings)
        simulator = Simulator(5, scenario, slots=slots, checked=False).run()
        ones = simulator.named("one")
        batch_ns = scenario.device.batch_ns + scenario.device.token_ns * settings.max_batch_tokens

        assert len(ones) > 50
        assert max(story.batch_of[0] - story.batches_before for story in ones) == 1
        assert max(story.sojourn_ns for story in ones) <= (slots + 1) * 1.1 * batch_ns
        assert simulator.named("bulk")[0].verdicts == {Verdict.DONE: 10_000}

    def test_two_bulk_flows_share(self):
        """The later of two jobs of 3,000 texts does not wait for the earlier: both end together."""

        def requests(rng):
            for at in (0, 100 * MS):
                yield Request(at, tuple(length(rng) for _ in range(3_000)), name="bulk")

        first, second = Simulator(5, replace(SCENARIOS["steady"], requests=requests), checked=False).run().named("bulk")

        assert abs(first.ended_ns - second.ended_ns) <= 200 * MS


class TestStarvation:
    @pytest.mark.parametrize("settings", [SCENARIOS["steady"].settings, bucketed()], ids=["packed", "bucketed"])
    def test_long_items_in_a_flood_of_short_ones(self, settings):
        """Short ones come faster than they are served, and fill every batch; long ones wait no longer than they do.

        coral scans short buckets first: p99 of a mixed load was 3.2 s (D12).
        """

        def flood(rng):
            for at in poisson(rng, 9_000, S):
                yield Request(at, (rng.randint(9, 14),), name="short")
            for at in poisson(rng, 20, S):
                yield Request(at, (rng.randint(100, 128),), name="long")

        scenario = replace(SCENARIOS["long_among_short"], settings=settings, requests=flood)
        simulator = Simulator(3, scenario, checked=False).run()
        waits = {name: sorted(s.sojourn_ns for s in simulator.named(name)) for name in ("short", "long")}

        assert simulator.outcomes() == {"done": len(simulator.stories)}
        assert waits["long"][-1] <= waits["short"][-1] + settings.max_wait_ns
        assert median(waits["long"]) <= median(waits["short"]) + settings.max_wait_ns

    def test_lower_classes_move_beside_a_flood_of_the_highest(self):
        """Strict classes, but the others keep about their 5 % share while the highest alone would fill the device."""
        simulator = Simulator(3, "classes", checked=False).run()
        done = {
            name: sum(s.ended_ns <= 600 * MS for s in simulator.named(name)) / len(simulator.named(name))
            for name in ("INTERACTIVE", "DEFAULT", "BULK")
        }

        assert done["INTERACTIVE"] > done["DEFAULT"] > 0.1
        assert done["BULK"] > 0.1

    def test_a_greedy_tenant_leaves_others_their_share(self):
        """Tenant b asks for a tenth of the capacity beside a tenant that asks for four times all of it."""

        def requests(rng):
            for at in poisson(rng, 12_000, 500 * MS):
                yield Request(at, (length(rng),), tenant="a", name="a")
            for at in poisson(rng, 280, 500 * MS):
                yield Request(at, (length(rng),), tenant="b", name="b")

        simulator = Simulator(3, replace(SCENARIOS["steady"], requests=requests), checked=False).run()

        assert max(s.sojourn_ns for s in simulator.named("b")) <= 40 * MS


class TestTimeouts:
    def test_latency_p95_sees_timeouts(self):
        """A device that hardly answers: the P95 shows it though few requests end well (coral was blind: D9)."""
        scenario = replace(
            SCENARIOS["overload_2x_latency"],
            device=Device(stall_at_ns=400 * MS, stall_ns=3 * S),
            settings=replace(SCENARIOS["steady"].settings, wait_quantile_step=0.0001),
        )
        simulator = Simulator(7, scenario, checked=False)
        seen = []
        report = simulator.scheduler.observe_sojourn

        def observe(sojourn_ns, now_ns, *, timed_out):
            report(sojourn_ns, now_ns, timed_out=timed_out)
            if timed_out:
                seen.append(simulator.scheduler.figures(now_ns)["latency_p95"]["p95_ns"])

        simulator.scheduler.observe_sojourn = observe
        simulator.run()

        assert len(seen) > 100
        assert seen[-1] >= 250 * MS

    def test_a_stall_expires_what_waits_and_runs_nothing_late(self):
        simulator = Simulator(17, "stall").run()
        late = [s for s in simulator.stories.values() if s.outcome == "timed_out"]

        assert late
        assert all(s.sojourn_ns <= s.request.patience_ns for s in late)

    def test_a_clock_that_jumps_runs_nothing_stale(self):
        """After SIGSTOP and SIGCONT, what expired meanwhile is dropped, and the next request is served at once."""
        simulator = Simulator(17, "clock_jump").run()
        after = [s for s in simulator.stories.values() if s.request.at_ns > 700 * MS and s.outcome == "done"]

        assert len(after) > 50
        assert max(s.sojourn_ns for s in after) < 100 * MS


class TestFaults:
    def test_the_innocent_are_served_beside_the_poisoned(self):
        """Only the poison item fails; NaN that comes from company heals alone; NaN that stays is never sent."""
        simulator = Simulator(17, "poisoned").run()
        for story in simulator.stories.values():
            if story.outcome == "cancelled":
                continue
            expected = {
                Verdict.DONE: len(story.request.tokens) - len(story.request.poison) - len(story.request.nan_always),
                Verdict.ITEM_ERROR: len(story.request.poison),
                Verdict.NON_FINITE: len(story.request.nan_always),
            }

            assert story.verdicts == {verdict: n for verdict, n in expected.items() if n}

    def test_out_of_memory_hurts_nobody_and_is_not_met_again_and_again(self):
        """All succeed; the effective limit stays near what the device can take."""
        simulator = Simulator(17, "out_of_memory").run()
        failed = sum(" OutOfMemory " in line for line in simulator.lines)

        assert simulator.outcomes() == {"done": len(simulator.stories)}
        assert 1 <= failed <= 0.15 * simulator.batches

    def test_nobody_waits_for_a_dead_device(self):
        simulator = Simulator(17, "death").run()

        assert simulator.outcomes()["open"] == 0
        assert all(s.ended_ns <= 500 * MS for s in simulator.stories.values() if s.outcome == "failed")

    @pytest.mark.parametrize("slots", [1, 2])
    def test_nothing_but_poison_does_not_end_the_process(self, slots):
        """The device is tried on inputs that are known to be good, and acquitted; all others are served."""
        simulator = Simulator(17, "poison_only", slots=slots).run()

        assert simulator.canaries >= 1
        assert not simulator.dead
        assert {s.outcome for s in simulator.named("innocent")} == {"done"}
        assert all(s.verdicts == {Verdict.ITEM_ERROR: 1} for s in simulator.named("mallory"))

    @pytest.mark.parametrize("slots", [1, 2])
    def test_a_broken_device_is_given_up_soon(self, slots):
        """16 passes and one canary later nobody waits any more."""
        simulator = Simulator(17, "broken_device", slots=slots).run()
        open_then = [s for s in simulator.stories.values() if s.ended_ns >= 400 * MS and s.arrived_ns < 400 * MS]

        assert simulator.dead
        assert simulator.canaries == 1
        assert simulator.outcomes()["open"] == 0
        assert all(s.ended_ns <= 600 * MS for s in open_then)

    def test_a_drain_loses_nothing(self):
        outcomes = Simulator(17, "drain").run().outcomes()

        assert set(outcomes) == {"done", "refused draining"}
