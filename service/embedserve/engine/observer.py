"""What the engine tells whoever watches it.

Decides which events there are. Must never know OpenTelemetry: telemetry implements this protocol, tests record it, and
``SilentObserver`` is what runs when nothing watches. Every call comes from the event loop, must not block and must not
raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from embedserve.engine.stages import Stages
from embedserve.model.backend import PassTimes
from embedserve.scheduling.item import Batch, Rejection

__all__ = ["BatchRecord", "EngineObserver", "Member", "SilentObserver"]


class Member(NamedTuple):
    """A request's share of a batch."""

    trace: object | None
    """The request's trace context, as the API gave it; ``None`` when it is not sampled."""
    first_index: int
    """Lowest index, in its request, of the items that ride here."""
    rows: int
    tokens: int
    queued_ns: int
    """When its items began to wait."""


class BatchRecord(NamedTuple):
    """One forward pass, whatever became of it."""

    batch: Batch
    members: Sequence[Member]
    outcome: str
    """``ok``, ``out_of_memory``, ``failed``, ``non_finite``, ``fatal``, or ``skipped``: nobody wanted it any more."""
    dispatched_ns: int
    """The loop handed it to the worker."""
    times: PassTimes | None
    """The worker's own marks; ``None`` when the pass did not end well."""
    returned_ns: int
    """The loop has the result."""
    predicted_ns: int
    """What the cost model said of the pass."""
    error: BaseException | None = None
    """What the pass raised; for the log, never for a client."""
    trace: object | None = None
    """What ``batch_dispatched`` gave for it; ``None`` where no member was sampled."""
    shared_ns: int = 0
    """Of its time, what passes that ended before it had too: taken off where the device's time is counted."""


class EngineObserver(Protocol):
    """Watches the engine."""

    def tokenized(self, texts: int, tokens: int, waited_ns: int, elapsed_ns: int) -> None:
        """A tokenizer thread has finished some texts; ``waited_ns`` for a thread, ``elapsed_ns`` at work."""

    def admitted(self, items: int, tokens: int) -> None:
        """A request waits in its buckets."""

    def rejected(self, rejection: Rejection, *, stage: str) -> None:
        """A request was refused; ``stage`` is ``unread``, ``estimate`` (before tokenising) or ``exact``."""

    def batch_dispatched(self, batch_id: int) -> object | None:
        """A batch with a sampled request in it was handed to the worker.

        Returns a handle that the traces of its members can link to, or ``None`` where batches are not traced. Given
        now, and not when the pass ends: who expires meanwhile, or rides in a pass that fails, has a link as well.
        """

    def batch_finished(self, record: BatchRecord) -> None:
        """A pass ended; ``record.trace`` is its handle."""

    def settled(self, verdict: str, items: int) -> None:
        """Items ended; ``verdict`` is a ``scheduling.item.Verdict`` value or ``cancelled``."""

    def stalled(self) -> None:
        """The device is silent for longer than a pass may take."""

    def canary(self, outcome: str) -> None:
        """A known text was sent through: ``ok``, ``timed_out``, ``refused`` (the queue was full) or ``wrong``."""

    def model_swapped(self, variant: str, compile_s: float, *, cached: bool) -> None:
        """From the next pass on another form of the model runs: ``compiled``, or ``eager`` where one is taken back.

        ``compile_s`` is how long it took to make, 0 for one that was there already; ``cached`` that it was read from
        a cache of compiled code, and not made anew.
        """

    def compile_failed(self, compile_s: float) -> None:
        """A compiled model could not be made, after so long; the one that runs stays."""

    def request_finished(self, stages: Stages, *, verdict: str) -> None:
        """A request left the engine: ``done``, ``expired``, ``cancelled``, ``failed`` or ``rejected``."""


class SilentObserver:
    """Watches nothing, at no cost."""

    def tokenized(self, texts: int, tokens: int, waited_ns: int, elapsed_ns: int) -> None:
        """Nothing."""

    def admitted(self, items: int, tokens: int) -> None:
        """Nothing."""

    def rejected(self, rejection: Rejection, *, stage: str) -> None:
        """Nothing."""

    def batch_dispatched(self, batch_id: int) -> object | None:  # noqa: ARG002
        """Nothing."""
        return None

    def batch_finished(self, record: BatchRecord) -> None:
        """Nothing."""

    def settled(self, verdict: str, items: int) -> None:
        """Nothing."""

    def stalled(self) -> None:
        """Nothing."""

    def canary(self, outcome: str) -> None:
        """Nothing."""

    def model_swapped(self, variant: str, compile_s: float, *, cached: bool) -> None:
        """Nothing."""

    def compile_failed(self, compile_s: float) -> None:
        """Nothing."""

    def request_finished(self, stages: Stages, *, verdict: str) -> None:
        """Nothing."""
