"""Whether a call is traced, and the ids of what is.

Decides for a call without a parent by its trace id alone where the sampler does so too. Must never know calls. Any
sampler of OpenTelemetry's may stand behind it; asked through its own interface one costs 3 us a call, which most calls
would pay to hear no.
"""

from __future__ import annotations

import random
from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, TraceState, set_span_in_context

from embedserve.telemetry import semconv

__all__ = ["HeadSampling", "new_context"]

_ROOT: Final = Context()
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_bits: Final = random.getrandbits
"""Ids must differ, not be secret; this generator is seeded anew in a process that is forked."""


def new_context(trace_id: int = 0, state: TraceState | None = None) -> SpanContext:
    """The context of a new span that is sampled, in the trace ``trace_id`` or one of its own."""
    return SpanContext(trace_id or _bits(128) or 1, _bits(64) or 1, False, _SAMPLED, state)


class HeadSampling:
    """A sampler, asked once a call. Any thread."""

    def __init__(self, sampler: Sampler) -> None:
        """Ask ``sampler``."""
        self._sampler = sampler
        root = sampler._root if type(sampler) is ParentBased else sampler  # noqa: SLF001 - it has no public name
        # None: calls without a parent ask the sampler too.
        self._bound = root.bound if type(root) is TraceIdRatioBased else None

    def sampled(self, method: str, parent: SpanContext | None) -> SpanContext | None:
        """The context of the span of a call; ``None`` when it is not sampled."""
        if parent is not None:
            parent_context = set_span_in_context(NonRecordingSpan(parent), _ROOT)
            return self._asked(method, parent.trace_id, parent_context)
        trace_id = _bits(128) or 1
        if self._bound is None:
            return self._asked(method, trace_id, _ROOT)
        # As TraceIdRatioBased has it, which has no state to add.
        return new_context(trace_id) if trace_id & TraceIdRatioBased.TRACE_ID_LIMIT < self._bound else None

    def forced(self, parent: SpanContext | None) -> SpanContext:
        """The context of the span of a call that the sampler has left out."""
        return new_context() if parent is None else new_context(parent.trace_id, parent.trace_state)

    def _asked(self, method: str, trace_id: int, parent_context: Context) -> SpanContext | None:
        attributes = {semconv.RPC_SYSTEM_NAME: semconv.GRPC, semconv.RPC_METHOD: method}
        result = self._sampler.should_sample(parent_context, trace_id, method, SpanKind.SERVER, attributes, ())
        if result.decision is not Decision.RECORD_AND_SAMPLE:
            return None
        return new_context(trace_id, result.trace_state)
