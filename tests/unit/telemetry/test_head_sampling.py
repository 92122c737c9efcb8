"""Calls are sampled as OpenTelemetry's own samplers would have it, whether they are asked or not."""

from __future__ import annotations

import random

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState, set_span_in_context

from embedserve.telemetry import head_sampling
from embedserve.telemetry.head_sampling import HeadSampling, new_context

STATE = TraceState([("vendor", "1")])


class EvenIds(TraceIdRatioBased):
    """One of the user's own, which decides by something else than the ratio."""

    def should_sample(self, parent_context: object, trace_id: int, *_: object, **__: object) -> SamplingResult:
        return SamplingResult(Decision.DROP if trace_id % 2 else Decision.RECORD_AND_SAMPLE, trace_state=STATE)


class TestHeadSampling:
    @pytest.mark.parametrize(
        "sampler",
        [
            ParentBased(TraceIdRatioBased(0.3)), TraceIdRatioBased(0.0), TraceIdRatioBased(1.0),
            ParentBased(ALWAYS_ON), ALWAYS_OFF, EvenIds(0.5), ParentBased(EvenIds(0.5)),
        ],
    )  # fmt: skip
    def test_a_call_without_a_parent(self, monkeypatch: pytest.MonkeyPatch, sampler: Sampler) -> None:
        rng = random.Random(7)
        sampling = HeadSampling(sampler)
        for _ in range(300):
            trace_id = rng.getrandbits(128)
            monkeypatch.setattr(head_sampling, "_bits", lambda bits, given=trace_id: given if bits == 128 else 5)
            result = sampler.should_sample(Context(), trace_id, "m")
            expected = new_context(trace_id, result.trace_state) if result.decision.is_sampled() else None
            assert sampling.sampled("m", None) == expected

    @pytest.mark.parametrize("flags", [0, 1])
    @pytest.mark.parametrize("sampler", [ParentBased(TraceIdRatioBased(0.5)), TraceIdRatioBased(0.5)])
    def test_a_call_with_a_parent_goes_by_the_sampler(self, sampler: Sampler, flags: int) -> None:
        sampling = HeadSampling(sampler)
        rng = random.Random(7)
        for _ in range(50):
            parent = SpanContext(rng.getrandbits(128), 9, True, TraceFlags(flags), STATE)
            context = set_span_in_context(NonRecordingSpan(parent), Context())
            result = sampler.should_sample(context, parent.trace_id, "m")
            found = sampling.sampled("m", parent)
            assert (found is not None) == result.decision.is_sampled()
            if found is not None:
                assert (found.trace_id, found.trace_state) == (parent.trace_id, result.trace_state)

    def test_ids_are_new_each_time_and_never_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert len({new_context().trace_id for _ in range(1000)}) == 1000
        monkeypatch.setattr(head_sampling, "_bits", lambda _: 0)
        assert new_context().is_valid
