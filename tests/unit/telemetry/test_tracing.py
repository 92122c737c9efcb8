"""What is decided when a call arrives and recorded when it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, TraceIdRatioBased
from opentelemetry.trace import StatusCode

from embedserve.telemetry import instruments as table
from embedserve.telemetry.propagation import Propagation
from embedserve.telemetry.tracing import current_span_context
from tests.unit.telemetry.pipeline import EMBED, MS, Pipeline, finish_pass, stages_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"


def end(call: object, status: str = "OK") -> None:
    call.end(status=status, stages=None, error_type=None, attributes={})  # type: ignore[attr-defined]


class TestSampling:
    async def test_a_callers_yes_is_honoured_and_its_span_is_the_parent(
        self, make_pipeline: Callable[..., Pipeline]
    ) -> None:
        pipeline = make_pipeline(ParentBased(ALWAYS_OFF))
        call = pipeline.calls.begin(EMBED, [("traceparent", SAMPLED), ("tracestate", "a=1,b=2")], 0, "")
        end(call)

        (server,) = pipeline.finish()

        assert call.trace_id == TRACE
        assert (int(TRACE, 16), int(SPAN, 16)) == (server.context.trace_id, server.parent.span_id)
        assert dict(server.context.trace_state) == {"a": "1", "b": "2"}

    async def test_a_callers_no_is_honoured(self, make_pipeline: Callable[..., Pipeline]) -> None:
        pipeline = make_pipeline(ParentBased(ALWAYS_ON))
        call = pipeline.calls.begin(EMBED, [("traceparent", UNSAMPLED)], 0, "")
        known_to_the_log = current_span_context.get()
        end(call)

        assert (call.context, call.trace_id) == (None, None)
        # The caller finds its lines by the id that it sent.
        assert known_to_the_log is not None
        assert (known_to_the_log.trace_id, known_to_the_log.trace_flags) == (int(TRACE, 16), 0)
        assert pipeline.finish() == []

    async def test_roots_are_sampled_by_ratio(self, make_pipeline: Callable[..., Pipeline]) -> None:
        pipeline = make_pipeline(ParentBased(TraceIdRatioBased(0.25)))

        sampled = sum(pipeline.calls.begin(EMBED, [], 0, "").context is not None for _ in range(4000))

        # 1000 expected with a deviation of 27: seven deviations either way
        assert 810 < sampled < 1190

    async def test_a_call_outside_the_sample_leaves_the_callers_ids_to_the_log(
        self, make_pipeline: Callable[..., Pipeline]
    ) -> None:
        pipeline = make_pipeline(ALWAYS_OFF)

        pipeline.calls.begin(EMBED, [("traceparent", SAMPLED)], 0, "")
        assert int(TRACE, 16) == current_span_context.get().trace_id  # type: ignore[union-attr]
        pipeline.calls.begin(EMBED, [], 0, "")
        assert current_span_context.get() is None


class TestForcing:
    """x-force-trace: 1, where the setting allows it."""

    FORCE: ClassVar[tuple[str, str]] = ("x-force-trace", "1")

    async def test_a_call_is_traced_whatever_the_sampler_says(self, make_pipeline: Callable[..., Pipeline]) -> None:
        pipeline = make_pipeline(ALWAYS_OFF, force_trace=True)
        end(pipeline.calls.begin(EMBED, [], time.monotonic_ns(), ""))
        end(call := pipeline.calls.begin(EMBED, [self.FORCE], time.monotonic_ns(), ""))

        (span,) = pipeline.finish()
        assert f"{span.context.trace_id:032x}" == call.trace_id
        assert span.attributes["embedserve.trace.forced"] is True

    async def test_it_is_in_the_trace_of_a_caller_that_does_not_sample(
        self, make_pipeline: Callable[..., Pipeline]
    ) -> None:
        pipeline = make_pipeline(ParentBased(ALWAYS_ON), force_trace=True)
        call = pipeline.calls.begin(EMBED, [("traceparent", UNSAMPLED), self.FORCE], time.monotonic_ns(), "")
        end(call)

        (span,) = pipeline.finish()
        assert call.trace_id == UNSAMPLED.split("-")[1]
        assert span.parent is not None
        assert f"{span.parent.span_id:016x}" == UNSAMPLED.split("-")[2]

    async def test_it_does_nothing_unless_allowed(self, make_pipeline: Callable[..., Pipeline]) -> None:
        pipeline = make_pipeline(ALWAYS_OFF)
        end(pipeline.calls.begin(EMBED, [self.FORCE], time.monotonic_ns(), ""))

        assert pipeline.finish() == []

    @pytest.mark.parametrize("value", ["0", "true", "", b"1", "1" * 10_000])
    async def test_only_a_1_asks(self, make_pipeline: Callable[..., Pipeline], value: str | bytes) -> None:
        pipeline = make_pipeline(ALWAYS_OFF, force_trace=True)
        end(pipeline.calls.begin(EMBED, [("x-force-trace", value)], time.monotonic_ns(), ""))

        assert pipeline.finish() == []

    async def test_a_batch_is_traced_for_one_forced_call_in_it(self, make_pipeline: Callable[..., Pipeline]) -> None:
        """The sampler that looks at links: who is traced takes its batch along."""
        pipeline = make_pipeline(ALWAYS_OFF, force_trace=True)
        calls = [pipeline.calls.begin(EMBED, metadata, time.monotonic_ns(), "") for metadata in ([], [self.FORCE], [])]
        finish_pass(pipeline, [call.context for call in calls], begun_ns=time.monotonic_ns())

        (batch,) = [span for span in pipeline.finish() if span.name == "batch"]
        assert [calls[1].trace_id] == [f"{link.context.trace_id:032x}" for link in batch.links]
        assert batch.attributes["embedserve.batch.requests"] == 3


class TestHostileMetadata:
    @pytest.mark.parametrize(
        "metadata",
        [
            [("traceparent", "")],
            [("traceparent", "00")],
            [("traceparent", f"ff-{TRACE}-{SPAN}-01")],
            [("traceparent", f"00-{'0' * 32}-{SPAN}-01")],
            [("traceparent", f"00-{TRACE}-{'0' * 16}-01")],
            [("traceparent", f"00-{TRACE.upper()}-{SPAN}-01")],
            [("traceparent", f"00-{TRACE}-{SPAN}-01-extra")],
            [("traceparent", "0" * 16_000)],
            [("traceparent", b"\xff\xfe")],
            [("traceparent", SAMPLED), ("traceparent", f"00-{'a' * 32}-{SPAN}-01")],
            [("tracestate", "a=1")],
            [("baggage", "a=1")],
        ],
        ids=lambda metadata: str(metadata)[:50],
    )
    def test_what_cannot_be_believed_counts_as_absent(self, metadata: list[tuple[str, str | bytes]]) -> None:
        assert Propagation().extract(metadata) is None

    @pytest.mark.parametrize("state", ["=", "a" * 600, "a=1," * 100, "\x00=1", ",,,", "a=1=2"])
    def test_a_bad_tracestate_does_not_cost_the_parent(self, state: str) -> None:
        found = Propagation().extract([("traceparent", SAMPLED), ("tracestate", state)])

        assert found is not None
        assert int(TRACE, 16) == found.trace_id

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["traceparent", "tracestate", "baggage", "other"]), st.one_of(st.text(), st.binary())
            )
        )
    )
    def test_nothing_that_can_be_sent_raises(self, metadata: list[tuple[str, str | bytes]]) -> None:
        """It is a parent that can be one, or none."""
        found = Propagation().extract(metadata)
        assert found is None or (found.is_valid and found.is_remote)


class TestMetrics:
    async def test_every_call_is_measured_sampled_or_not(self, make_pipeline: Callable[..., Pipeline]) -> None:
        pipeline = make_pipeline(ALWAYS_OFF)
        begun = time.monotonic_ns() - 20 * MS
        call = pipeline.calls.begin(EMBED, [], begun, "")
        call.end(status="OK", stages=stages_of(begun), error_type=None, attributes={})

        point = pipeline.instruments.histogram(table.RPC_DURATION).cell(EMBED, "OK").point(0)
        assert point.count == 1
        assert 0.02 <= point.sum < 1
        stage = {
            cell.attributes["stage"]: cell.point(0).sum
            for cell in pipeline.instruments.histogram(table.STAGE_DURATION).cells()
        }
        assert point.sum == pytest.approx(sum(stage.values()))
        assert pytest.approx((stage["admit"], stage["tokenize"], stage["queue"])) == (0.002, 0.002, 0.002)
        assert {1} == {cell.point(0).count for cell in pipeline.instruments.histogram(table.STAGE_DURATION).cells()}

    async def test_a_slow_upload_is_a_stage_too(self, pipeline: Pipeline) -> None:
        begun = time.monotonic_ns() - 50 * MS
        call = pipeline.calls.begin(EMBED, [], begun, "")
        call.end(status="OK", stages=stages_of(begun + 30 * MS), error_type=None, attributes={})

        stages = pipeline.instruments.histogram(table.STAGE_DURATION)
        assert stages.cell("receive").point(0).sum == pytest.approx(0.03)
        total = pipeline.instruments.histogram(table.RPC_DURATION).cell(EMBED, "OK").point(0).sum
        assert total == pytest.approx(sum(cell.point(0).sum for cell in stages.cells()))

    @pytest.mark.parametrize(
        ("status", "error_type", "attributes", "kind"),
        [
            ("INVALID_ARGUMENT", "InvalidRequest", {}, "expected"),
            ("RESOURCE_EXHAUSTED", "DRAIN_TIME_EXCEEDED", {"policy": "throughput"}, "expected"),
            ("DEADLINE_EXCEEDED", "DeadlineExpired", {}, "expected"),
            ("CANCELLED", "CANCELLED", {}, "expected"),
            ("UNAVAILABLE", "NOT_SERVING", {}, "expected"),
            ("UNAVAILABLE", "ENGINE_STALLED", {}, "unexpected"),
            ("INTERNAL", "ItemFailed", {"error_id": "0123"}, "unexpected"),
            ("RESOURCE_EXHAUSTED", "ItemTooLarge", {"error_id": "0123"}, "unexpected"),
            ("UNKNOWN", None, {}, "unexpected"),
        ],
    )
    async def test_faults_of_ours_are_told_from_what_callers_do(
        self, pipeline: Pipeline, status: str, error_type: str, attributes: dict[str, str], kind: str
    ) -> None:
        call = pipeline.calls.begin(EMBED, [], time.monotonic_ns(), "")
        call.end(status=status, stages=None, error_type=error_type, attributes=attributes)

        counted = {
            cell.attributes["kind"] for cell in pipeline.instruments.counter(table.RPC_ERRORS).cells() if cell.value
        }
        (span,) = pipeline.finish()
        assert counted == {kind} == {span.attributes["embedserve.error.kind"]}
        if kind == "unexpected":
            assert span.status.status_code is StatusCode.ERROR

    async def test_exemplars_lead_to_sampled_calls_only(self, make_pipeline: Callable[..., Pipeline]) -> None:
        pipeline = make_pipeline(ParentBased(ALWAYS_OFF))
        for header in (UNSAMPLED, SAMPLED, UNSAMPLED):
            end(pipeline.calls.begin(EMBED, [("traceparent", header)], time.monotonic_ns(), ""))

        (exemplar,) = pipeline.instruments.histogram(table.RPC_DURATION).cell(EMBED, "OK").point(0).exemplars
        assert int(TRACE, 16) == exemplar.trace_id

    async def test_exemplars_can_be_off(self, make_pipeline: Callable[..., Pipeline]) -> None:
        pipeline = make_pipeline(exemplars=False)
        end(pipeline.calls.begin(EMBED, [], time.monotonic_ns(), ""))

        assert pipeline.instruments.histogram(table.RPC_DURATION).cell(EMBED, "OK").point(0).exemplars == []

    async def test_active_calls_go_up_and_down(self, pipeline: Pipeline) -> None:
        cell = pipeline.instruments.counter(table.ACTIVE_CALLS).cell(EMBED)
        calls = [pipeline.calls.begin(EMBED, [], 0, "") for _ in range(3)]
        assert cell.value == 3
        for call in calls:
            end(call)
        assert cell.value == 0

    async def test_retries_are_counted_by_attempt(self, pipeline: Pipeline) -> None:
        """First attempts are not; the series are there from the start."""
        for attributes in ({}, {"attempt": 2}, {"attempt": 2}, {"attempt": 5}):
            call = pipeline.calls.begin(EMBED, [], 0, "")
            call.end(status="OK", stages=None, error_type=None, attributes=attributes)
        retries = pipeline.instruments.counter(table.RETRIES)

        assert [retries.cell(str(attempt)).value for attempt in (2, 3, 4, 5)] == [2, 0, 0, 1]

    async def test_methods_and_statuses_that_nobody_knows_make_one_series(self, pipeline: Pipeline) -> None:
        before = len(pipeline.instruments.histogram(table.RPC_DURATION).cells())
        for number in range(500):
            end(pipeline.calls.begin(f"x.Y/Z{number}", [], 0, ""), status=f"S{number}")

        series = pipeline.instruments.histogram(table.RPC_DURATION).cells()
        (other,) = [cell for cell in series[before:] if cell.point(0).count]
        assert other.attributes == {
            "rpc.system.name": "grpc",
            "rpc.method": "_OTHER",
            "rpc.response.status_code": "UNKNOWN",
        }
        assert other.point(0).count == 500

    async def test_the_lag_of_the_loop_is_measured_while_calls_are_active_and_not_after(
        self, pipeline: Pipeline
    ) -> None:
        assert not pipeline.calls.lag.armed
        call = pipeline.calls.begin(EMBED, [], 0, "")
        cell = pipeline.instruments.histogram(table.LOOP_LAG).cell()
        time.sleep(0.15)  # noqa: ASYNC251 - the stall itself
        async with asyncio.timeout(5):
            while not cell.point(0).count:  # noqa: ASYNC110 - the timer has no event to wait for
                await asyncio.sleep(0)
        assert cell.point(0).sum >= 0.04

        end(call)
        async with asyncio.timeout(5):
            while pipeline.calls.lag.armed:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


class TestAccessLog:
    async def test_it_is_told_of_every_end(self, pipeline: Pipeline) -> None:
        call = pipeline.calls.begin(EMBED, [], time.monotonic_ns() - MS, "ipv4:1.2.3.4:5")
        call.end(status="INTERNAL", stages=None, error_type="ItemFailed", attributes={"texts": 1})

        (told,) = pipeline.ended
        assert (
            told.method,
            told.status,
            told.error_type,
            told.peer,
        ) == (EMBED, "INTERNAL", "ItemFailed", "ipv4:1.2.3.4:5")
        assert told.duration_ns >= MS
