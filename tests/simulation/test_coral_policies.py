"""The counterexample: coral-gpu-inference's two admission formulas in the same world, and what they lose.

Its throughput rule divides waiting tokens by a rate that is measured between hand-overs, with a floor; its latency rule
takes the P95 of the successes of the last second and refuses all or nothing. Neither knows deadlines. The rest of the
world (order, batches, expiry) is ours.
"""

from statistics import mean, pstdev

import pytest

from embedserve.scheduling.item import Rejection
from tests.simulation.simulator import Simulator
from tests.simulation.workloads import CPU_TEXTS_PER_S, MS, S, cpu, on_cpu


class Formula:
    """What a policy needs; the formulas fill in ``refuses``."""

    name = "coral"

    def judge(self, candidate, load, now_ns):
        refuses = candidate.estimated and self.refuses(load, now_ns)
        return Rejection("coral", "CORAL", 1) if refuses else None

    def observe_sojourn(self, sojourn_ns, now_ns, *, timed_out):
        pass

    def observe_wait(self, wait_ns, pass_ns, now_ns):
        pass

    def handed_over(self, tokens, now_ns):
        pass

    def figures(self, now_ns):
        return {}


class CoralThroughput(Formula):
    """Waiting tokens over an average of tokens between hand-overs, 10,000/s at least, may be 2 s at most."""

    def __init__(self):
        self.rate, self.last_ns = 0.0, None

    def handed_over(self, tokens, now_ns):
        if self.last_ns is not None and now_ns > self.last_ns:
            self.rate += 0.3 * (tokens * 1e9 / (now_ns - self.last_ns) - self.rate)
        self.last_ns = now_ns

    def refuses(self, load, now_ns):
        return load.waiting_tokens / max(self.rate, 10_000) > 2


class CoralLatency(Formula):
    """P95 of the successes of the last second: over 200 ms all are refused, over 100 ms one in four."""

    def __init__(self):
        self.ended, self.turn = [], 0

    def observe_sojourn(self, sojourn_ns, now_ns, *, timed_out):
        if not timed_out:
            self.ended.append((now_ns, sojourn_ns))

    def refuses(self, load, now_ns):
        self.ended = [e for e in self.ended[-1_000:] if e[0] > now_ns - S]
        if len(self.ended) < 20:
            return False
        p95 = sorted(ns for _, ns in self.ended)[int(0.95 * len(self.ended))]
        self.turn += 1
        return p95 > 200 * MS or (p95 > 100 * MS and self.turn % 4 == 0)


class CoralSimulator(Simulator):
    """Without our deadline rule, and telling the formula of hand-overs."""

    def __init__(self, formula, times):
        super().__init__(1, cpu(on_cpu(times, S), "none"), checked=False, trace=False)
        self.formula = formula()
        self.scheduler._gate.policies = (self.formula,)

    def dispatch(self, batch):
        self.formula.handed_over(batch.padded_tokens, self.now)
        super().dispatch(batch)


def goodput(simulator):
    done = [s for s in simulator.stories.values() if s.outcome == "done" and 2 * S <= s.ended_ns < 20 * S]
    return len(done) / 18 / CPU_TEXTS_PER_S


class TestCoral:
    @pytest.mark.parametrize("times", [2, 4])
    def test_the_throughput_formula_admits_what_expires(self, times):
        """Its limit knows no deadline and no running work: hundreds of admitted requests expire."""
        simulator = CoralSimulator(CoralThroughput, times).run()

        assert simulator.outcomes()["timed_out"] >= 200
        assert goodput(simulator) <= 0.9

    @pytest.mark.parametrize("times", [2, 4])
    def test_the_latency_formula_flips_between_all_and_nothing(self, times):
        """It sees a burst when the burst has been admitted, refuses all until the window is empty, and starts anew."""
        simulator = CoralSimulator(CoralLatency, times).run()
        seconds = [sum(simulator.tokens_done[10 * k + i] for i in range(10)) for k in range(2, 20)]

        assert pstdev(seconds) / mean(seconds) >= 0.3
        assert goodput(simulator) <= 0.8
