"""Calls that are over: those worth a look, and durations to take quantiles of.

Decides which calls are kept, in lists and samples that never grow. Must never know texts: what is kept of a call are
numbers and names. Event loop only.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from random import Random
from typing import Final, NamedTuple

from embedserve.engine.stages import Stages
from embedserve.snapshot import Bucket, Ended, Latency, Stage
from embedserve.telemetry.segments import segments

__all__ = ["STAGES", "WINDOW_S", "EndedCall", "Samples", "Slowest", "latency_of", "longest_stage"]

NS: Final = 1_000_000_000
WINDOW_S: Final = 60
"""Calls that latencies are taken of: as far back as one still says "now"."""
STAGES: Final = ("receive", "validate", "admit", "tokenize", "queue", "assemble", "forward", "respond")
"""Of a unary call, in order; ``receive`` is the caller's upload, and both admissions are one."""
_PLACE: Final = {name: place for place, name in enumerate(STAGES)} | {"admit_exact": STAGES.index("admit")}
KEPT_A_SECOND: Final = 16
"""Calls of a second whose stages are kept, chosen by chance: 960 in all, of which the P99 leaves nine."""
KEPT_A_BUCKET: Final = 4
"""More of each bucket, so that a rare length is seen too: 240 in all, of which the P95 leaves twelve."""
SLOWEST: Final = 8
"""In each list of slow calls: what fits on a screen beside the rest."""
MINUTES: Final = 5


class EndedCall(NamedTuple):
    """What is kept of a call."""

    at_ns: int
    method: str
    status: str
    reason: str | None
    policy: str | None
    tenant: str | None
    texts: int | None
    tokens: int | None
    duration_ns: int
    longest: tuple[str, int] | None
    trace_id: str | None
    process: str = ""
    """Which of several processes took it."""

    def shown(self, offset_ns: int) -> Ended:
        """On the wall clock, which is ``offset_ns`` ahead of the monotonic one."""
        name, length_ns = self.longest if self.longest is not None else (None, None)
        return Ended(
            (self.at_ns + offset_ns) / NS, self.method, self.status, self.reason, self.policy, self.tenant, self.texts,
            self.tokens, self.duration_ns / NS, name, None if length_ns is None else length_ns / NS, self.trace_id,
            self.process,
        )  # fmt: skip


def longest_stage(stages: Stages, ended_ns: int, *, answered: bool) -> tuple[str, int]:
    """The stage that took most of a call, and how long it took."""
    name, begin_ns, end_ns = max(segments(stages, ended_ns, answered=answered), key=lambda part: part[2] - part[1])
    return STAGES[_PLACE[name]], end_ns - begin_ns


class _Second:
    """Samples of one second."""

    __slots__ = ("by_bucket", "calls", "second", "seen")

    def __init__(self, second: int) -> None:
        self.second = second
        self.seen = 0
        self.calls: list[tuple[int, ...]] = []
        """The stages' durations in order, and then the whole."""
        self.by_bucket: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
        """How many there were of each bucket; wait and whole of some."""


class Samples:
    """Durations of answered unary calls of the last ``WINDOW_S``: reservoirs, so that any load costs the same."""

    def __init__(self) -> None:
        self._seconds: deque[_Second] = deque(maxlen=WINDOW_S)
        # No secret, and not I10's either: nothing is decided by what is shown.
        self._random = Random(0).random  # noqa: S311

    def add(self, stages: Stages, arrived_ns: int, now_ns: int) -> None:
        """A call was answered at ``now_ns`` that had come at ``arrived_ns``."""
        second = now_ns // NS
        if not self._seconds or self._seconds[-1].second < second:
            self._seconds.append(_Second(second))
        current = self._seconds[-1]
        current.seen += 1
        place = self._place(current.seen, KEPT_A_SECOND)
        if place >= 0:
            _keep(current.calls, place, _durations(stages, arrived_ns, now_ns))
        counted = current.by_bucket.get(stages.bucket)
        if counted is None:
            counted = current.by_bucket[stages.bucket] = ([0], [])
        counted[0][0] += 1
        place = self._place(counted[0][0], KEPT_A_BUCKET)
        if place >= 0:
            wait_ns = max(0, stages.dequeued_ns - stages.queued_ns)
            _keep(counted[1], place, (wait_ns, now_ns - arrived_ns))

    def rows(self, now_ns: int) -> list[tuple[int, list[tuple[int, ...]], list[tuple[int, list[tuple[int, int]]]]]]:
        """All that is kept: second, calls, and pairs of each bucket. For ``extend`` in another process."""
        return [
            (second.second, second.calls, [(bucket, pairs) for bucket, (_, pairs) in second.by_bucket.items()])
            for second in self._recent(now_ns)
        ]

    def extend(
        self, rows: Iterable[tuple[int, Sequence[Sequence[int]], Sequence[tuple[int, Sequence[Sequence[int]]]]]]
    ) -> None:
        """Keep ``rows`` of other processes too, all of them: there are as many reservoirs as processes."""
        by_second = {second.second: second for second in self._seconds}
        for number, calls, by_bucket in rows:
            second = by_second.setdefault(number, _Second(number))
            second.calls += map(tuple, calls)
            for bucket, pairs in by_bucket:
                second.by_bucket.setdefault(bucket, ([0], []))[1].extend((wait, whole) for wait, whole in pairs)
        self._seconds = deque((by_second[number] for number in sorted(by_second)), maxlen=WINDOW_S)

    def stages(self, now_ns: int) -> tuple[Latency, tuple[Stage, ...]]:
        """Of the whole calls, and of each stage."""
        rows = [row for second in self._recent(now_ns) for row in second.calls]
        columns = list(zip(*rows, strict=True)) if rows else [()] * (len(STAGES) + 1)
        whole = latency_of(columns[-1])
        return whole, tuple(Stage(name, latency_of(column)) for name, column in zip(STAGES, columns, strict=False))

    def buckets(
        self, edges: Iterable[int], now_ns: int, waiting: Mapping[int, tuple[int, int, float]]
    ) -> tuple[Bucket, ...]:
        """Each of ``edges``; ``waiting`` has items, tokens and the oldest one's age of each."""
        edges = tuple(edges)
        pairs: dict[int, list[tuple[int, int]]] = {edge: [] for edge in edges}
        for second in self._recent(now_ns):
            for bucket, (_, kept) in second.by_bucket.items():
                if bucket in pairs:
                    pairs[bucket] += kept
        return tuple(
            Bucket(
                edge, *waiting.get(edge, (0, 0, 0.0)),
                latency_of([pair[0] for pair in kept]), latency_of([pair[1] for pair in kept]),
            )
            for edge, kept in pairs.items()
        )  # fmt: skip

    def _recent(self, now_ns: int) -> list[_Second]:
        oldest = now_ns // NS - WINDOW_S
        return [second for second in self._seconds if second.second > oldest]

    def _place(self, seen: int, most: int) -> int:
        """Where the ``seen``-th goes in a reservoir of ``most`` (Algorithm R, Vitter 1985); -1 for nowhere."""
        if seen <= most:
            return seen - 1
        place = int(self._random() * seen)
        return place if place < most else -1


def _keep(kept: list, place: int, sample: tuple[int, ...]) -> None:  # type: ignore[type-arg]
    if place == len(kept):
        kept.append(sample)
    else:
        kept[place] = sample


def _durations(stages: Stages, arrived_ns: int, now_ns: int) -> tuple[int, ...]:
    found = [0] * len(STAGES)
    found[0] = max(0, stages.arrived_ns - arrived_ns)
    for name, begin_ns, end_ns in segments(stages, now_ns, answered=True):
        found[_PLACE[name]] += end_ns - begin_ns
    return (*found, now_ns - arrived_ns)


def latency_of(durations_ns: Iterable[int]) -> Latency:
    """Quantiles, each the smallest sample that so many are not above."""
    ordered = sorted(durations_ns)
    if not ordered:
        return Latency(0)
    last = len(ordered) - 1
    p50, p95, p99 = (ordered[min(int(q * len(ordered)), last)] / NS for q in (0.5, 0.95, 0.99))
    return Latency(len(ordered), p50, p95, p99)


class Slowest:
    """The slowest calls of each of the last minutes."""

    def __init__(self) -> None:
        self._minutes: deque[tuple[int, list[tuple[int, int, EndedCall]]]] = deque(maxlen=MINUTES)
        self._added = 0

    def beats(self, duration_ns: int, now_ns: int) -> bool:
        """Whether a call that took so long would be kept. Asked of every call, so that most cost nothing more."""
        if not self._minutes or self._minutes[-1][0] != now_ns // (60 * NS):
            return True
        kept = self._minutes[-1][1]
        return len(kept) < SLOWEST or duration_ns > kept[0][0]

    def add(self, call: EndedCall) -> None:
        """Keep ``call``, which ``beats`` has said yes to."""
        minute = call.at_ns // (60 * NS)
        if not self._minutes or self._minutes[-1][0] != minute:
            self._minutes.append((minute, []))
        kept = self._minutes[-1][1]
        self._added += 1  # calls that took equally long are told apart
        entry = (call.duration_ns, self._added, call)
        if len(kept) < SLOWEST:
            heapq.heappush(kept, entry)
        else:
            heapq.heapreplace(kept, entry)

    def top(self, now_ns: int) -> list[EndedCall]:
        """The slowest of those that ended in the last minutes, slowest first."""
        oldest_ns = now_ns - MINUTES * 60 * NS
        calls = (call for _, kept in self._minutes for _, _, call in kept if call.at_ns >= oldest_ns)
        return heapq.nlargest(SLOWEST, calls, key=itemgetter(EndedCall._fields.index("duration_ns")))
