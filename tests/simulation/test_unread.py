"""Who is served beside a flood, where calls are refused unread: nobody loses a place by it.

Goal: small callers are admitted as often as by a server that reads everybody. Method: the same story with and without;
large calls at four times the capacity, and now and then a small one, with and without names of their own.
"""

from collections import Counter
from dataclasses import replace

import pytest

from embedserve.engine.observer import SilentObserver
from embedserve.engine.unread import UnreadAdmission
from embedserve.scheduling.admission.gradient import GradientPolicy
from embedserve.scheduling.item import Priority
from embedserve.scheduling.settings import GradientSettings
from tests.simulation.simulator import Simulator, Story
from tests.simulation.workloads import MS, SCENARIOS, Request, S, length, poisson, throughput

LARGE = 512
CALLERS = {
    "anonymous": ({}, {}),
    "tenants": ({"tenant": "small"}, {"tenant": "large"}),
    "classes": ({"priority": Priority.INTERACTIVE}, {"priority": Priority.BULK}),
}


class Door(Simulator):
    """Judges a call unread first, as the service does, where ``door`` says so."""

    def __init__(self, *args, door: bool, **options):
        super().__init__(*args, **options)
        self.unread = UnreadAdmission(self.scheduler, SilentObserver(), lambda: True)
        self.door = door
        self.turned_away = Counter()

    def on_arrive(self, request: Request):
        deadline = None if request.patience_ns is None else self.now + request.patience_ns
        who = self.now, deadline, request.priority, request.tenant, self.now
        watched = self.door and self.unread.watched(self.now)
        if watched and self.unread.judges(deadline, request.priority, self.now) and self.unread.judge(*who):
            number = len(self.stories) + 1
            self.stories[number] = Story(request, number, self.now, "refused unread", self.now)
            self.turned_away[request.name] += 1
            return
        self.unread.saw(sum(request.tokens), request.priority)
        super().on_arrive(request)
        if self.stories[len(self.stories)].outcome.startswith("refused"):
            self.unread.refused(self.now)


def admitted(world, name):
    """Share of a caller's calls."""
    stories = world.named(name)
    return sum(not story.outcome.startswith("refused") for story in stories) / len(stories)


def both(requests, policies=throughput, patience_ns=None):
    """The same story without and with calls that are refused unread."""
    scenario = replace(SCENARIOS["steady"], requests=requests, policies=policies)
    return [Door(3, scenario, checked=False, trace=False, door=door).run() for door in (False, True)]


def flood(small_per_s, callers, patience_ns=None):
    small, large = CALLERS[callers]
    settings, device = SCENARIOS["steady"].settings, SCENARIOS["steady"].device
    per_s = 4 * device.tokens_per_second(settings, 64) / LARGE

    def requests(rng):
        for at in poisson(rng, per_s, 3 * S):
            yield Request(at, (64,) * (LARGE // 64), patience_ns, name="large", **large)
        for at in poisson(rng, small_per_s, 3 * S):
            yield Request(at, (10,), patience_ns, name="small", **small)

    return requests


class TestFlood:
    @pytest.mark.parametrize("callers", CALLERS)
    @pytest.mark.parametrize("patience_ns", [None, 200 * MS])
    def test_a_caller_of_small_texts_is_admitted_as_often_as_without(self, callers, patience_ns):
        without, unread = both(flood(40, callers, patience_ns))

        assert admitted(unread, "small") >= admitted(without, "small") - 0.02
        assert admitted(unread, "large") == pytest.approx(admitted(without, "large"), abs=0.02)
        assert unread.turned_away["small"] <= 0.02 * len(unread.named("small"))

    def test_also_where_the_limit_is_on_what_is_in_flight(self):
        without, unread = both(flood(40, "tenants"), lambda: [GradientPolicy(GradientSettings())])

        assert admitted(unread, "small") >= admitted(without, "small") - 0.05

    def test_the_flood_is_turned_away_unread_beside_another_class(self):
        _, unread = both(flood(40, "classes"))

        assert unread.turned_away["large"] > 0.9 * sum(s.outcome.startswith("refused") for s in unread.named("large"))
        assert not unread.turned_away["small"]


class TestOneSize:
    def test_nearly_all_that_are_refused_are_refused_unread(self):
        def requests(rng):
            for at in poisson(rng, 11_600, 1 * S):
                yield Request(at, (29,))

        without, unread = both(requests)

        assert admitted(unread, "") == pytest.approx(admitted(without, ""), abs=0.01)
        assert unread.turned_away[""] > 0.95 * sum(s.outcome.startswith("refused") for s in unread.stories.values())


class TestManySizes:
    def test_nobody_is_served_less_for_it(self):
        """Neither the short nor the long, nor the device."""

        def requests(rng):
            for at in poisson(rng, 11_600, 1 * S):
                tokens = length(rng)
                yield Request(at, (tokens,), name="short" if tokens <= 10 else "long")

        without, unread = both(requests)

        for name in ("short", "long"):
            assert admitted(unread, name) >= admitted(without, name) - 0.01
        assert sum(unread.tokens_done.values()) >= 0.99 * sum(without.tokens_done.values())
        assert sum(unread.turned_away.values()) > 0
