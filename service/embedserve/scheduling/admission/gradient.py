"""Backpressure by an adaptive limit on tokens in flight: it finds the limit itself.

Decides by Gradient2 of Netflix's concurrency-limits (``Gradient2Limit``, 2018) with another signal. There it is the
round trip over its long-term mean; under dynamic batching the round trip rises with load although nothing queues in
vain (1.2 ms without load, 28 ms at 95 %), and the raw gradient would throttle a healthy device. Here:

    s = wait / (batching_ratio * time of the pass it rode in)     about 1 at every load, as long as one pass takes
                                                                  all that waits
    g = clamp(tolerance / s, gradient_min, 1)
    limit = (1 - smoothing) * limit + smoothing * (g * limit + headroom)

once a pass, with the mean of ``s`` over its requests; ``limit`` counts tokens that wait or run. It grows only while at
least half of it is used, so that an idle night teaches nothing. The floor of 2 batches keeps one running and one
waiting: the device never starves. Where it comes to rest ``limit * (1 - g) = headroom``: about 3 batches, a wait of 2
to 3 passes, whatever a pass takes (``cpu_2x_1000ms_gradient`` and its like in the simulation).

A pass is full by its items, too: each text counts for its share of one at least, whatever it has of tokens. Else very
short texts would be dozens of passes within a limit of two.

A timeout counts as a wait of twice the tolerance at least: how long it would have taken, nobody knows.
"""

from __future__ import annotations

from collections.abc import Mapping

from embedserve.scheduling.admission import Candidate, LoadState, retry_after_ms
from embedserve.scheduling.item import Rejection
from embedserve.scheduling.settings import GradientSettings

__all__ = ["GradientPolicy"]


class GradientPolicy:
    """A limit on tokens in flight that follows how long requests wait, in passes."""

    name = "gradient"

    __slots__ = ("_count", "_ended_ns", "_peak", "_settings", "_signal", "_sum", "limit_tokens")

    def __init__(self, settings: GradientSettings) -> None:
        self._settings = settings
        self.limit_tokens = float(settings.floor_tokens)
        """Tokens that may wait or run."""
        self._ended_ns = -1
        self._sum = 0.0
        self._count = 0
        self._peak = 0.0
        self._signal = 0.0

    def judge(self, candidate: Candidate, load: LoadState, now_ns: int) -> Rejection | None:  # noqa: ARG002
        """Refuses what would pass the limit; never on an idle server.

        What is larger than half of the limit by itself is taken once half of the limit is free: else it never were.
        """
        limit = self.limit_tokens
        item_tokens = self._settings.item_tokens
        held = max(load.waiting_tokens + load.running_tokens, (load.waiting_items + load.running_items) * item_tokens)
        own = max(candidate.tokens, candidate.items * item_tokens)
        reach = held + min(own, limit / 2)
        if not candidate.advisory:
            self._peak = max(self._peak, reach)
        if reach <= limit or load.idle:
            return None
        return Rejection(
            "gradient",
            "TOKENS_IN_FLIGHT_EXCEEDED",
            retry_after_ms(load.drain_ns * min((reach - limit) / held, 1.0)),
            {"in_flight_tokens": float(held), "limit_tokens": limit, "tokens": float(own)},
        )

    def observe_wait(self, wait_ns: int, pass_ns: int, now_ns: int) -> None:
        """A request was done: its wait, its pass included, and the predicted time of that pass alone."""
        self._observe(wait_ns / (self._settings.batching_ratio * max(pass_ns, 1)), now_ns)

    def observe_sojourn(self, sojourn_ns: int, now_ns: int, *, timed_out: bool) -> None:  # noqa: ARG002
        """Only timeouts enter: sojourns hold times that are not the device's."""
        if timed_out:
            self._observe(2 * self._settings.tolerance, now_ns)

    def figures(self, now_ns: int) -> Mapping[str, float]:  # noqa: ARG002
        """The limit, what an item counts at least, and the signal of the last pass."""
        return {
            "limit_tokens": self.limit_tokens,
            "item_tokens": self._settings.item_tokens,
            "signal": self._signal,
        }

    def _observe(self, signal: float, now_ns: int) -> None:
        # Requests of one pass end at one instant: a later one closes the books of the pass before it.
        if now_ns != self._ended_ns and self._count:
            self._move()
        self._ended_ns = now_ns
        self._sum += signal
        self._count += 1

    def _move(self) -> None:
        s = self._settings
        self._signal = signal = self._sum / self._count
        gradient = min(max(s.tolerance / signal, s.gradient_min), 1.0) if signal > 0 else 1.0
        moved = self.limit_tokens * (1 - s.smoothing)
        moved += s.smoothing * (gradient * self.limit_tokens + s.headroom_tokens)
        if moved <= self.limit_tokens or self._peak >= self.limit_tokens / 2:
            self.limit_tokens = min(max(moved, s.floor_tokens), s.ceiling_tokens)
        self._sum, self._count, self._peak = 0.0, 0, 0.0
