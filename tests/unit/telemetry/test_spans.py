"""Spans tell the whole of a call and a pass: no gap, no overlap, links both ways."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, StatusCode

from embedserve.engine.stages import Boarding, Stages
from embedserve.telemetry import semconv
from embedserve.telemetry.segments import marks_of, segments
from embedserve.telemetry.span_catalogue import SPANS
from embedserve.telemetry.spans import _answered, _stretches
from tests.unit.telemetry.pipeline import EMBED, MS, Pipeline, finish_pass, record_of, stages_of

ATTRIBUTES = {"texts": 2, "model": "m", "dimensions": 4, "encoding": "float"}


def by_name(spans: Sequence[ReadableSpan], name: str) -> ReadableSpan:
    (found,) = [span for span in spans if span.name == name]
    return found


def children_of(spans: Sequence[ReadableSpan], parent: ReadableSpan) -> list[ReadableSpan]:
    return [span for span in spans if span.parent is not None and span.parent.span_id == parent.context.span_id]


def assert_contiguous(parent: ReadableSpan, children: Sequence[ReadableSpan]) -> None:
    borders = [parent.start_time, *(child.end_time for child in children)]
    assert borders == [*(child.start_time for child in children), parent.end_time]


class TestSegments:
    def test_an_answered_call_goes_through_every_stage(self) -> None:
        begun = 5 * MS

        found = segments(stages_of(begun), begun + 10 * MS, answered=True)

        names = ["validate", "admit", "tokenize", "admit_exact", "queue", "assemble", "forward", "respond"]
        assert names == [name for name, _, _ in found]
        assert [(end - begin) // MS for _, begin, end in found] == [1, 1, 2, 1, 2, 1, 1, 1]

    @pytest.mark.parametrize(
        ("reached", "last"),
        [
            ("arrived_ns", "validate"),
            ("validated_ns", "admit"),
            ("admitted_ns", "tokenize"),
            ("tokenized_ns", "admit_exact"),
            ("queued_ns", "queue"),
            ("dequeued_ns", "assemble"),
            ("assembled_ns", "forward"),
            ("computed_ns", "respond"),
        ],
    )
    def test_a_call_that_ends_early_ends_in_the_stage_it_was_in(self, reached: str, last: str) -> None:
        whole = stages_of(5 * MS)
        marks = [name for name in Stages.__dataclass_fields__ if name.endswith("ed_ns") and name != "responded_ns"]
        keep = marks[: marks.index(reached) + 1]
        stages = Stages(**{name: getattr(whole, name) for name in keep})

        found = segments(stages, 50 * MS, answered=False)

        assert last == found[-1][0]
        assert found[-1][2] == 50 * MS

    @given(
        marks=st.lists(st.integers(0, 1000), min_size=7, max_size=7),
        ended=st.integers(1, 1200),
        answered=st.booleans(),
    )
    def test_segments_never_overlap_or_leave_a_gap_whatever_the_marks(
        self, marks: list[int], ended: int, answered: bool
    ) -> None:
        names = [
            "validated_ns",
            "admitted_ns",
            "tokenized_ns",
            "queued_ns",
            "dequeued_ns",
            "assembled_ns",
            "computed_ns",
        ]

        found = segments(Stages(1, **dict(zip(names, marks, strict=True))), ended, answered=answered)

        assert found[0][1] == 1
        assert ended == found[-1][2]
        assert all(before[2] == after[1] for before, after in pairwise(found))
        assert all(begin <= end for _, begin, end in found)


class TestCall:
    async def test_children_share_their_borders_and_add_up_to_the_call(self, pipeline: Pipeline) -> None:
        begun = time.monotonic_ns() - 20 * MS
        call = pipeline.calls.begin(EMBED, [], begun, "ipv4:10.0.0.1:4242")
        call.end(status="OK", stages=stages_of(begun), error_type=None, attributes=ATTRIBUTES)

        spans = pipeline.finish()

        server = by_name(spans, EMBED)
        children = children_of(spans, server)
        names = ["validate", "admit", "tokenize", "admit", "queue", "forward", "respond"]
        assert names == [child.name for child in children]
        assert_contiguous(server, children)
        assert SpanKind.SERVER is server.kind
        assert {SpanKind.INTERNAL} == {child.kind for child in children}
        assert {server.context.trace_id} == {child.context.trace_id for child in children}

    async def test_times_are_on_the_wall_clock(self, pipeline: Pipeline) -> None:
        before = time.time_ns()
        call = pipeline.calls.begin(EMBED, [], time.monotonic_ns(), "")
        call.end(status="OK", stages=None, error_type=None, attributes={})

        (server,) = pipeline.finish()

        assert before - MS <= server.start_time <= server.end_time <= time.time_ns() + MS

    async def test_attributes_follow_the_conventions(self, pipeline: Pipeline) -> None:
        begun = time.monotonic_ns() - 20 * MS
        call = pipeline.calls.begin(EMBED, [], begun, "ipv6:%5B::1%5D:4242")
        call.end(status="OK", stages=stages_of(begun), error_type=None, attributes=ATTRIBUTES)

        spans = pipeline.finish()

        assert dict(by_name(spans, EMBED).attributes) == {
            "rpc.system.name": "grpc",
            "rpc.method": EMBED,
            "rpc.response.status_code": "OK",
            "network.peer.address": "::1",
            "network.peer.port": 4242,
            "gen_ai.operation.name": "embeddings",
            "gen_ai.provider.name": "embedserve",
            "gen_ai.request.model": "m",
            "gen_ai.usage.input_tokens": 20,
            "gen_ai.embeddings.dimension.count": 4,
            "gen_ai.request.encoding_formats": ("float",),
            "embedserve.texts": 2,
        }
        queue = by_name(spans, "queue").attributes
        assert tuple(
            queue[key]
            for key in ("embedserve.bucket", "embedserve.texts", "embedserve.tokens", "embedserve.queue.items")
        ) == (16, 2, 20, 3)

    @pytest.mark.parametrize(
        ("status", "ours"),
        [
            ("OK", False), ("CANCELLED", False), ("INVALID_ARGUMENT", False), ("NOT_FOUND", False),
            ("RESOURCE_EXHAUSTED", False), ("FAILED_PRECONDITION", False), ("UNKNOWN", True),
            ("DEADLINE_EXCEEDED", True), ("UNIMPLEMENTED", True), ("INTERNAL", True),
            ("UNAVAILABLE", True), ("DATA_LOSS", True),
        ],
    )  # fmt: skip
    async def test_only_the_servers_faults_are_errors(self, pipeline: Pipeline, status: str, ours: bool) -> None:
        error_type = None if status == "OK" else "SomeError"
        call = pipeline.calls.begin(EMBED, [], time.monotonic_ns(), "")
        call.end(status=status, stages=None, error_type=error_type, attributes={})

        (server,) = pipeline.finish()

        assert (StatusCode.ERROR if ours else StatusCode.UNSET) is server.status.status_code
        assert status == server.attributes["rpc.response.status_code"]
        assert error_type == server.attributes.get("error.type")

    async def test_a_refusal_tells_its_policy_and_figures(self, pipeline: Pipeline) -> None:
        begun = time.monotonic_ns() - 5 * MS
        stages = Stages(begun, validated_ns=begun + MS)
        call = pipeline.calls.begin(EMBED, [], begun, "")
        call.end(
            status="RESOURCE_EXHAUSTED",
            stages=stages,
            error_type="DRAIN_TIME_EXCEEDED",
            attributes={"policy": "throughput", "drain_ns": 3.5e9, "limit_ns": 2e9},
        )

        spans = pipeline.finish()

        attributes = by_name(spans, EMBED).attributes
        assert (
            attributes["embedserve.admission.policy"],
            attributes["embedserve.admission.reason"],
            attributes["embedserve.admission.figure.drain_ns"],
            attributes["embedserve.admission.figure.limit_ns"],
        ) == ("throughput", "DRAIN_TIME_EXCEEDED", 3.5e9, 2e9)
        assert [span.name for span in spans[1:]] == ["validate", "admit"]

    @pytest.mark.parametrize(
        ("status", "error"), [("DEADLINE_EXCEEDED", "DeadlineExpired"), ("CANCELLED", "CANCELLED")]
    )
    async def test_a_call_that_ends_in_the_queue_shows_its_wait(
        self, pipeline: Pipeline, status: str, error: str
    ) -> None:
        begun = time.monotonic_ns() - 50 * MS
        stages = Stages(begun, begun + MS, begun + 2 * MS, begun + 3 * MS, begun + 4 * MS, bucket=32)
        call = pipeline.calls.begin(EMBED, [], begun, "")
        call.end(status=status, stages=stages, error_type=error, attributes={})

        spans = pipeline.finish()

        server, queue = by_name(spans, EMBED), by_name(spans, "queue")
        assert_contiguous(server, children_of(spans, server))
        assert queue.attributes["embedserve.bucket"] == 32
        assert queue.end_time - queue.start_time >= 46 * MS

    async def test_a_call_that_expires_while_the_device_is_at_work_has_its_batch(self, pipeline: Pipeline) -> None:
        """Its wait ends where the worker got it, and the links go both ways although the pass ends later."""
        begun = time.monotonic_ns() - 50 * MS
        call = pipeline.calls.begin(EMBED, [], begun, "")
        handle = pipeline.engine.batch_dispatched(7)
        stages = Stages(begun, begun + MS, begun + 2 * MS, begun + 3 * MS, begun + 4 * MS, bucket=32)
        stages.boardings.append(Boarding(7, 1, 1, begun + 10 * MS, handle))
        call.end(status="DEADLINE_EXCEEDED", stages=stages, error_type="DeadlineExpired", attributes={})
        pipeline.engine.batch_finished(record_of([call.context], begun_ns=begun)._replace(trace=handle))

        spans = pipeline.finish()

        server, batch = by_name(spans, EMBED), by_name(spans, "batch")
        children = children_of(spans, server)
        assert_contiguous(server, children)
        assert [child.name for child in children][-2:] == ["queue", "forward"]
        assert children[-2].end_time - children[-2].start_time == 6 * MS
        assert [batch.context.span_id] == [link.context.span_id for link in children[-1].links]
        assert [server.context.span_id] == [link.context.span_id for link in batch.links]

    async def test_a_request_links_to_each_pass_that_it_was_in(self, pipeline: Pipeline) -> None:
        """To one that failed, too: whoever was in the way of others is found from either side."""
        begun = time.monotonic_ns() - 20 * MS
        call = pipeline.calls.begin(EMBED, [], begun, "")
        stages = stages_of(begun)
        for outcome in ("failed", "ok"):
            handle = finish_pass(pipeline, [call.context], outcome=outcome, begun_ns=begun)
            stages.boardings.append(Boarding(7, 1, 1, begun, handle))
        call.end(status="OK", stages=stages, error_type=None, attributes={})

        spans = pipeline.finish()

        batches = [span for span in spans if span.name == "batch"]
        (forward,) = [span for span in children_of(spans, by_name(spans, EMBED)) if span.name == "forward"]
        assert [link.context.span_id for link in forward.links] == [batch.context.span_id for batch in batches]
        assert [batch.status.status_code for batch in batches] == [StatusCode.ERROR, StatusCode.UNSET]

    async def test_words_that_nobody_declared_never_reach_a_span(self, pipeline: Pipeline) -> None:
        call = pipeline.calls.begin(EMBED, [], time.monotonic_ns(), "")
        call.end(status="OK", stages=None, error_type=None, attributes={"first_text": "my secret", "count": 3})

        (server,) = pipeline.finish()

        assert "my secret" not in str(dict(server.attributes))
        assert server.attributes["embedserve.admission.figure.count"] == 3

    async def test_a_callers_megabyte_is_cut(self, pipeline: Pipeline) -> None:
        call = pipeline.calls.begin(EMBED, [], time.monotonic_ns(), "")
        call.end(status="NOT_FOUND", stages=None, error_type="UnknownModel", attributes={"model": "x" * 1_000_000})

        (server,) = pipeline.finish()

        assert len(server.attributes["gen_ai.request.model"]) == 256

    @pytest.mark.parametrize(
        "peer", ["", "unix:", "unix:/run/x.sock", "ipv4:nonsense", "\x00", "ipv4:1.2.3.4:99999999999x"]
    )
    async def test_a_strange_peer_is_no_trouble(self, pipeline: Pipeline, peer: str) -> None:
        call = pipeline.calls.begin(EMBED, [], time.monotonic_ns(), peer)
        call.end(status="OK", stages=None, error_type=None, attributes={})

        assert len(pipeline.finish()) == 1


class TestBatch:
    async def test_calls_and_batch_are_linked_both_ways(self, pipeline: Pipeline) -> None:
        begun = time.monotonic_ns() - 20 * MS
        calls = [pipeline.calls.begin(EMBED, [], begun, "") for _ in range(3)]
        handle = finish_pass(pipeline, [call.context for call in calls], begun_ns=begun)
        for call in calls:
            stages = stages_of(begun)
            stages.boardings.append(Boarding(7, 3, 1, begun, handle))
            call.end(status="OK", stages=stages, error_type=None, attributes={})

        spans = pipeline.finish()

        batch = by_name(spans, "batch")
        servers = [span for span in spans if span.name == EMBED]
        assert {s.context.span_id for s in servers} == {link.context.span_id for link in batch.links}
        assert [link.attributes["embedserve.link.first_index"] for link in batch.links] == [0, 1, 2]
        assert [
            (link.attributes["embedserve.link.rows"], link.attributes["embedserve.link.tokens"]) for link in batch.links
        ] == [(1, 10)] * 3
        for server in servers:
            (forward,) = [child for child in children_of(spans, server) if child.name == "forward"]
            (link,) = forward.links
            assert (batch.context.trace_id, batch.context.span_id) == (link.context.trace_id, link.context.span_id)
            assert server.context.trace_id != batch.context.trace_id

    async def test_its_children_add_up_to_it(self, pipeline: Pipeline) -> None:
        call = pipeline.calls.begin(EMBED, [], time.monotonic_ns(), "")
        finish_pass(pipeline, [call.context], begun_ns=time.monotonic_ns())

        spans = pipeline.finish()

        batch = by_name(spans, "batch")
        names = ["dispatch", "assemble", "copy_in", "forward", "pool", "copy_out", "return"]
        assert names == [child.name for child in children_of(spans, batch)]
        assert batch.parent is None
        assert_contiguous(batch, children_of(spans, batch))

    async def test_a_batch_without_a_sampled_call_is_not_traced(self, pipeline: Pipeline) -> None:
        assert finish_pass(pipeline, [None, None]) is None
        assert pipeline.finish() == []

    async def test_more_members_than_the_sdks_128_are_all_linked(self, pipeline: Pipeline) -> None:
        contexts = [pipeline.calls.begin(EMBED, [], 0, "").context for _ in range(300)]
        finish_pass(pipeline, [*contexts, None], begun_ns=time.monotonic_ns())

        batch = by_name(pipeline.finish(), "batch")

        assert [c.span_id for c in contexts if c is not None] == [link.context.span_id for link in batch.links]
        assert batch.attributes["embedserve.batch.requests"] == 301

    async def test_over_the_limit_the_first_links_are_kept_and_the_count_is_told(
        self, make_pipeline: Callable[..., Pipeline]
    ) -> None:
        pipeline = make_pipeline(links_max=2)
        contexts = [pipeline.calls.begin(EMBED, [], 0, "").context for _ in range(3)]
        finish_pass(pipeline, contexts)

        batch = by_name(pipeline.finish(), "batch")

        assert [contexts[0].span_id, contexts[1].span_id] == [link.context.span_id for link in batch.links]
        assert batch.attributes["embedserve.batch.requests.sampled"] == 3

    @pytest.mark.parametrize("outcome", ["out_of_memory", "failed", "fatal"])
    async def test_a_pass_that_fails_is_an_error(self, pipeline: Pipeline, outcome: str) -> None:
        context = SpanContext(1, 2, is_remote=False)
        finish_pass(pipeline, [context], outcome=outcome)

        (batch,) = pipeline.finish()

        assert StatusCode.ERROR is batch.status.status_code
        assert outcome == batch.attributes["error.type"]

    async def test_what_waits_to_be_sent_keeps_no_exception_alive(self, pipeline: Pipeline) -> None:
        """Its frames hold the texts and the tensors of the pass, and a dead collector holds spans for minutes."""

        class PassFailed(Exception):
            """One that can be referred to weakly."""

        error = PassFailed()
        gone = weakref.ref(error)
        context = SpanContext(1, 2, is_remote=False)
        trace = pipeline.engine.batch_dispatched(7)
        pipeline.engine.batch_finished(record_of([context], outcome="failed")._replace(trace=trace, error=error))
        del error

        assert gone() is None
        (batch,) = pipeline.finish()
        assert batch.attributes["embedserve.batch.requests"] == 1


class TestCatalogue:
    async def test_every_span_that_is_made_is_in_it(self, pipeline: Pipeline) -> None:
        begun = time.monotonic_ns() - 20 * MS
        call = pipeline.calls.begin(EMBED, [], begun - MS, "")
        finish_pass(pipeline, [call.context], begun_ns=begun)
        call.end(status="OK", stages=stages_of(begun), error_type=None, attributes={})
        pipeline.engine.model_swapped("compiled", 3.0, cached=False)

        made = {span.name for span in pipeline.finish()}

        assert made <= {span.name for span in SPANS}
        assert {span.name for span in SPANS if span.kind == "INTERNAL"} <= made


class TestCompiling:
    """The compiled model that takes over is a trace of its own."""

    async def test_it_says_how_long_it_took_and_how_it_went(self, pipeline: Pipeline) -> None:
        pipeline.engine.model_swapped("compiled", 3.0, cached=False)
        pipeline.engine.model_swapped("compiled", 0.5, cached=True)
        pipeline.engine.compile_failed(1.0)
        pipeline.engine.model_swapped("eager", 0.0, cached=False)

        spans = pipeline.finish()

        assert [span.name for span in spans] == ["compile"] * 3
        outcomes = [span.attributes["embedserve.model.compile.outcome"] for span in spans]
        assert outcomes == ["compiled", "cached", "failed"]
        assert [round((span.end_time - span.start_time) / 1e9, 3) for span in spans] == [3.0, 0.5, 1.0]
        assert [span.status.is_ok for span in spans] == [True, True, False]
        assert len({span.context.trace_id for span in spans}) == 3


class TestMostCalls:
    @given(st.lists(st.integers(1, 99), min_size=8, max_size=8), st.integers(0, 5), st.integers(0, 2))
    def test_have_the_children_that_a_look_at_each_stage_gives(
        self, steps: list[int], last: int, boardings: int
    ) -> None:
        *marks, ended = accumulate([*steps, last])
        names = (
            "arrived_ns", "validated_ns", "admitted_ns", "tokenized_ns", "queued_ns", "dequeued_ns", "assembled_ns",
            "computed_ns",
        )  # fmt: skip
        stages = Stages(**dict(zip(names, marks, strict=True)), texts=1, tokens=5, bucket=8)
        stages.boardings = [Boarding(n, 3, 1, 40, SpanContext(7, n + 1, is_remote=False)) for n in range(boardings)]
        one_by_one = _stretches(segments(stages, ended, answered=True), stages, ended)
        together = _answered(marks[0], marks_of(stages), ended, stages, 1000)
        expected = [(*child, list(links)) for *child, links in one_by_one]
        assert [(name, begin - 1000, end - 1000, a, list(links)) for name, begin, end, a, links in together] == expected

        received = _answered(marks[0] - 7, marks_of(stages), ended, stages, 1000)
        assert [(name, begin - 1000, end - 1000, a, list(links)) for name, begin, end, a, links in received] == [
            ("receive", marks[0] - 7, marks[0], {}, []),
            *expected,
        ]

    async def test_share_what_is_written_of_a_caller_and_never_what_differs(self, pipeline: Pipeline) -> None:
        told = [
            {"texts": 1, "deadline_ms": 7.5, "model": "m", "dimensions": 4, "encoding": "float", "tenant": "a"},
            {"texts": 2, "deadline_ms": 9.0, "model": "m", "dimensions": 4, "encoding": "float", "tenant": "a"},
            {"texts": 2, "model": "m", "dimensions": 4, "encoding": "base64", "tenant": "b", "attempt": 2},
        ]
        for attributes in told:
            begun = time.monotonic_ns() - 20 * MS
            call = pipeline.calls.begin(EMBED, [], begun, "ipv4:10.0.0.1:4242")
            call.end(status="OK", stages=stages_of(begun), error_type=None, attributes=attributes)

        found = [dict(span.attributes) for span in pipeline.finish() if span.name == EMBED]

        names = ("embedserve.texts", semconv.DEADLINE_MS, semconv.TENANT, semconv.GEN_AI_ENCODING_FORMATS)
        assert [tuple(one.get(name) for name in names) for one in found] == [
            (1, 7.5, "a", ("float",)),
            (2, 9.0, "a", ("float",)),
            (2, None, "b", ("base64",)),
        ]
        assert [one.get("embedserve.attempt") for one in found] == [None, None, 2]
