"""Who is refused unread: nobody before a refusal, nobody for longer than a moment after it, and nobody who has room."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from embedserve.engine.observer import SilentObserver
from embedserve.engine.stages import Stages
from embedserve.engine.unread import WATCH_NS, UnreadAdmission
from embedserve.scheduling.item import Admitted, Priority, Rejection
from embedserve.scheduling.scheduler import Scheduler
from tests.unit.scheduling.making import MS, S, small_scheduler, submission

LIMIT = 1_000
"""Tokens that the queue of these schedulers takes."""


class Told(SilentObserver):
    """Keeps what it is told of requests."""

    def __init__(self) -> None:
        self.rejected_: list[tuple[Rejection, str]] = []
        self.finished: list[tuple[Stages, str]] = []

    def rejected(self, rejection: Rejection, *, stage: str) -> None:
        self.rejected_.append((rejection, stage))

    def request_finished(self, stages: Stages, *, verdict: str) -> None:
        self.finished.append((stages, verdict))


class Asked:
    """Stands for a scheduler: what it is asked, and that it refuses all or nobody."""

    max_batch_tokens = 64

    def __init__(self, rejection: Rejection | None = None) -> None:
        self.rejection = rejection
        self.questions: list[tuple[int, int, dict[str, Any]]] = []

    def judge(self, tokens: int, items: int, **how: Any) -> Rejection | None:
        self.questions.append((tokens, items, how))
        return self.rejection


def over(scheduler: Any, told: SilentObserver | None = None, *, takes: bool = True) -> UnreadAdmission:
    return UnreadAdmission(scheduler, told or SilentObserver(), lambda: takes)


def judge(unread: UnreadAdmission, now_ns: int = 0, deadline_ns: int | None = None, **caller: Any) -> Rejection | None:
    who = {"priority": Priority.DEFAULT, "tenant": ""} | caller
    if not unread.judges(deadline_ns, who["priority"], now_ns):
        return None
    return unread.judge(now_ns, deadline_ns, who["priority"], who["tenant"], now_ns)


def guess_after(sizes: list[int]) -> int:
    """What a call is taken for after calls of ``sizes``."""
    scheduler = Asked()
    scheduler.max_batch_tokens = 1 << 30
    unread = over(scheduler)
    for size in sizes:
        unread.saw(size, Priority.DEFAULT)
    judge(unread)
    ((tokens, items, _),) = scheduler.questions
    assert items == 1
    return tokens


def filled(tokens: int) -> Scheduler:
    """A scheduler whose queue has so many tokens in it."""
    scheduler = small_scheduler(max_queue_tokens=LIMIT)
    rest, number = tokens, 0
    while rest:
        number += 1
        taken = scheduler.submit(submission(number, min(rest, 32)), 0)
        assert isinstance(taken, Admitted)
        rest -= min(rest, 32)
    return scheduler


FULL = Rejection("queue", "QUEUE_FULL", 100)


class TestWatch:
    """Calls are judged unread for ``WATCH_NS`` after a refusal, and at no other time."""

    def test_not_before_a_refusal(self) -> None:
        unread = over(Asked())
        unread.saw(10, Priority.DEFAULT)

        assert not any(unread.watched(now) for now in (0, 1, MS, S, 10**18))

    def test_so_long_after_one(self) -> None:
        unread = over(Asked())
        unread.refused(5 * S)

        assert unread.watched(5 * S)
        assert unread.watched(5 * S + WATCH_NS - 1)
        assert not unread.watched(5 * S + WATCH_NS)

    def test_a_refusal_of_its_own_goes_on_with_it(self) -> None:
        unread = over(Asked(FULL))
        unread.saw(10, Priority.DEFAULT)
        unread.refused(0)
        assert judge(unread, WATCH_NS - 1) is FULL

        assert unread.watched(2 * WATCH_NS - 2)
        assert not unread.watched(2 * WATCH_NS - 1)

    def test_a_call_with_room_does_not(self) -> None:
        """So that it ends when the overload does, however many calls come."""
        unread = over(Asked())
        unread.saw(10, Priority.DEFAULT)
        unread.refused(0)
        for now in range(0, WATCH_NS, 10 * MS):
            assert judge(unread, now) is None

        assert not unread.watched(WATCH_NS)


class TestGuess:
    """A call is taken for as small as callers send, and for one text."""

    @pytest.mark.parametrize("size", [1, 2, 12, 60, 512, 16_384])
    def test_of_calls_of_one_size_it_is_that_size(self, size: int) -> None:
        """Within 5 % under it, and never over it: a call that just fits is not refused unread."""
        for calls in (1, 2, 10, 300, 1_000):
            assert 0.95 * size - 1 < guess_after([size] * calls) <= size

    @pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
    def test_of_a_mixture_it_is_near_the_small_ones(self, share: float) -> None:
        rng = Random(7)
        sizes = [10 if rng.random() < share else 512 for _ in range(3_000)]

        assert 10 <= guess_after(sizes) <= 80

    def test_one_odd_call_is_forgotten(self) -> None:
        assert guess_after([512] * 100 + [1] + [512] * 2_000) == pytest.approx(512, rel=0.05)

    def test_it_follows_callers_who_send_less(self) -> None:
        assert guess_after([512] * 1_000 + [10] * 100) == 10

    def test_each_class_has_its_own(self) -> None:
        """Single questions beside bulk jobs, which are a flood."""
        scheduler = Asked()
        unread = over(scheduler)
        for _ in range(1_000):
            unread.saw(60, Priority.BULK)
        unread.saw(5, Priority.INTERACTIVE)
        for priority in Priority:
            judge(unread, priority=priority)

        assert [(how["priority"], tokens) for tokens, _, how in scheduler.questions] == [
            (Priority.INTERACTIVE, 5),
            (Priority.BULK, 60),
        ]

    def test_it_is_a_token_at_least(self) -> None:
        assert guess_after([0] * 50) == 1

    def test_it_is_a_full_pass_at_most(self) -> None:
        """A run of huge calls must not make one that is too large of everybody."""
        scheduler = Asked()
        unread = over(scheduler)
        for _ in range(100):
            unread.saw(1_000_000, Priority.DEFAULT)
        judge(unread)

        assert scheduler.questions[0][0] == scheduler.max_batch_tokens


class TestVerdict:
    """What the scheduler would say of such a call now, and nothing else."""

    @pytest.mark.parametrize("free", [0, 7, 8, 9, 40])
    def test_who_has_room_is_read(self, free: int) -> None:
        """Refused exactly where a call of the guess would be."""
        unread = over(filled(LIMIT - free))
        unread.saw(8, Priority.DEFAULT)

        assert (judge(unread) is None) is (free >= 8)

    def test_an_idle_server_reads_everybody(self) -> None:
        unread = over(small_scheduler())
        unread.saw(64, Priority.DEFAULT)
        unread.refused(0)

        assert judge(unread) is None

    def test_each_call_is_judged_by_its_own_caller_and_deadline(self) -> None:
        scheduler = Asked()
        unread = over(scheduler)
        unread.saw(8, Priority.BULK)
        judge(unread, 5, 77, priority=Priority.BULK, tenant="blue")

        ((_, _, how),) = scheduler.questions
        assert how == {"deadline_ns": 77, "priority": Priority.BULK, "tenant": "blue", "now_ns": 5, "unread": True}

    def test_a_modest_tenant_is_read_where_a_greedy_one_is_refused(self) -> None:
        """By the fair order: the greedy one's backlog is not before the modest one."""
        scheduler = small_scheduler(initial_batch_ns=0, initial_token_ns=MS)
        for number in range(1, 21):
            scheduler.submit(submission(number, 32, tenant="greedy"), 0)
        unread = over(scheduler)
        unread.saw(8, Priority.DEFAULT)

        greedy = judge(unread, 0, 300 * MS, tenant="greedy")
        assert greedy is not None
        assert greedy.policy == "deadline"
        assert judge(unread, 0, 300 * MS, tenant="modest") is None

    def test_nothing_is_taken(self) -> None:
        scheduler = filled(LIMIT - 40)
        before = scheduler.figures(0)
        unread = over(scheduler)
        unread.saw(8, Priority.DEFAULT)
        judge(unread)

        assert scheduler.figures(0) == before


class TestLetThrough:
    """The long way says what is wrong where it is not the load."""

    def test_before_a_call_was_seen(self) -> None:
        scheduler = Asked(FULL)
        unread = over(scheduler)
        unread.refused(0)

        assert judge(unread) is None
        assert not scheduler.questions

    @pytest.mark.parametrize("deadline_ns", [0, 9, 10])
    def test_a_deadline_that_has_passed(self, deadline_ns: int) -> None:
        """It ends as DEADLINE_EXCEEDED, not as a refusal."""
        unread = over(Asked(FULL))
        unread.saw(8, Priority.DEFAULT)

        assert judge(unread, 10, deadline_ns) is None
        assert judge(unread, 10, 11) is FULL

    def test_an_engine_that_takes_nothing(self) -> None:
        """Draining, stalled or with all requests in flight that it may have."""
        told = Told()
        unread = over(Asked(FULL), told, takes=False)
        unread.saw(8, Priority.DEFAULT)

        assert judge(unread) is None
        assert not told.rejected_

    def test_a_scheduler_that_drains_or_has_failed(self) -> None:
        told = Told()
        for stop in (lambda s: s.drain(), lambda s: s.fail("device lost")):
            scheduler = small_scheduler()
            stop(scheduler)
            unread = over(scheduler, told)
            unread.saw(8, Priority.DEFAULT)
            assert judge(unread) is None

        assert not told.rejected_
        assert not told.finished


class TestTelling:
    """A refusal is told once, as unread; a call that is let through is told by who reads it."""

    def test_a_refusal(self) -> None:
        told = Told()
        unread = over(Asked(FULL), told)
        unread.saw(8, Priority.DEFAULT)
        unread.judge(3, None, Priority.DEFAULT, "", 7)

        assert told.rejected_ == [(FULL, "unread")]
        ((stages, verdict),) = told.finished
        assert (stages.arrived_ns, verdict) == (3, "rejected")

    def test_a_call_that_is_let_through(self) -> None:
        told = Told()
        unread = over(Asked(), told)
        unread.saw(8, Priority.DEFAULT)
        judge(unread)

        assert not told.rejected_
        assert not told.finished
