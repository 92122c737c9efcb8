"""The watchdog: a stall is told within its limit, ends by itself, and a process that was stopped is given a chance."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import pytest

from embedserve.engine.watchdog import StallLimits, Watchdog
from embedserve.testing import ManualClock

MS = 1_000_000
LIMITS = StallLimits(stall_ns=5000 * MS, hang_ns=60_000 * MS)


class Handle:
    """One timer."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """Timers over a clock that is moved by hand. ``freeze`` is SIGSTOP: time goes on and nothing runs."""

    def __init__(self) -> None:
        self.clock = ManualClock(1_000 * MS)
        self._timers: list[tuple[int, int, Handle]] = []
        self._order = itertools.count()
        self.events: list[tuple[str, int]] = []
        self.fired = 0
        self.dog = Watchdog(
            LIMITS,
            call_later=self.call_later,
            on_stall=lambda age: self.events.append(("stall", age // MS)),
            on_recovery=lambda lasted: self.events.append(("recovery", lasted // MS)),
            on_hang=lambda age: self.events.append(("hang", age // MS)),
            clock=self.clock,
        )

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Handle:
        handle = Handle(callback)
        heapq.heappush(self._timers, (self.clock() + round(delay_s * 1e9), next(self._order), handle))
        return handle

    @property
    def timers(self) -> int:
        return sum(not handle.cancelled for _, _, handle in self._timers)

    def run(self, ms: int) -> None:
        """Let time pass, every timer on its instant."""
        ends = self.clock() + ms * MS
        while self._timers and self._timers[0][0] <= ends:
            self.clock.advance(ns=max(0, self._timers[0][0] - self.clock()))
            self._fire()
        self.clock.advance(ns=ends - self.clock())

    def freeze(self, ms: int) -> None:
        """Let time pass while nothing runs; then what is due fires, first of all."""
        self.clock.advance(ms=ms)
        while self._timers and self._timers[0][0] <= self.clock():
            self._fire()

    def _fire(self) -> None:
        _, _, handle = heapq.heappop(self._timers)
        if not handle.cancelled:
            self.fired += 1
            handle.callback()


@pytest.fixture
def loop() -> Loop:
    return Loop()


class TestStall:
    """A pass that runs longer than the limit is told once, when the limit is reached."""

    def test_nothing_is_told_before_the_limit_and_the_stall_at_it(self, loop: Loop) -> None:
        loop.dog.begun(loop.clock(), 5 * MS)
        loop.run(4999)
        before = list(loop.events)
        loop.run(1)

        assert before == []
        assert loop.events == [("stall", 5000)]
        assert loop.dog.stalled

    def test_it_ends_by_itself_when_the_pass_ends(self, loop: Loop) -> None:
        loop.dog.begun(loop.clock(), 5 * MS)
        loop.run(7000)
        loop.dog.ended(loop.clock())

        assert loop.events == [("stall", 5000), ("recovery", 2000)]
        assert not loop.dog.stalled

    def test_the_clock_of_a_prepared_pass_begins_when_the_one_before_ends(self, loop: Loop) -> None:
        loop.dog.begun(loop.clock(), 5 * MS)
        loop.run(4000)
        loop.dog.ended(loop.clock())
        loop.dog.begun(loop.clock(), 5 * MS)
        loop.run(4000)

        assert loop.events == []

    def test_a_pass_that_is_predicted_to_be_slow_gets_four_times_its_prediction(self, loop: Loop) -> None:
        loop.dog.begun(loop.clock(), 3000 * MS)
        loop.run(11_999)
        before = list(loop.events)
        loop.run(1)

        assert before == []
        assert loop.events == [("stall", 12_000)]

    def test_work_that_never_reached_the_device_is_a_stall_at_once(self, loop: Loop) -> None:
        since = loop.clock()
        loop.run(5000)
        loop.dog.overdue(since)
        loop.run(54_999)
        before = list(loop.events)
        loop.run(1)

        assert before == [("stall", 5000)]
        assert loop.events[1:] == [("hang", 60_000)]

    def test_the_age_of_the_running_pass_can_be_read(self, loop: Loop) -> None:
        loop.dog.begun(loop.clock(), 0)
        loop.run(30)
        age = loop.dog.age_ns(loop.clock())
        loop.dog.ended(loop.clock())

        assert (age, loop.dog.age_ns(loop.clock())) == (30 * MS, 0)


class TestHang:
    """A pass that never ends is a broken device."""

    def test_it_is_told_once_at_its_limit(self, loop: Loop) -> None:
        loop.dog.begun(loop.clock(), 5 * MS)
        loop.run(59_999)
        before = list(loop.events)
        loop.run(100_000)

        assert before == [("stall", 5000)]
        assert loop.events == [("stall", 5000), ("hang", 60_000)]


class TestStoppedProcess:
    """The monotonic clock goes on while a process is stopped; its passes do not."""

    @pytest.mark.parametrize("run_before_ms", [0, 10, 1300, 4900])
    def test_a_pass_that_was_stopped_with_the_process_is_no_stall(self, loop: Loop, run_before_ms: int) -> None:
        loop.dog.begun(loop.clock(), 5 * MS)
        loop.run(run_before_ms)
        loop.freeze(120_000)
        loop.run(5)
        loop.dog.ended(loop.clock())

        assert loop.events == []

    def test_a_pass_that_does_not_go_on_afterwards_is_a_stall_within_the_limit(self, loop: Loop) -> None:
        loop.dog.begun(loop.clock(), 5 * MS)
        loop.run(10)
        loop.freeze(20_000)
        loop.run(5000)

        assert loop.events == [("stall", 5000)]

    def test_a_stall_is_not_taken_for_a_hang_for_the_time_that_it_was_stopped(self, loop: Loop) -> None:
        loop.dog.begun(loop.clock(), 5 * MS)
        loop.run(6000)
        loop.freeze(100_000)
        loop.run(5)
        loop.dog.ended(loop.clock())

        assert [event for event, _ in loop.events] == ["stall", "recovery"]


class TestCost:
    """An idle process has no timer, a busy one sets a handful in the time of a stall."""

    def test_the_timer_ends_when_nothing_runs(self, loop: Loop) -> None:
        loop.dog.begun(loop.clock(), 5 * MS)
        loop.dog.ended(loop.clock())
        loop.run(10_000)

        assert (loop.timers, loop.fired) == (0, 1)

    def test_a_thousand_passes_share_one_timer(self, loop: Loop) -> None:
        for _ in range(1000):
            loop.dog.begun(loop.clock(), 5 * MS)
            loop.run(5)
            loop.dog.ended(loop.clock())

        assert loop.fired <= 5
        assert loop.timers <= 1

    def test_after_stop_nothing_is_told(self, loop: Loop) -> None:
        loop.dog.begun(loop.clock(), 5 * MS)
        loop.dog.stop()
        loop.run(100_000)

        assert loop.events == []
        assert loop.fired == 0
