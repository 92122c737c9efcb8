"""The recent past: what is kept of calls and passes, for how long, and that it never grows."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import pytest

from embedserve.api.observer import CallObserver, SilentCallObserver
from embedserve.engine.observer import EngineObserver, SilentObserver
from embedserve.engine.stages import Stages
from embedserve.snapshot import Latency
from embedserve.telemetry.ended_calls import STAGES, Samples, latency_of, longest_stage
from embedserve.telemetry.recent import ENDED_MAX, RING, RING_REASON, UNARY, Recent
from embedserve.telemetry.seconds import NS, RECENT_S, STEP_S, Seconds
from embedserve.telemetry.watching import RecentCalls, RecentEngine
from tests.unit.telemetry.pipeline import MS, record_of, stages_of

START = 1_000_000 * NS


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recent(clock: Clock) -> Recent:
    return Recent(2, clock)


def call(
    recent: Recent,
    clock: Clock,
    status: str = "OK",
    *,
    took_ns: int = 10 * MS,
    method: str = UNARY,
    reason: str | None = None,
    trace_id: str | None = None,
    stages: Stages | None = None,
    **attributes: str | float,
) -> None:
    """A call that ends now."""
    stages = stages or (stages_of(clock.now - 10 * MS) if status == "OK" else None)
    recent.call_ended(clock.now, method, clock.now - took_ns, status, stages, reason, attributes, trace_id)


class TestSeconds:
    """A ring of seconds: quiet ones cost nothing, old ones are gone, work is spread over those that it lies in."""

    def test_a_quiet_second_is_passed_over_and_an_old_one_is_gone(self) -> None:
        seconds = Seconds(START)
        seconds.at(START).calls = 1
        seconds.at(START + 3 * NS).calls = 2

        assert [slot.calls for slot in seconds.last(10, START + 5 * NS)] == [1, 2]
        assert [slot.calls for slot in seconds.last(10, START + 10 * NS)] == [2]
        assert list(seconds.last(RECENT_S, START + 1000 * NS)) == []

    def test_work_is_spread_over_the_seconds_that_it_lies_in(self) -> None:
        seconds = Seconds(START)
        seconds.spread("device_ns", START + NS // 2, START + 2 * NS + NS // 4)

        assert [slot.device_ns for slot in seconds.last(3, START + 2 * NS)] == [NS // 2, NS, NS // 4]

    def test_work_that_is_longer_than_the_ring_fills_it_once(self) -> None:
        seconds = Seconds(START)
        seconds.spread("device_ns", START, START + 2 * RECENT_S * NS)

        slots = list(seconds.last(RECENT_S, START + 2 * RECENT_S * NS))
        assert sum(slot.device_ns for slot in slots) == (RECENT_S - 1) * NS

    def test_a_history_begins_with_the_process_and_counts_each_step_once(self) -> None:
        seconds = Seconds(START)
        for second in range(12):
            seconds.at(START + second * NS).calls = 10
        history = seconds.history(lambda slot: slot.calls, START + 12 * NS)

        assert len(history) == RECENT_S // STEP_S
        assert history[:-3] == [None] * (len(history) - 3)
        assert history[-3:] == [10.0, 10.0, 10.0]

    def test_the_loops_share_is_its_processor_time_over_time(self) -> None:
        cpu = [0]
        seconds = Seconds(START, lambda: cpu[0])
        for second in range(1, 11):
            cpu[0] = second * NS // 4
            seconds.at(START + second * NS)

        assert seconds.loop_share(10, START + 10 * NS) == pytest.approx(0.25)
        assert seconds.loop_history(START + 10 * NS)[-2:] == pytest.approx([0.25, 0.0], abs=0.3)


class TestSamples:
    """Quantiles of answered calls of the last minute, from a bounded sample."""

    def test_quantiles(self) -> None:
        assert latency_of([]) == Latency(0)
        assert latency_of(range(0, 100 * MS, MS)) == Latency(100, 0.05, 0.095, 0.099)
        assert latency_of([NS]) == Latency(1, 1.0, 1.0, 1.0)

    def test_each_stage_has_its_own_and_all_of_them_add_up(self) -> None:
        samples = Samples()
        samples.add(stages_of(START), START - MS, START + 10 * MS)
        whole, stages = samples.stages(START + NS)

        shown = {stage.name: round((stage.latency.p50_s or 0) * 1000) for stage in stages}
        expected = dict(zip(STAGES, (1, 1, 2, 2, 2, 1, 1, 1), strict=True))
        assert shown == expected
        assert whole.p50_s == pytest.approx(sum(expected.values()) / 1000)

    def test_a_rare_length_is_seen_among_thousands(self) -> None:
        samples = Samples()
        rare = stages_of(START)
        rare.bucket = 512
        for n in range(3000):
            samples.add(stages_of(START), START, START + 10 * MS + n)
        samples.add(rare, START, START + NS // 2)
        short, long = samples.buckets((16, 512), START + NS, {16: (5, 50, 0.25)})

        assert (short.items, short.tokens, short.oldest_s, short.total.count) == (5, 50, 0.25, 4)
        assert (long.items, long.total.count, long.total.p50_s) == (0, 1, 0.5)

    def test_a_minute_later_they_are_gone(self) -> None:
        samples = Samples()
        samples.add(stages_of(START), START, START + 10 * MS)

        assert samples.stages(START + 61 * NS)[0] == Latency(0)

    def test_the_stage_that_took_most_is_named(self) -> None:
        stages = stages_of(START)
        stages.dequeued_ns = START + 900 * MS
        stages.assembled_ns = stages.computed_ns = START + 901 * MS

        assert longest_stage(stages, START + 902 * MS, answered=True) == ("queue", 895 * MS)


class TestCalls:
    """Each call is counted once, and those worth a look are kept, as names and numbers."""

    def test_an_answered_call(self, recent: Recent, clock: Clock) -> None:
        call(recent, clock, texts=2)
        (slot,) = recent.seconds.last(10, clock.now)

        assert (slot.calls, slot.texts, slot.refused, slot.failed) == (1, 2, 0, 0)
        assert recent.by_status == {"OK": 1}
        assert recent.samples.stages(clock.now)[0].count == 1

    def test_a_refused_call(self, recent: Recent, clock: Clock) -> None:
        call(recent, clock, "RESOURCE_EXHAUSTED", reason="QUEUE_FULL", policy="queue", tenant="a", texts=3, held=1.5)
        (refusal,) = recent.refusals(clock.now, 0)
        (kept,) = recent.refused()

        assert (refusal.policy, refusal.reason, refusal.recent, refusal.total) == ("queue", "QUEUE_FULL", 1, 1)
        assert (kept.tenant, kept.texts, kept.policy, kept.method) == ("a", 3, "queue", "Embed")

    @pytest.mark.parametrize(
        ("status", "failed"), [("INTERNAL", 1), ("DEADLINE_EXCEEDED", 1), ("INVALID_ARGUMENT", 0), ("CANCELLED", 0)]
    )
    def test_a_failed_call_and_one_that_the_caller_spoiled(
        self, recent: Recent, clock: Clock, status: str, failed: int
    ) -> None:
        call(recent, clock, status)

        assert len(recent.failed) == failed
        assert (recent.failing.since(clock.now) is not None) == bool(failed)
        (slot,) = recent.seconds.last(10, clock.now)
        assert (slot.failed, slot.mistaken) == (failed, 1 - failed)

    def test_what_is_kept_holds_no_attribute_that_is_not_known(self, recent: Recent, clock: Clock) -> None:
        call(recent, clock, "INTERNAL", text="the secret text", tenant="a", texts=1)
        (kept,) = recent.failed

        assert "secret" not in repr(kept)

    def test_the_slowest_are_kept_and_the_traced_ones_beside_them(self, recent: Recent, clock: Clock) -> None:
        for n in range(100):
            call(recent, clock, took_ns=(1000 + n) * MS)
        call(recent, clock, took_ns=20 * MS, trace_id="abc")

        slowest = [done.duration_ns // MS for done in recent.slowest.top(clock.now)]
        assert slowest == [1099, 1098, 1097, 1096, 1095, 1094, 1093, 1092]
        assert [done.trace_id for done in recent.slowest_traced.top(clock.now)] == ["abc"]

    def test_the_slowest_are_forgotten_after_some_minutes(self, recent: Recent, clock: Clock) -> None:
        call(recent, clock, took_ns=5000 * MS)
        clock.now += 2 * 60 * NS
        call(recent, clock, took_ns=10 * MS)
        assert [done.duration_ns // MS for done in recent.slowest.top(clock.now)] == [5000, 10]

        clock.now += 4 * 60 * NS
        assert [done.duration_ns // MS for done in recent.slowest.top(clock.now)] == [10]

    def test_streams_take_as_long_as_their_reader_and_are_no_slow_calls(self, recent: Recent, clock: Clock) -> None:
        call(recent, clock, took_ns=60 * NS, method=UNARY + "Stream")

        assert recent.slowest.top(clock.now) == []
        assert recent.by_status == {"OK": 1}

    def test_a_frequent_reason_leaves_a_rare_one_to_be_seen(self, recent: Recent, clock: Clock) -> None:
        call(recent, clock, "RESOURCE_EXHAUSTED", reason="QUEUE_FULL", policy="queue")
        for _ in range(1000):
            clock.now += MS
            call(recent, clock, "RESOURCE_EXHAUSTED", reason="P95_EXCEEDED", policy="latency_p95")

        assert [kept.reason for kept in recent.refused()] == ["P95_EXCEEDED"] * RING_REASON + ["QUEUE_FULL"]
        assert [refusal.reason for refusal in recent.refusals(clock.now, 0)] == ["P95_EXCEEDED", "QUEUE_FULL"]


class TestSince:
    """Since when: an episode goes on while its events are close together."""

    def test_shedding_has_a_beginning_and_an_end(self, recent: Recent, clock: Clock) -> None:
        def refuse() -> None:
            call(recent, clock, "RESOURCE_EXHAUSTED", reason="QUEUE_FULL", policy="queue")

        assert recent.shedding.since(clock.now) is None
        refuse()
        for _ in range(5):
            clock.now += 8 * NS
            refuse()
        assert recent.shedding.since(clock.now) == START
        assert recent.refusals(clock.now, 0)[0].since_s == START / NS

        clock.now += 11 * NS
        assert recent.shedding.since(clock.now) is None
        refuse()
        assert recent.shedding.since(clock.now) == clock.now

    def test_a_device_that_is_full_is_so_since_then_and_until_it_has_room(self, recent: Recent, clock: Clock) -> None:
        recent.batch_finished(record_of([None], begun_ns=clock.now))
        clock.now += 20 * NS  # quiet
        begun = clock.now
        for _ in range(30):
            self.work(recent, clock, 980 * MS)
        recent.update_full(clock.now, recent.busy(clock.now))
        since = recent.full_since["device"]
        assert since is not None
        assert abs(since - begun) <= 2 * NS

        for _ in range(11):
            self.work(recent, clock, 850 * MS)
        assert recent.full_since["device"] == since

        for _ in range(11):
            self.work(recent, clock, 500 * MS)
        assert recent.full_since["device"] is None
        assert recent.busy(clock.now)["device"] == pytest.approx(0.5, abs=0.06)

    def test_a_pass_that_does_not_end_keeps_the_device_busy(self, recent: Recent, clock: Clock) -> None:
        clock.now += 60 * NS

        assert recent.busy(clock.now, pass_age_ns=30 * NS)["device"] == 1.0

    def test_threads_of_the_tokenizer_are_busy_apart_from_the_event_loop(self, recent: Recent, clock: Clock) -> None:
        for _ in range(10):
            clock.now += NS
            recent.tokenized(waited_ns=MS, elapsed_ns=NS)
            recent.tokenized(waited_ns=0, elapsed_ns=NS)  # on the loop

        assert recent.busy(clock.now)["tokenizer"] == pytest.approx(0.5, abs=0.06)

    @staticmethod
    def work(recent: Recent, clock: Clock, work_ns: int) -> None:
        """A second of which the device works for ``work_ns``."""
        record = record_of([None], begun_ns=clock.now)
        assert record.times is not None
        times = record.times
        ends = (*([times.start_ns] * 5), times.start_ns + work_ns)
        recent.batch_finished(record._replace(times=type(times)(*ends)))
        clock.now += NS


class TestPasses:
    """Passes are counted by outcome, and what failed has kept the device busy too."""

    def test_a_good_pass(self, recent: Recent, clock: Clock) -> None:
        recent.batch_finished(record_of([None, None], begun_ns=clock.now))

        assert [done[1:] for done in recent.passes] == [(2, 20, 32, 5 * MS)]
        assert recent.outcomes == {"ok": 1}

    def test_a_failed_pass_has_no_marks_and_begins_after_the_one_before(self, recent: Recent, clock: Clock) -> None:
        recent.batch_finished(record_of([None], begun_ns=clock.now))
        recent.batch_finished(record_of([None], outcome="failed", begun_ns=clock.now))

        first, second = recent.passes
        assert second[4] == 7 * MS - (first[0] - clock.now)

    def test_a_skipped_one_was_none(self, recent: Recent, clock: Clock) -> None:
        recent.batch_finished(record_of([None], outcome="skipped", begun_ns=clock.now))

        assert not recent.passes
        assert recent.outcomes == {"skipped": 1}


class TestBounds:
    """Nothing grows with the number of events, of reasons or of seconds."""

    def test_five_times_the_events_keep_no_more(self, recent: Recent, clock: Clock) -> None:
        def held() -> int:
            return _deep_size(recent)

        self.drive(recent, clock, 20_000)
        full = held()
        self.drive(recent, clock, 80_000)

        assert held() <= full * 1.1  # five times the events; a dictionary more or less has room to spare
        assert len(recent.failed) == RING

    @staticmethod
    def drive(recent: Recent, clock: Clock, events: int) -> None:
        for n in range(events):
            clock.now += 40 * MS
            match n % 4:
                case 0:
                    call(recent, clock, took_ns=n * 1000, trace_id="t" * 32, tenant=f"tenant {n}", texts=2)
                case 1:
                    call(recent, clock, "RESOURCE_EXHAUSTED", reason=f"REASON_{n}", policy="queue")
                case 2:
                    call(recent, clock, "INTERNAL", reason="INTERNAL")
                case _:
                    recent.batch_finished(record_of([None], begun_ns=clock.now))
                    recent.tokenized(MS, MS)


class TestObservers:
    """What stands before the other observers passes everything on."""

    def test_calls_that_are_counted_later_belong_to_the_second_in_which_they_ended(
        self, recent: Recent, clock: Clock
    ) -> None:
        observer = RecentCalls(recent, SilentCallObserver())
        for _ in range(2):
            observer.begin(UNARY, (), clock.now - MS, "peer").end(
                status="INTERNAL", stages=None, error_type="X", attributes={}
            )
            clock.now += 3 * NS
            recent.tokenized(0, MS)

        slots = list(recent.seconds.last(10, clock.now))
        assert [(slot.calls, slot.tokenized) for slot in slots] == [(1, 0), (1, 1), (0, 1)]

    def test_no_more_than_some_wait_to_be_counted(self, recent: Recent, clock: Clock) -> None:
        observer = RecentCalls(recent, SilentCallObserver())
        for _ in range(ENDED_MAX + 1):
            observer.begin(UNARY, (), clock.now - MS, "peer").end(
                status="OK", stages=None, error_type=None, attributes={}
            )
        assert recent.by_status == {"OK": ENDED_MAX}

    def test_every_event_of_the_engine_reaches_the_other_one(self, recent: Recent) -> None:
        told: list[str] = []

        class Inner(SilentObserver):
            def __getattribute__(self, name: str) -> object:
                if not name.startswith("_"):
                    told.append(name)
                return super().__getattribute__(name)

        observer: EngineObserver = RecentEngine(recent, Inner())
        names = [name for name in vars(EngineObserver) if not name.startswith("_")]
        observer.tokenized(1, 2, 3, 4)
        observer.stalled()
        observer.canary("ok")
        observer.batch_finished(record_of([None]))
        assert observer.batch_dispatched(1) is None

        assert all(callable(getattr(observer, name)) for name in names)
        assert set(told) == set(names)
        assert (recent.stalls, recent.canary and recent.canary[0], len(recent.passes)) == (1, "ok", 1)

    def test_a_call_reaches_the_other_one_and_has_its_trace(self, recent: Recent, clock: Clock) -> None:
        ended: list[Mapping[str, object]] = []

        class Trace:
            context: object | None = "context"
            trace_id: str | None = "abc"

            def end(self, **told: object) -> None:
                ended.append(told)

        class Inner(SilentCallObserver):
            def begin(self, *_: object) -> Trace:  # type: ignore[override]
                return Trace()

        observer: CallObserver = RecentCalls(recent, Inner())
        trace = observer.begin(UNARY, (), clock.now - MS, "peer")
        assert (trace.context, trace.trace_id, recent.in_flight) == ("context", "abc", 1)
        trace.end(status="INTERNAL", stages=None, error_type="X", attributes={})

        assert ended == [{"status": "INTERNAL", "stages": None, "error_type": "X", "attributes": {}}]
        assert (recent.in_flight, len(recent.failed)) == (0, 0), "it is counted with others, or before anybody reads"
        recent.settle()
        assert (recent.in_flight, recent.failed[0].trace_id) == (0, "abc")

    def test_calls_that_cost_nothing_are_not_watched(self, recent: Recent, clock: Clock) -> None:
        inner = SilentCallObserver()
        trace = RecentCalls(recent, inner).begin("embedserve.v1.EmbeddingService/GetLoad", (), clock.now, "peer")

        assert trace is inner.begin("", (), 0, "")
        assert recent.in_flight == 0


def _deep_size(thing: object, seen: set[int] | None = None) -> int:
    seen = seen if seen is not None else set()
    if id(thing) in seen or isinstance(thing, (type, str)):
        return 0
    seen.add(id(thing))
    parts: list[object] = []
    if isinstance(thing, Mapping):
        parts = [*thing.keys(), *thing.values()]
    elif isinstance(thing, (list, tuple, set, frozenset)) or type(thing).__name__ == "deque":
        parts = list(thing)  # type: ignore[call-overload]
    elif type(thing).__module__.startswith("embedserve"):
        names = [*getattr(thing, "__dict__", {}), *getattr(type(thing), "__slots__", ())]
        parts = [getattr(thing, name) for name in names if hasattr(thing, name)]
    return sys.getsizeof(thing) + sum(_deep_size(part, seen) for part in parts)
