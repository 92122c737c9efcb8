"""Who tells ``Recent`` what happens: observers that stand before those that the core has anyway, and pass all on.

Decides which calls are watched. Must never know what is kept of them. Event loop only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from embedserve.api.observer import CallObserver, CallTrace, Metadata
from embedserve.engine.observer import BatchRecord, EngineObserver
from embedserve.engine.stages import Stages
from embedserve.telemetry.recent import UNARY, Recent

__all__ = ["RecentCalls", "RecentEngine"]

WATCHED: Final = frozenset({UNARY, UNARY + "Stream", "embedserve.v1.EmbeddingService/CountTokens"})
"""The calls that cost something. Load and model queries would dilute every share."""


class _WatchedCall:
    """A ``CallTrace`` that is told on."""

    __slots__ = ("_arrived_ns", "_inner", "_method", "_recent")

    def __init__(self, recent: Recent, inner: CallTrace, method: str, arrived_ns: int) -> None:
        self._recent = recent
        self._inner = inner
        self._method = method
        self._arrived_ns = arrived_ns

    @property
    def context(self) -> object | None:
        """The inner one's."""
        return self._inner.context

    @property
    def trace_id(self) -> str | None:
        """The inner one's."""
        return self._inner.trace_id

    def end(
        self,
        *,
        status: str,
        stages: Stages | None,
        error_type: str | None,
        attributes: Mapping[str, str | int | float | bool],
    ) -> None:
        """The call is over."""
        self._recent.in_flight -= 1
        self._inner.end(status=status, stages=stages, error_type=error_type, attributes=attributes)
        recent = self._recent
        trace_id = self._inner.trace_id
        recent.note_ended(
            (recent.clock(), self._method, self._arrived_ns, status, stages, error_type, attributes, trace_id)
        )


class RecentCalls:
    """A ``CallObserver`` that notes the calls that cost something, and passes all on to another one."""

    def __init__(self, recent: Recent, inner: CallObserver) -> None:
        self._recent = recent
        self._inner = inner

    def begin(self, method: str, metadata: Metadata, arrived_ns: int, peer: str) -> CallTrace:
        """A call arrived."""
        trace = self._inner.begin(method, metadata, arrived_ns, peer)
        if method not in WATCHED:
            return trace
        self._recent.in_flight += 1
        return _WatchedCall(self._recent, trace, method, arrived_ns)


class RecentEngine:
    """An ``EngineObserver`` that notes passes, tokenizer work and the device's health, and passes all on."""

    def __init__(self, recent: Recent, inner: EngineObserver) -> None:
        self._recent = recent
        self._inner = inner
        # What is not noted here goes straight to the other one, at no cost.
        self.admitted = inner.admitted
        self.rejected = inner.rejected
        self.batch_dispatched = inner.batch_dispatched
        self.settled = inner.settled
        self.request_finished = inner.request_finished
        self.model_swapped = inner.model_swapped
        self.compile_failed = inner.compile_failed

    def tokenized(self, texts: int, tokens: int, waited_ns: int, elapsed_ns: int) -> None:
        """A tokenizer thread has finished some texts."""
        self._recent.tokenized(waited_ns, elapsed_ns)
        self._inner.tokenized(texts, tokens, waited_ns, elapsed_ns)

    def batch_finished(self, record: BatchRecord) -> None:
        """A pass ended."""
        self._recent.batch_finished(record)
        self._inner.batch_finished(record)

    def stalled(self) -> None:
        """The device is silent."""
        self._recent.stalled()
        self._inner.stalled()

    def canary(self, outcome: str) -> None:
        """A known text has come back, or has not."""
        self._recent.canary_sent(outcome)
        self._inner.canary(outcome)
