"""What several processes remember of their calls is shown as if one had taken all of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from embedserve.engine.stages import Stages
from embedserve.telemetry.ended_calls import SLOWEST, WINDOW_S
from embedserve.telemetry.memory import merge_memories, pack_memory
from embedserve.telemetry.recent import NOW_S, RING, UNARY, Recent
from embedserve.telemetry.seconds import NS, RECENT_S

MS = 1_000_000
START_NS = 1_000 * NS
REFUSED = {"policy": "queue", "tenant": "search", "texts": 3}


@dataclass
class Time:
    """A clock that is set."""

    now: int = START_NS

    def __call__(self) -> int:
        return self.now


def answered(recent: Recent, time: Time, took_ms: int, *, bucket: int = 16, trace: str | None = None) -> None:
    """A unary call that ends now, of which all but a millisecond was the pass."""
    begun = time.now - took_ms * MS
    marks = [begun + n * MS // 8 for n in range(1, 7)]
    stages = Stages(begun, *marks, time.now, texts=2, tokens=20, bucket=bucket)
    recent.call_ended(time.now, UNARY, begun, "OK", stages, None, {}, trace)


def refused(recent: Recent, time: Time, reason: str = "QUEUE_FULL", trace: str | None = None) -> None:
    recent.call_ended(time.now, UNARY, time.now - MS, "RESOURCE_EXHAUSTED", None, reason, REFUSED, trace)


def failed(recent: Recent, time: Time) -> None:
    recent.call_ended(time.now, UNARY, time.now - MS, "INTERNAL", None, "EngineFailed", {}, None)


Event = Callable[[Recent, Time], None]


def story(seed: int) -> list[tuple[int, int, Event]]:
    """When (ns after the start), to which of two processes, and what: four calls a second, so that all are samples."""
    rng = random.Random(seed)
    lengths = rng.sample(range(8, 400), 240)  # no two calls take equally long
    events: list[tuple[int, int, Event]] = []
    for number in range(240):
        at, which = int(number * 0.25 * NS), rng.randrange(2)
        match rng.randrange(6):
            case 0:
                events.append((at, which, refused))
            case 1:
                events.append((at, which, failed))
            case _:
                took, bucket = lengths[number], rng.choice([16, 64])
                trace = f"{number:032x}" if rng.random() < 0.2 else None
                events.append(
                    (at, which, lambda r, t, a=took, b=bucket, c=trace: answered(r, t, a, bucket=b, trace=c))  # type: ignore[misc]
                )
    return events


@pytest.fixture(params=range(3))
def told(request: pytest.FixtureRequest) -> tuple[Recent, Recent, Time]:
    """One process that took all calls, and what two that shared them have told a third."""
    time = Time()
    whole, engine, *two = (Recent(2, time) for _ in range(4))
    for at, which, event in story(request.param):
        time.now = START_NS + at
        event(whole, time)
        event(two[which], time)
    memories = [(f"frontend-{n}", pack_memory(recent, n + 1)) for n, recent in enumerate(two)]
    merged = merge_memories(engine, memories)
    assert merged.tokenizer_pending == 3
    assert [loop.process for loop in merged.loops] == ["frontend-0", "frontend-1"]
    return whole, merged.recent, time


class TestMerged:
    def test_rates_and_histories_are_those_of_one(self, told: tuple[Recent, Recent, Time]) -> None:
        whole, merged, time = told
        for name in ("calls", "texts", "refused", "failed", "mistaken"):
            for seconds in (NOW_S, RECENT_S):
                counts = [
                    {slot.second: getattr(slot, name) for slot in recent.seconds.last(seconds, time.now)}
                    for recent in (whole, merged)
                ]
                assert counts[0] == counts[1]
                assert name == "mistaken" or sum(counts[0].values())
            histories = [
                recent.seconds.history(lambda slot, name=name: getattr(slot, name), time.now)  # type: ignore[misc]
                for recent in (whole, merged)
            ]
            assert histories[0] == histories[1]
        assert (merged.by_status, merged.in_flight) == (whole.by_status, 0)

    def test_latencies_are_of_all_samples(self, told: tuple[Recent, Recent, Time]) -> None:
        """Few calls a second, so that every one is a sample."""
        whole, merged, time = told
        assert merged.samples.stages(time.now) == whole.samples.stages(time.now)
        buckets = [recent.samples.buckets((16, 64), time.now, {}) for recent in (whole, merged)]
        assert buckets[0] == buckets[1]
        assert buckets[0][0].total.count > 10

    def test_the_calls_that_are_kept_are_the_same_and_say_who_took_them(
        self, told: tuple[Recent, Recent, Time]
    ) -> None:
        whole, merged, time = told
        for kept, one in (
            (merged.slowest.top(time.now), whole.slowest.top(time.now)),
            (merged.slowest_traced.top(time.now), whole.slowest_traced.top(time.now)),
            (list(merged.failed), list(whole.failed)),
            (merged.refused(), whole.refused()),
        ):
            assert kept
            assert {call.process for call in kept} == {"frontend-0", "frontend-1"}
            assert [call._replace(process="") for call in kept] == one

    def test_reasons_are_counted_together_and_trouble_is_as_old_as_its_first_sign(
        self, told: tuple[Recent, Recent, Time]
    ) -> None:
        whole, merged, time = told
        assert merged.refusals(time.now, 0) == whole.refusals(time.now, 0)
        assert merged.shedding.since(time.now) == whole.shedding.since(time.now) is not None
        assert merged.failing.since(time.now) == whole.failing.since(time.now) is not None


class TestBounds:
    def test_what_crosses_and_what_is_kept_do_not_grow_with_the_load(self) -> None:
        time = Time()
        recents = [Recent(2, time) for _ in range(3)]
        for number in range(4_000):
            time.now += 70 * MS
            for recent in recents:
                answered(recent, time, 8 + number % 100, trace=f"{number:032x}")
                refused(recent, time, f"REASON_{number % 100}")
                failed(recent, time)
        packed = [(f"frontend-{n}", pack_memory(recent, 0)) for n, recent in enumerate(recents)]
        assert max(len(body) for _, body in packed) < 400_000
        merged = merge_memories(Recent(1, time), packed).recent
        assert len(merged.failed) == RING
        assert len(merged.slowest.top(time.now)) == SLOWEST
        assert len(merged.refused()) == 2 * RING
        assert len(merged.samples.rows(time.now)) <= WINDOW_S

    def test_a_process_that_says_nothing_leaves_the_others(self) -> None:
        time = Time()
        recent = Recent(2, time)
        answered(recent, time, 50)
        merged = merge_memories(Recent(1, time), [("frontend-0", pack_memory(recent, 0)), ("frontend-1", b"")])
        assert merged.recent.by_status == {"OK": 1}
        assert [loop.process for loop in merged.loops] == ["frontend-0"]
