"""Which engine takes a call: single decisions, and front ends that decide beside each other on the same old news."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from embedserve.frontends.routing import Standing, choose, waiting_tokens

STEP_S = 0.001
REPORT_STEPS = 50
"""A report each 50 ms."""


def chosen(standings: list[Standing], tokens: int = 10) -> list[int | None]:
    """Wherever the front end is at home."""
    return [choose(standings, tokens, front_ends=1, home=home) for home in range(max(1, len(standings)))]


class TestChoice:
    def test_of_engines_that_are_alike_the_home_takes_it(self):
        """Whatever they say alike: nothing, a rate, or work."""
        for alike in (Standing(), Standing(tokens_per_second=1e6), Standing(True, False, 5000, 1e6, 100, 100)):
            assert chosen([alike] * 3) == [0, 1, 2]
        assert choose([Standing(usable=False), Standing(), Standing()], 10, front_ends=1, home=0) == 1

    def test_what_no_caller_notices_makes_no_difference(self):
        """Up to a millisecond of work; beyond it the other takes the call."""
        assert chosen([Standing(tokens_per_second=1e6), Standing(tokens_per_second=1.1e6)]) == [0, 1]
        assert chosen([Standing(True, False, 14, 1e6), Standing(True, False, 900, 1e6)]) == [0, 1]
        assert chosen([Standing(True, False, 14, 1e6), Standing(True, False, 1100, 1e6)]) == [0, 0]

    def test_the_one_that_is_done_first_takes_the_call(self):
        """By time and not by tokens: a fast engine with more to do may be done first."""
        slow, fast = Standing(reported_tokens=1000, tokens_per_second=1e4), Standing(True, False, 2000, 1e5)
        assert set(chosen([slow, fast])) == {1}
        assert set(chosen([fast, slow])) == {0}

    def test_the_calls_own_size_counts(self):
        """Of two idle engines the faster takes what is large."""
        slow, fast = Standing(tokens_per_second=1e4), Standing(True, False, 10, 1e6)
        assert set(chosen([slow, fast], tokens=10_000)) == {1}

    def test_an_engine_that_knows_no_rate_is_tried(self):
        known, new = Standing(reported_tokens=1000, tokens_per_second=1e5), Standing()
        assert set(chosen([known, new])) == {1}

    def test_who_is_not_usable_gets_nothing_and_nobody_gets_what_nobody_can_take(self):
        assert set(chosen([Standing(usable=False), Standing(reported_tokens=10**9, tokens_per_second=1.0)])) == {1}
        assert chosen([Standing(usable=False)] * 2) == [None, None]
        assert chosen([]) == [None]

    def test_who_is_late_is_asked_last(self):
        late, busy = Standing(late=True), Standing(reported_tokens=10**6, tokens_per_second=1e3)
        assert set(chosen([late, busy])) == {1}
        assert set(chosen([late, Standing(usable=False)])) == {0}

    def test_what_was_sent_since_the_report_counts_for_each_front_end(self):
        """And what has come back since counts as much; never less than what is known to be there."""
        assert waiting_tokens(Standing(reported_tokens=100, ours=30, ours_reported=10), 4) == 180
        assert waiting_tokens(Standing(reported_tokens=100, ours=10, ours_reported=30), 4) == 20
        assert waiting_tokens(Standing(reported_tokens=50, ours=10, ours_reported=30), 4) == 10


@dataclass
class Engine:
    """First come, first served, at a rate."""

    tokens_per_second: float
    queue: deque[list[float]] = field(default_factory=deque)
    """Tokens left, front end, tokens."""

    @property
    def tokens(self) -> float:
        return sum(call[0] for call in self.queue)

    @property
    def drain_s(self) -> float:
        return self.tokens / self.tokens_per_second

    def run(self, ours: list[float]) -> None:
        """One step; ``ours`` of each front end falls as its calls are done."""
        left = self.tokens_per_second * STEP_S
        while self.queue and left > 0:
            done = min(left, self.queue[0][0])
            self.queue[0][0] -= done
            left -= done
            if self.queue[0][0] <= 0:
                _, front_end, tokens = self.queue.popleft()
                ours[int(front_end)] -= tokens


class Service:
    """Front ends that have the same reports, and engines."""

    def __init__(self, front_ends: int, rates: list[float], counted: int, seed: int = 17) -> None:
        """``counted``: how many front ends each takes to do as it does."""
        self.engines = [Engine(rate) for rate in rates]
        self.ours = [[0.0] * front_ends for _ in rates]
        self.told = [[0.0] * front_ends for _ in rates]
        self.reported = [0.0] * len(rates)
        self._counted = counted
        self._chance = random.Random(seed)
        self.gaps: list[float] = []
        """Each step: drain time between the fullest engine and the emptiest."""

    def send(self, front_end: int, tokens: int) -> int:
        standings = [
            Standing(
                reported_tokens=int(self.reported[e]),
                tokens_per_second=engine.tokens_per_second,
                ours=int(self.ours[e][front_end]),
                ours_reported=int(self.told[e][front_end]),
            )
            for e, engine in enumerate(self.engines)
        ]
        place = choose(standings, tokens, front_ends=self._counted, home=front_end)
        assert place is not None
        self.engines[place].queue.append([tokens, front_end, tokens])
        self.ours[place][front_end] += tokens
        return place

    def run(self, steps: int, load: float, weights: list[float]) -> None:
        """Calls of 20 to 400 tokens at ``load`` times the capacity, dealt over front ends by ``weights``."""
        capacity = sum(engine.tokens_per_second for engine in self.engines) * STEP_S
        due = 0.0
        for step in range(steps):
            if step % REPORT_STEPS == 0:
                for e, engine in enumerate(self.engines):
                    self.reported[e], self.told[e] = engine.tokens, list(self.ours[e])
            due += load * capacity
            while due > 0:
                tokens = self._chance.randint(20, 400)
                self.send(self._chance.choices(range(len(weights)), weights)[0], tokens)
                due -= tokens
            for engine, ours in zip(self.engines, self.ours, strict=True):
                engine.run(ours)
            drains = [engine.drain_s for engine in self.engines]
            self.gaps.append(max(drains) - min(drains))


class TestHerd:
    """One engine of two has 60 ms of work when eight front ends hear of it, and then calls come."""

    FRONT_ENDS = 8

    def gaps(self, counted: int, weights: list[float] | None = None) -> list[float]:
        service = Service(self.FRONT_ENDS, [1e6, 1e6], counted)
        service.engines[0].queue.append([60_000.0, 0, 60_000])
        service.ours[0][0] += 60_000
        service.run(1000, 1.2, weights or [1.0] * self.FRONT_ENDS)
        return service.gaps

    def test_front_ends_with_the_same_old_report_do_not_run_after_each_other(self):
        """Where each counts its own calls alone, the gap turns about and back and is never closed."""
        naive, ours = self.gaps(1), self.gaps(self.FRONT_ENDS)
        assert max(naive[200:]) > 0.010
        assert max(ours[200:]) < 0.005
        assert sum(ours[200:]) < sum(naive[200:]) / 3

    @pytest.mark.parametrize("busy", [1, 2])
    def test_connections_that_are_dealt_unevenly_do_no_harm(self, busy):
        """All traffic at one or two of the eight: the gap closes by a part with each report, and never turns about."""
        weights = [1.0] * busy + [0.0] * (self.FRONT_ENDS - busy)
        gaps = self.gaps(self.FRONT_ENDS, weights)
        assert gaps[0] > 0.050
        assert max(gaps[200:]) < 0.020
        assert max(gaps[500:]) < 0.008

    def test_engines_of_different_speed_end_together(self):
        service = Service(4, [2e6, 1e6, 0.5e6], 4)
        service.run(1000, 1.1, [1.0] * 4)
        assert max(service.gaps[200:]) < 0.010
        assert min(engine.drain_s for engine in service.engines) > 0.05, "all of them are over their limit"

    def test_a_burst_at_rest_is_dealt_out_evenly(self):
        """Sixteen front ends, four calls each at once, nothing known: no engine has more than its share."""
        service = Service(16, [0.0] * 4, 16)
        for engine in service.engines:
            engine.tokens_per_second = 1e6
        taken = [service.send(front_end, 100) for _ in range(4) for front_end in range(16)]
        assert sorted(taken) == sorted([0, 1, 2, 3] * 16)
