"""Which shapes of a packed pass have a CUDA graph, and which of them a batch takes.

Decides the rungs. A key is the tokens of a pass, the longest length that its attention kernel is made for, and its
rows. All three are numbers in the graph: a batch is filled up to its key, and one that no key covers runs without a
graph. Must never know torch, nor how a graph is captured. Pure.

Source: a budget of tokens for each graph as in vLLM's encoder graphs; the longest length and the rows in the key as in
TensorRT-LLM's encoder runner. A longest length that is not in the key is a number of the batch that was captured
(transformers#45323).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Final, NamedTuple

__all__ = ["GraphKey", "Ladder"]

TOKENS_MIN: Final = 64
"""The lowest rung. Eight queries of ten tokens fill it; a floor of 256 would compute three times what they need."""
TOKENS_STEP: Final = 64
"""Rungs are multiples of it, so that no matrix product has a ragged edge."""
LENGTH_MIN: Final = 128
"""The lowest class of lengths: flash attention works on tiles of 128 rows, and a finer class would change nothing."""
ROWS_MIN: Final = 8
ROWS_FACTOR: Final = 8
"""Between classes of rows. Coarse: a row that is not there is an empty block of the attention, which returns at
once."""


class GraphKey(NamedTuple):
    """What one graph was captured for. Ordered by what it costs."""

    tokens: int
    length: int
    """The longest row that its attention sees whole."""
    rows: int

    def example(self) -> list[int]:
        """Lengths of rows that this key serves: one of the longest, the others alike, as many tokens as fit."""
        first = min(self.length, self.tokens)
        others = min(self.rows - 1, self.tokens - first)
        return [first] + [min(self.length, (self.tokens - first) // others)] * others if others else [first]


class Ladder:
    """The keys within the limits of a batch."""

    def __init__(self, *, tokens_max: int, length_max: int, rows_max: int, growth: float, tiles_max: int = 0) -> None:
        """``growth`` is the factor between rungs of tokens: what a pass computes in vain at the most.

        ``tiles_max`` is one class of lengths more: up to it a pass takes another kernel, and so has graphs of its own.
        """
        assert tokens_max >= 1, "a pass has a token"
        assert length_max >= 1, "a row has a token"
        assert rows_max >= 1, "a pass has a row"
        assert growth > 1, "rungs ascend"
        self.tokens = tuple(_tokens(tokens_max, growth))
        last = min(length_max, self.tokens[-1])
        own = {tiles_max} if 0 < tiles_max < last else set()
        self.lengths = tuple(sorted({*_classes(LENGTH_MIN, last, 2), *own}))
        self.rows = tuple(_classes(ROWS_MIN, rows_max, ROWS_FACTOR))

    def key_for(self, tokens: int, longest: int, rows: int) -> GraphKey | None:
        """The smallest key that covers a batch, or ``None`` where none does."""
        places = bisect_left(self.tokens, tokens), bisect_left(self.lengths, longest), bisect_left(self.rows, rows)
        if places[0] == len(self.tokens) or places[1] == len(self.lengths) or places[2] == len(self.rows):
            return None
        return GraphKey(self.tokens[places[0]], self.lengths[places[1]], self.rows[places[2]])

    def keys(self) -> tuple[GraphKey, ...]:
        """Every key that some batch takes, the largest first: what it needs of memory is there for all after it."""
        return tuple(sorted(self._taken(), reverse=True))

    def _taken(self) -> Iterator[GraphKey]:
        for over_tokens, tokens in _steps(self.tokens):
            for over_length, length in _steps(self.lengths):
                for over_rows, rows in _steps(self.rows):
                    fewest = over_length + 1 + over_rows  # one row just of this class, all others of one token
                    most = rows * length
                    if fewest <= tokens and most > over_tokens:
                        yield GraphKey(tokens, length, rows)


def _tokens(tokens_max: int, growth: float) -> Iterator[int]:
    last = _stepped(tokens_max)
    rung = min(TOKENS_MIN, last)
    while rung < last:
        yield rung
        # Down to a step, so that no pass is filled up by more than the factor; at least a step, so that they ascend.
        rung = max(rung + TOKENS_STEP, int(rung * growth) // TOKENS_STEP * TOKENS_STEP)
    yield last


def _stepped(tokens: int) -> int:
    return -(-tokens // TOKENS_STEP) * TOKENS_STEP


def _classes(first: int, last: int, factor: int) -> Iterator[int]:
    edge = first
    while edge < last:
        yield edge
        edge *= factor
    yield last


def _steps(edges: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Each edge, with the one below it."""
    return zip((0, *edges), edges, strict=False)
