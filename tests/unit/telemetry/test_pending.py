"""What is counted together is what would have been counted one by one, and nobody reads before it is counted."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import SpanContext

from embedserve.telemetry import instruments as table
from embedserve.telemetry.call_figures import StageFigures, answered_calls
from embedserve.telemetry.engine_figures import answered_requests
from embedserve.telemetry.instruments import Instruments
from embedserve.telemetry.pending import ROWS_MAX, Pending, Rows
from embedserve.telemetry.segments import Marks
from embedserve.telemetry.tally import HistogramCell, observe

EMBED = "embedserve.v1.EmbeddingService/Embed"
MS = 1_000_000
EDGES = (16, 64)

marks = st.tuples(*[st.integers(1, 3_000 * MS)] * 8)
calls = st.tuples(marks, st.integers(0, 500 * MS), st.integers(0, 3_000 * MS), st.booleans())


def counted(cell: HistogramCell) -> tuple[list[int], float, list[tuple[float, int | None]]]:
    point = cell.point(0)
    return list(point.bucket_counts), point.sum, [(float(e.value), e.trace_id) for e in point.exemplars]


def same(ours: HistogramCell, theirs: HistogramCell) -> bool:
    (counts, total, kept), (their_counts, their_total, their_kept) = counted(ours), counted(theirs)
    return (
        counts == their_counts
        and total == pytest.approx(their_total, rel=1e-9, abs=1e-9)
        and kept == [(pytest.approx(value), trace_id) for value, trace_id in their_kept]
    )


class TestTogetherAsOneByOne:
    @given(st.lists(calls, min_size=1, max_size=20))
    def test_calls_with_their_stages_and_exemplars(self, found: list[tuple[Marks, int, int, bool]]) -> None:
        ours, theirs = Instruments(), Instruments()
        duration = theirs.histogram(table.RPC_DURATION).cell(EMBED, "OK")
        rows = answered_calls(ours, ours.histogram(table.RPC_DURATION).cell(EMBED, "OK"))
        single = StageFigures(theirs)
        for number, (borders, upload_ns, took_ns, sampled) in enumerate(found):
            arrived_ns = borders[0] - upload_ns
            ended_ns = borders[0] + took_ns  # perhaps before marks that a later window has set
            trace = SpanContext(number + 1, 2, is_remote=False) if sampled else None
            rows.add((arrived_ns, *borders, ended_ns, trace))
            observe(duration, (ended_ns - arrived_ns) * 1e-9, trace, 5)
            single.count(arrived_ns, borders, ended_ns, trace, 5, answered=True)

        assert same(ours.histogram(table.RPC_DURATION).cell(EMBED, "OK"), duration)
        for stage in table.STAGES:
            assert same(*(tables.histogram(table.STAGE_DURATION).cell(stage) for tables in (ours, theirs))), stage

    @given(st.lists(st.tuples(st.integers(0, 100), marks), min_size=1, max_size=20))
    def test_waits_by_bucket(self, found: list[tuple[int, Marks]]) -> None:
        ours, theirs = Instruments(bucket_edges=EDGES), Instruments(bucket_edges=EDGES)
        rows = answered_requests(ours, EDGES)
        waits = theirs.histogram(table.QUEUE_WAIT)
        for length, (queued, dequeued, computed, predicted, *_) in found:
            rows.add((length, queued, dequeued, computed, predicted))
            name = next((str(edge) for edge in EDGES if length <= edge), "_OTHER")
            waits.cell(name).observe(max(0, dequeued - queued) * 1e-9)
            theirs.histogram(table.WAIT_PREDICTED).cell().observe(predicted * 1e-9)
            theirs.histogram(table.WAIT_ACTUAL).cell().observe(max(0, computed - queued) * 1e-9)
            theirs.histogram(table.WAIT_PREDICTION).cell().observe(max(0, computed - queued) / predicted)

        for name in (*map(str, EDGES), "_OTHER"):
            assert same(ours.histogram(table.QUEUE_WAIT).cell(name), waits.cell(name)), name
        for instrument in (table.WAIT_PREDICTED, table.WAIT_ACTUAL, table.WAIT_PREDICTION):
            assert same(ours.histogram(instrument).cell(), theirs.histogram(instrument).cell()), instrument.name

    def test_an_exemplar_says_when_its_call_ended_on_the_wall_clock(self) -> None:
        instruments = Instruments()
        cell = instruments.histogram(table.RPC_DURATION).cell(EMBED, "OK")
        rows = answered_calls(instruments, cell)
        begun_ns = time.time_ns()
        now = time.monotonic_ns()
        rows.add((now - 9, *range(now - 8, now), now, SpanContext(1, 2, is_remote=False)))
        (exemplar,) = cell.point(0).exemplars
        assert abs(exemplar.time_unix_nano - begun_ns) < 1_000 * MS


class TestPending:
    def test_no_more_wait_than_are_counted_together(self) -> None:
        seen: list[int] = []
        rows = Pending().rows(lambda columns: seen.append(len(columns[0])))
        for number in range(3 * ROWS_MAX + 1):
            rows.add((number,))
        assert seen == [ROWS_MAX] * 3

    def test_a_read_counts_what_waits_of_every_kind(self) -> None:
        pending = Pending()
        seen: dict[str, tuple[int, ...]] = {}
        one = pending.rows(lambda columns: seen.update(one=columns[0]))
        other = pending.rows(lambda columns: seen.update(other=columns[0]))
        one.add((1,))
        other.add((2,))
        other.add((3,))
        with pending.counted():
            assert seen == {"one": (1,), "other": (2, 3)}

    def test_a_reader_keeps_nobody_from_measuring(self) -> None:
        pending = Pending()
        seen: list[int] = []
        rows = pending.rows(lambda columns: seen.extend(columns[0]))
        with pending.counted():
            for number in range(2 * ROWS_MAX):
                rows.add((number,))
            assert seen == []
        rows.add((2 * ROWS_MAX,))
        assert seen == list(range(2 * ROWS_MAX + 1))

    def test_nothing_is_lost_or_counted_twice_beside_a_reader(self) -> None:
        pending = Pending()
        cell = HistogramCell({}, (0.5,), pending)
        rows: Rows = pending.rows(lambda columns: cell.add_bulk([len(columns[0]), 0], 0.0))
        ended = threading.Event()
        reads: list[int] = []

        def read() -> None:
            while not ended.is_set():
                reads.append(cell.point(0).count)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        for number in range(20_000):
            rows.add((number,))
            cell.observe(1.0)
        ended.set()
        reader.join()
        assert cell.point(0).bucket_counts == [20_000, 20_000]
        assert reads == sorted(reads)
