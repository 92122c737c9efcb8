"""What calls add up to."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest import histogram
from loadtest.figures import ClientUse, figures_of
from loadtest.ledger import Ledger, Scribe
from loadtest.scenario import Marks
from loadtest.schedule import arrivals, timetable
from loadtest.summary import judged, summarised
from loadtest.target import NO_CONNECTION, Reply
from tests.unit.loadtest.scenarios import scenario

OK, SHED = Reply("OK", items=1, tokens=10), Reply("RESOURCE_EXHAUSTED", "QUEUE_FULL")
EXPIRED, FAILED, CUT = Reply("DEADLINE_EXCEEDED"), Reply("INTERNAL"), Reply("UNAVAILABLE")
IDLE = (ClientUse(0.1, 1.0, 1, 0),)


def ledger(*calls: tuple[float, float, float, int, Reply]) -> Ledger:
    scribe = Scribe()
    for meant, sent, ended, phase, reply in calls:
        scribe.note(meant, sent, ended, phase, 1, reply)
    return scribe.ledger()


class TestRate:
    def test_a_call_that_runs_over_the_end_counts_by_its_share(self):
        asked = scenario({"callers": 1, "seconds": 1.0})
        calls = ledger((0.0, 0.0, 0.5, 0, OK), (0.5, 0.5, 1.5, 0, OK))
        phase = figures_of(asked, timetable(asked), calls, IDLE, None)["phases"][0]
        assert phase["calls_per_s"] == pytest.approx(1.5)
        assert phase["tokens_per_s"] == pytest.approx(15)

    def test_refused_calls_are_no_throughput_and_have_no_latency(self):
        asked = scenario({"callers": 1, "seconds": 1.0})
        calls = ledger((0.0, 0.0, 0.1, 0, OK), (0.1, 0.1, 0.9, 0, SHED))
        phase = figures_of(asked, timetable(asked), calls, IDLE, None)["phases"][0]
        assert phase["calls_per_s"] == pytest.approx(1.0)
        assert phase["latency_ms"]["max"] == pytest.approx(100)
        assert phase["refusal_ms"]["max"] == pytest.approx(800)


class TestVoid:
    def offered(self, share: float) -> list[str]:
        asked = scenario({"rate": 1000.0, "seconds": 1.0})
        spans = timetable(asked)
        due = arrivals(spans, asked.seed)
        behind = int(len(due) * (1 - share))
        sent = due.copy()
        if behind:
            sent[-behind:] = 1.5
        calls = ledger(*((meant, at, at + 0.001, 0, OK) for meant, at in zip(due, sent, strict=True)))
        return figures_of(asked, spans, calls, IDLE, None)["void"]

    def test_begins_below_99_percent(self):
        assert self.offered(1.0) == []
        assert self.offered(0.993) == []
        assert len(self.offered(0.98)) == 1

    def after(self, *replies: Reply) -> list[str]:
        asked = scenario({"callers": 1, "seconds": 3.0}, {"callers": 1, "seconds": 3.0})
        rows = [(at, at, at + 0.5, at // 3, reply) for at, reply in enumerate(replies)]
        return figures_of(asked, timetable(asked), ledger(*rows), IDLE, None)["void"]

    def test_a_server_that_nobody_could_reach_any_more_was_lost(self):
        (reason,) = self.after(OK, OK, CUT, NO_CONNECTION, NO_CONNECTION)
        assert reason == "the server was lost: 2 calls found nobody who takes a connection, the first after 3.0 s"

    def test_one_that_came_back_was_lost_as_well(self):
        (reason,) = self.after(OK, NO_CONNECTION, OK)
        assert reason == "the server was lost: 1 call found nobody who takes a connection, the first after 1.0 s"

    @pytest.mark.parametrize("reply", [SHED, EXPIRED, FAILED, CUT, Reply("UNAVAILABLE", "DRAINING")])
    def test_whoever_answers_is_not_lost(self, reply):
        """Nor is one whose connection was cut, as by a proxy or by its age, where the next one is taken."""
        assert self.after(OK, reply, OK) == []


class TestNotes:
    def test_a_busy_client_is_told(self):
        asked = scenario({"callers": 1, "seconds": 1.0})
        calls = ledger((0.0, 0.0, 0.1, 0, OK))
        (note, *_) = figures_of(asked, timetable(asked), calls, (ClientUse(0.97, 1.0, 1, 0),), None)["notes"]
        assert "97% of a core" in note


class TestRecovery:
    def test_ends_with_the_last_window_that_is_slow(self):
        asked = scenario({"rate": 10.0, "seconds": 2.0}, {"rate": 50.0, "seconds": 1.0}, {"rate": 10.0, "seconds": 3.0})
        # 10 ms before; 500 ms in the burst and until 1.2 s after it, which ends at 3 s.
        calls = [(at, at, at + (0.5 if 2 <= at < 4.2 else 0.01), 0 if at < 2 else 1 if at < 3 else 2, OK)
                 for at in np.arange(0.05, 6.0, 0.1)]  # fmt: skip
        figures = figures_of(asked, timetable(asked), ledger(*calls), IDLE, None)
        assert figures["recovery_s"] == pytest.approx(1.5)

    def test_is_nothing_where_there_is_no_burst(self):
        asked = scenario({"rate": 10.0}, {"rate": 20.0})
        assert figures_of(asked, timetable(asked), ledger((0, 0, 1, 0, OK)), IDLE, None)["recovery_s"] is None

    @pytest.mark.parametrize(("reply", "seconds"), [(SHED, 0.0), (CUT, 0.0), (FAILED, 0.0), (EXPIRED, 3.0)])
    def test_is_of_calls_that_were_worked_for(self, reply, seconds):
        """What was refused or failed has no latency; what expired has."""
        asked = scenario({"rate": 10.0, "seconds": 2.0}, {"rate": 50.0, "seconds": 1.0}, {"rate": 10.0, "seconds": 3.0})
        calls = [(at, at, at + 0.01, 0 if at < 2 else 1 if at < 3 else 2, OK) for at in np.arange(0.05, 6.0, 0.1)]
        calls += [(at, at, at + 1.0, 2, reply) for at in np.arange(3.05, 6.0, 0.1)]
        figures = figures_of(asked, timetable(asked), ledger(*calls), IDLE, None)
        assert figures["recovery_s"] == pytest.approx(seconds)


class TestTimeline:
    def test_counts_every_call_in_its_second(self):
        asked = scenario({"callers": 1, "seconds": 3.0})
        calls = ledger((0.2, 0.2, 0.9, 0, OK), (0.9, 0.9, 1.1, 0, SHED), (1.1, 1.1, 4.2, 0, OK))
        timeline = figures_of(asked, timetable(asked), calls, IDLE, None)["timeline"]
        assert timeline["second"] == [0, 1, 2, 3, 4]
        assert timeline["sent"] == [2, 1, 0, 0, 0]
        assert timeline["answered"] == [1, 0, 0, 0, 1]
        assert timeline["refused"] == [0, 1, 0, 0, 0]
        assert timeline["p50_ms"] == [pytest.approx(700), pytest.approx(3100), None, None, None]

    def test_tells_refused_from_expired_from_failed(self):
        asked = scenario({"callers": 1, "seconds": 6.0})
        replies = [OK, SHED, EXPIRED, CUT, NO_CONNECTION, FAILED]
        calls = ledger(*((at, at, at + 0.5, 0, reply) for at, reply in enumerate(replies)))
        timeline = figures_of(asked, timetable(asked), calls, IDLE, None)["timeline"]
        assert timeline["answered"] == [1, 0, 0, 0, 0, 0]
        assert timeline["refused"] == [0, 1, 0, 0, 0, 0]
        assert timeline["expired"] == [0, 0, 1, 0, 0, 0]
        assert timeline["failed"] == [0, 0, 0, 1, 1, 1]


class TestHistogram:
    def test_knows_a_percentile_to_one_percent(self):
        values = np.random.default_rng(17).lognormal(1.0, 1.5, 50_000)
        for share in (0.5, 0.9, 0.99, 0.999):
            exact = float(np.quantile(values, share))
            assert histogram.percentile([histogram.pack(values)], share) == pytest.approx(exact, rel=0.01)

    def test_of_two_runs_adds_up(self):
        low, high = histogram.pack(np.full(100, 1.0)), histogram.pack(np.full(300, 8.0))
        assert histogram.percentile([low, high], 0.2) == pytest.approx(1.0, rel=0.01)
        assert histogram.percentile([low, high], 0.3) == pytest.approx(8.0, rel=0.01)


class TestMerging:
    def test_outcomes_keep_their_meaning(self):
        """Processes number statuses as they meet them."""
        one, other = ledger((0, 0, 1, 0, OK), (0, 0, 3, 0, SHED)), ledger((0, 0, 2, 0, SHED))
        merged = Ledger.merged([one, other])
        assert [merged.outcomes[number][0] for number in merged.rows["outcome"]] == ["OK", SHED.status, SHED.status]
        assert merged.having("OK").tolist() == [True, False, False]

    def test_of_nothing_is_nothing(self):
        assert not len(Ledger.merged([]).rows)


class TestMarks:
    def test_throughput_that_falls_is_found_against_the_best_so_far(self):
        asked = scenario(*({"callers": 2**i, "seconds": 1.0} for i in range(3)))
        count = (100, 200, 150)
        calls = [
            (i, i, i + 0.001, phase, OK) for phase in range(3) for i in np.linspace(phase, phase + 0.9, count[phase])
        ]
        summary = summarised([figures_of(asked, timetable(asked), ledger(*calls), IDLE, None)])
        marks = Marks(throughput_never_falls_by=0.03, p99_ms_at_most=2.0)
        falls, p99 = sorted(judged(marks, summary), key=lambda row: row["mark"], reverse=True)
        assert (falls["found"], falls["met"]) == (pytest.approx(0.25), False)
        assert p99["met"]
