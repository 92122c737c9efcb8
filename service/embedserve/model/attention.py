"""Attention over packed rows: each row sees itself, and no padding is computed.

Decides how transformers hands a packed pass over (``Packing``), and how one attends on a CPU: one scaled-dot-product
call for each group of rows of equal length. ``cuda/rows_attention.py`` has the others. Must never know a model:
transformers calls it through its attention interface, by name. Source: transformers' ``AttentionInterface``; the name
is not in ``AttentionMaskInterface``, so that no mask is built.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from embedserve.model.layout import AttentionGroup, Packed, attention_groups

__all__ = ["PACKED_ATTENTION", "GroupedRows", "Packing", "States"]

PACKED_ATTENTION = "embedserve_packed"
"""The name under which transformers finds ``packed_attention``."""


class States(NamedTuple):
    """One layer's states, each ``[tokens, heads, width]``, and how it attends."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float | None
    window: int | None
    """Tokens to either side that a token sees; ``None`` where it sees its whole row."""


class Packing(Protocol):
    """How the rows of one packed pass attend; made once, used by every layer."""

    def attend(self, states: States) -> Tensor:
        """The attention of each token over its own row, ``[tokens, heads, width]``."""


def packed_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed pass: ``[1, heads, tokens, width]`` in, ``[1, tokens, heads, width]`` out.

    ``sliding_window`` counts the token itself, as transformers hands it down: 65 is 64 to either side.
    """
    assert attention_mask is None, "a packed pass has no mask"
    # Tokens first: that is how the projections left them, so that a group of rows is a view and not a copy.
    states = States(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling,
        None if sliding_window is None else sliding_window - 1,
    )
    return packing.attend(states)[None], None


class GroupedRows:
    """Packed rows on a CPU, longest first: rows of equal length attend in one call."""

    def __init__(self, layout: Packed) -> None:
        """The rows of ``layout``."""
        self._groups = attention_groups(layout.lengths)
        self._tokens = int(layout.ids.size)
        self._masks: dict[tuple[int, int], Tensor] = {}

    def attend(self, states: States) -> Tensor:
        """``[tokens, heads, width]``, filler at the end included."""
        result = torch.empty_like(states.query, memory_format=torch.contiguous_format)
        for group in self._groups:
            chosen = slice(group.start, group.start + group.rows * group.length)
            result[chosen] = _attend(group, chosen, states, self._mask(group.length, states.window))
        # Filler belongs to no row and nobody reads it; what memory held before may be slow to compute with.
        result[self._tokens :] = 0
        return result

    def _mask(self, length: int, window: int | None) -> Tensor | None:
        """Which keys each token of a row sees, ``[length, length]``, or ``None`` where it sees all of its row."""
        if window is None or window >= length - 1:
            return None
        if (length, window) not in self._masks:
            places = torch.arange(length)
            self._masks[length, window] = (places[:, None] - places[None, :]).abs() <= window
        return self._masks[length, window]


def _attend(group: AttentionGroup, chosen: slice, states: States, mask: Tensor | None) -> Tensor:
    """The attention of the group's rows, ``[rows * length, heads, width]``."""
    _, heads, width = states.query.shape

    def rows(packed: Tensor) -> Tensor:
        return packed[chosen].reshape(group.rows, group.length, heads, width).transpose(1, 2)

    attended = functional.scaled_dot_product_attention(
        rows(states.query), rows(states.key), rows(states.value), attn_mask=mask, scale=states.scaling
    )
    return attended.transpose(1, 2).reshape(group.rows * group.length, heads, width)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
