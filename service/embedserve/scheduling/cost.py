"""What items cost: bucket edges, computed tokens, and how long a pass of so many tokens takes.

Decides the length of every prediction. Must never know why a pass ran or who waits for it; learns from the device time
of completed passes only, never from hand-over or idle time, so that an idle hour does not make the device look slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

__all__ = ["Buckets", "CostModel", "Group"]

Group = tuple[int, Sequence[int], list[int]]
"""Bucket ordinal, item indexes ascending, running sum of their tokens (one longer, starts at 0)."""


class Buckets:
    """Length classes of items: bucket ``k`` holds the lengths over edge ``k - 1`` and up to edge ``k``."""

    __slots__ = ("edges", "limit", "ordinal")

    def __init__(self, edges: tuple[int, ...]) -> None:
        self.edges = edges
        self.limit = edges[-1]
        """The longest item that any bucket takes, tokens."""
        # A table from length to bucket costs 8 bytes a length and makes grouping 10,000 items a matter of 1 ms.
        table: list[int] = []
        for k, edge in enumerate(edges):
            table += [k] * (edge + 1 - len(table))
        self.ordinal = table

    def edge_of(self, tokens: int) -> int:
        """The edge that an item of ``tokens`` is padded to."""
        return self.edges[self.ordinal[tokens]]

    def groups(self, tokens: Sequence[int]) -> list[Group]:
        """Items by bucket, shortest bucket first; O(items), the one scan that a submission gets."""
        ordinal = self.ordinal
        if len(tokens) == 1:
            return [(ordinal[tokens[0]], (0,), [0, tokens[0]])]
        ordinals = [ordinal[t] for t in tokens]
        first = ordinals[0]
        if ordinals.count(first) == len(ordinals):
            return [(first, range(len(tokens)), [*accumulate(tokens, initial=0)])]
        indexes: list[list[int]] = [[] for _ in self.edges]
        for i, k in enumerate(ordinals):
            indexes[k].append(i)
        return [(k, own, [*accumulate((tokens[i] for i in own), initial=0)]) for k, own in enumerate(indexes) if own]


class CostModel:
    """Time of a pass as ``a + b * T`` over its computed tokens ``T``, learned online.

    The linear batch service model of Inoue (Queueing models for dynamic batching, 2021), fitted by exponentially
    weighted least squares. The slope is drawn towards the slope of the first guess, scaled to what was measured, as
    long as all passes have had nearly one size and the data say nothing about it (ridge); so it is sane from the
    first sample on.
    """

    __slots__ = (
        "_busy_ns",
        "_guess_a",
        "_guess_b",
        "_memory",
        "_pass_ns",
        "_useful",
        "_w",
        "_x",
        "_xx",
        "_xy",
        "batch_ns",
        "last_ns",
        "padding",
        "pass_tokens",
        "samples",
        "token_ns",
        "tokens_per_second",
    )

    RIDGE = 0.1
    """Sizes that spread less than this part of their mean say little about the slope."""
    FIXED_SHARE = 0.1
    """A pass that is cut short for a deadline may waste this part of its time."""
    OUTLIER = 10.0
    """A pass that took this many times its prediction counts as so many times: one stall must not rule the fit."""

    def __init__(self, batch_ns: int, token_ns: int, memory: float, max_batch_tokens: int) -> None:
        self._guess_a = float(batch_ns)
        self._guess_b = float(token_ns)
        self._memory = memory
        self.batch_ns = float(batch_ns)
        """``a``: fixed cost of a pass."""
        self.token_ns = float(token_ns)
        """``b``: cost of each computed token."""
        self.padding = 1.0
        """Computed tokens over useful ones, lately."""
        self.pass_tokens = 0.0
        """Computed tokens of a pass, lately; 0 before the first."""
        self.tokens_per_second = max_batch_tokens * 1e9 / self.predict_ns(max_batch_tokens)
        """Useful tokens per second of device time, lately; the guess at a full batch before the first pass."""
        self.samples = 0
        self.last_ns: int | None = None
        """When the last pass was learned."""
        self._pass_ns = 0.0
        self._w = self._x = self._xx = self._xy = 0.0
        self._busy_ns = self._useful = 0.0

    def predict_ns(self, padded_tokens: int) -> int:
        """Device time of one pass over so many computed tokens."""
        return int(self.batch_ns + self.token_ns * padded_tokens)

    def drain_ns(self, tokens: int, items: int, max_batch_tokens: int, max_batch_items: int) -> int:
        """Device time to work off so many useful tokens in the fullest batches that the limits allow."""
        if tokens <= 0:
            return 0
        padded = tokens * self.padding
        passes = max(-(-padded // max_batch_tokens), -(-items // max_batch_items), 1)
        return int(passes * self.batch_ns + padded * self.token_ns)

    def ride_ns(self, tokens: int, behind: int, window_ns: int, max_batch_tokens: int) -> tuple[int, int]:
        """What those behind add to the last pass of ``tokens`` useful tokens, and the time of that pass with them.

        A pass ends for all its riders at once: those who wait ``behind`` now, and those who come within ``window_ns``,
        the time until it is closed. They come as fast as lately, a pass's tokens in a pass's time, or more slowly.
        """
        last = tokens * self.padding % max_batch_tokens
        extra = self.pass_tokens if window_ns >= self._pass_ns else self.pass_tokens * window_ns / self._pass_ns
        if behind:
            extra += behind * self.padding
        if last + extra > max_batch_tokens:
            extra = max_batch_tokens - last
        extra_ns = int(extra * self.token_ns)
        return extra_ns, int(self.batch_ns + last * self.token_ns) + extra_ns

    def tokens_within(self, time_ns: float) -> float:
        """Computed tokens of the longest pass that ends within so long."""
        return (time_ns - self.batch_ns) / self.token_ns

    def batch_tokens(self, time_ns: int, floor: int, limit: int) -> int:
        """Computed tokens of the fullest pass that ends within so long, from ``floor`` to ``limit``.

        No heed is paid to the fixed cost's share: while all passes have one size the fit may take all of it for fixed,
        and a limit that follows would grow without end.
        """
        within = self.tokens_within(time_ns)
        return limit if within >= limit else min(max(int(within), floor), limit)

    @property
    def least_tokens(self) -> float:
        """Computed tokens from which a pass spends no more than ``FIXED_SHARE`` of its time on its fixed cost."""
        return self.batch_ns / self.token_ns * (1 / self.FIXED_SHARE - 1)

    def learn(self, tokens: int, padded_tokens: int, elapsed_ns: int, now_ns: int) -> None:
        """Takes one completed pass into the fit; ``elapsed_ns`` is its device time."""
        elapsed = float(max(elapsed_ns, 1))
        if self.samples:
            elapsed = min(elapsed, self.OUTLIER * (self.batch_ns + self.token_ns * padded_tokens))
        keep, x = self._memory, float(padded_tokens)
        self._w = w = self._w * keep + 1.0
        self._x = sum_x = self._x * keep + x
        self._xx = self._xx * keep + x * x
        self._xy = self._xy * keep + x * elapsed
        self._busy_ns = busy = self._busy_ns * keep + elapsed
        self._useful = useful = self._useful * keep + tokens
        self.samples += 1
        self.last_ns = now_ns
        self.padding = sum_x / useful
        self.tokens_per_second = useful * 1e9 / busy
        self.pass_tokens = sum_x / w
        self._pass_ns = busy / w
        self._fit(self.pass_tokens, self._pass_ns)

    def _fit(self, mean_x: float, mean_y: float) -> None:
        w = self._w
        variance = max(self._xx / w - mean_x * mean_x, 0.0)
        covariance = self._xy / w - mean_x * mean_y
        # The guess knows the ratio of a to b better than one size of batch does; its scale comes from the data.
        slope = self._guess_b * mean_y / (self._guess_a + self._guess_b * mean_x)
        ridge = (self.RIDGE * mean_x) ** 2
        fitted = (covariance + ridge * slope) / (variance + ridge)
        # Neither a negative fixed cost nor a token that costs next to nothing is physical; both come from noise.
        ceiling = mean_y / mean_x
        self.token_ns = min(max(fitted, 0.05 * ceiling), ceiling)
        self.batch_ns = max(mean_y - self.token_ns * mean_x, 0.0)
