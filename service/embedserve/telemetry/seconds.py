"""The last minutes, second by second: counts and busy times in a ring that never grows.

Decides how the past is cut into stretches. Must never know what is counted or why. A second without events costs
nothing: its slot still holds an older one and is passed over. Event loop only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Final

__all__ = ["NS", "RECENT_S", "STEP_S", "Seconds", "Slot"]

RECENT_S: Final = 300
"""How far back it reaches: long enough to see how trouble began, short enough to be about now."""
STEP_S: Final = 5
"""Seconds in one point of a history: 60 points are as many as a small picture can show."""
NS: Final = 1_000_000_000


class Slot:
    """What one second had."""

    __slots__ = (
        "batches", "calls", "device_ns", "failed", "mistaken", "reasons", "refused", "second", "texts", "tokenized",
        "tokenizer_ns", "tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self.clear(-1)

    def clear(self, second: int) -> None:
        """Begin ``second``."""
        self.second = second
        self.calls = self.refused = self.failed = self.mistaken = self.texts = 0
        self.batches = self.tokens = self.device_ns = 0
        self.tokenized = self.tokenizer_ns = 0
        self.reasons: dict[tuple[str, str], int] | None = None
        """Refusals by policy and reason; ``None`` while there is none."""


class Seconds:
    """A ring of seconds."""

    def __init__(self, now_ns: int, cpu_clock: Callable[[], int] = time.thread_time_ns) -> None:
        """``cpu_clock`` reads the processor time of the thread that calls."""
        self._cpu_clock = cpu_clock
        self._ring = [Slot() for _ in range(RECENT_S)]
        self.begun_ns = now_ns
        self._current = self._ring[now_ns // NS % RECENT_S]
        self._current.clear(now_ns // NS)
        self._loop: deque[tuple[int, int]] = deque([(now_ns, cpu_clock())], maxlen=RECENT_S)
        """When a second was begun, and the processor time of the loop's thread by then."""

    def at(self, now_ns: int) -> Slot:
        """The second of ``now_ns``."""
        second = now_ns // NS
        if second == self._current.second:
            return self._current
        slot = self._slot(second)
        if slot is None:
            return self._current
        if second > self._current.second:
            self._current = slot
            self._loop.append((now_ns, self._cpu_clock()))
        return slot

    def copy(self) -> Seconds:
        """The same, to add to. Reads the processor time of the same thread."""
        made = Seconds(self.begun_ns, self._cpu_clock)
        made._loop = self._loop
        for slot in self._ring:
            if slot.second >= 0:
                new = made._ring[slot.second % RECENT_S]
                for name in Slot.__slots__:
                    setattr(new, name, getattr(slot, name))
                new.reasons = None if slot.reasons is None else dict(slot.reasons)
        return made

    def add(self, second: int, counts: Mapping[str, int], reasons: Mapping[tuple[str, str], int]) -> None:
        """Add what another process has counted in ``second``, by the names of ``Slot``."""
        slot = self._slot(second)
        if slot is None:
            return
        for name, number in counts.items():
            setattr(slot, name, getattr(slot, name) + number)
        for key, number in reasons.items():
            slot.reasons = slot.reasons or {}
            slot.reasons[key] = slot.reasons.get(key, 0) + number

    def spread(self, field: str, begin_ns: int, end_ns: int) -> None:
        """Add the time from ``begin_ns`` to ``end_ns`` to ``field`` of the seconds that it lies in."""
        last = end_ns // NS
        for second in range(max(begin_ns // NS, last - RECENT_S + 1), last + 1):
            slot = self._slot(second)
            if slot is not None:
                own = min(end_ns, (second + 1) * NS) - max(begin_ns, second * NS)
                setattr(slot, field, getattr(slot, field) + own)

    def last(self, seconds: int, now_ns: int) -> Iterator[Slot]:
        """The seconds of the last ``seconds`` that had events, the current one among them, oldest first."""
        second = now_ns // NS
        for at in range(max(second - seconds + 1, 0), second + 1):
            slot = self._ring[at % RECENT_S]
            if slot.second == at:
                yield slot

    def length_s(self, seconds: int, now_ns: int) -> float:
        """How long the last ``seconds`` are: the current one has only begun, and the process may be younger."""
        begin_ns = max((now_ns // NS - seconds + 1) * NS, self.begun_ns)
        return max((now_ns - begin_ns) / NS, 0.5)

    def loop_share(self, seconds: int, now_ns: int) -> float:
        """Share of the last ``seconds`` in which the event loop's thread had a processor."""
        oldest_ns = now_ns - seconds * NS
        at_ns, cpu_ns = next((mark for mark in self._loop if mark[0] >= oldest_ns), self._loop[-1])
        if now_ns - at_ns < NS // 2 and len(self._loop) > 1:  # too short a while to say anything
            at_ns, cpu_ns = self._loop[-2]
        return min((self._cpu_clock() - cpu_ns) / max(now_ns - at_ns, 1), 1.0)

    def history(
        self, value: Callable[[Slot], float], now_ns: int, more: Mapping[int, float] = MappingProxyType({})
    ) -> list[float | None]:
        """``value`` a second, for each ``STEP_S``; ``None`` before the process began.

        ``more`` has what is to be added to single seconds, for what goes on and is not told yet.
        """
        by_second = {slot.second: value(slot) for slot in self.last(RECENT_S, now_ns)}
        for second, extra in more.items():
            by_second[second] = by_second.get(second, 0.0) + extra
        return self._steps(by_second, now_ns)

    def loop_history(self, now_ns: int) -> list[float | None]:
        """``loop_share`` of each ``STEP_S``."""
        share: dict[int, float] = {}
        marks = [*self._loop, (now_ns, self._cpu_clock())]
        for (at_ns, cpu_ns), (then_ns, then_cpu_ns) in pairwise(marks):
            if then_ns > at_ns:
                part = (then_cpu_ns - cpu_ns) / (then_ns - at_ns)
                for second in range(max(at_ns // NS, now_ns // NS - RECENT_S), then_ns // NS + 1):
                    own = min(then_ns, (second + 1) * NS) - max(at_ns, second * NS)
                    share[second] = share.get(second, 0.0) + part * own / NS
        return [None if point is None else min(point, 1.0) for point in self._steps(share, now_ns)]

    def _steps(self, by_second: dict[int, float], now_ns: int) -> list[float | None]:
        last, begun = now_ns // NS // STEP_S, self.begun_ns // NS // STEP_S
        found: list[float | None] = []
        for step in range(last - RECENT_S // STEP_S + 1, last + 1):
            if step < begun:
                found.append(None)
                continue
            begin_ns = max(step * STEP_S * NS, self.begun_ns)
            length_s = (min((step + 1) * STEP_S * NS, now_ns) - begin_ns) / NS
            total = sum(by_second.get(second, 0.0) for second in range(step * STEP_S, (step + 1) * STEP_S))
            found.append(total / max(length_s, 0.5))
        return found

    def _slot(self, second: int) -> Slot | None:
        """The slot of ``second``, emptied if it held an older one; ``None`` where it holds a later one."""
        slot = self._ring[second % RECENT_S]
        if slot.second < second:
            slot.clear(second)
        return slot if slot.second == second else None
