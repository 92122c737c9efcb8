"""What the API tells whoever watches its calls.

Decides which events a call has. Must never know OpenTelemetry: telemetry implements this protocol. One
``CallObserver`` is asked at the arrival of every RPC but health and reflection, and gives a ``CallTrace`` that sees
the call to its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from embedserve.engine.stages import Stages

__all__ = ["CallObserver", "CallTrace", "SilentCallObserver", "SilentCallTrace"]

Metadata = Sequence[tuple[str, str | bytes]]


class CallTrace(Protocol):
    """One RPC, from arrival to its final status.

    ``end`` is called exactly once, on the event loop, after the answer is built.
    """

    @property
    def context(self) -> object | None:
        """Opaque handle that the engine passes on so that batches can link here; ``None`` when not sampled."""

    @property
    def trace_id(self) -> str | None:
        """32 hex digits for the ``x-trace-id`` metadata; ``None`` when not sampled."""

    def end(
        self,
        *,
        status: str,
        stages: Stages | None,
        error_type: str | None,
        attributes: Mapping[str, str | int | float | bool],
    ) -> None:
        """The call is over.

        ``status`` is a gRPC status name such as ``OK``; ``error_type`` a low-cardinality word (``errors`` class name
        or an admission policy's reason) when it is not OK; ``attributes`` what the API knows: texts, tokens, model,
        encoding, dimensions, and, for a refusal, the policy and its figures. Must not raise and must not block.
        """


class CallObserver(Protocol):
    """Watches RPCs."""

    def begin(self, method: str, metadata: Metadata, arrived_ns: int, peer: str) -> CallTrace:
        """A call arrived. ``method`` is the full name without a leading slash; ``arrived_ns`` is monotonic."""


class SilentCallTrace:
    """No trace, at no cost."""

    context: object | None = None
    trace_id: str | None = None

    def end(
        self,
        *,
        status: str,
        stages: Stages | None,
        error_type: str | None,
        attributes: Mapping[str, str | int | float | bool],
    ) -> None:
        """Nothing."""


class SilentCallObserver:
    """Watches nothing."""

    def begin(self, method: str, metadata: Metadata, arrived_ns: int, peer: str) -> SilentCallTrace:  # noqa: ARG002
        """Nothing."""
        return _SILENT


_SILENT = SilentCallTrace()
