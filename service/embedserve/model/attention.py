"""Attention over packed rows: each row sees itself, and no padding is computed.

Decides how one packed pass attends on a CPU (one scaled-dot-product call for each group of rows of equal length) and on
CUDA (one variable-length kernel). Must never know a model: transformers calls it through its attention interface, by
name. Source: transformers' ``AttentionInterface``; the name is not in ``AttentionMaskInterface``, so that no mask is
built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from embedserve.model.layout import AttentionGroup, Packed, attention_groups

__all__ = ["PACKED_ATTENTION", "Packing", "packing_for"]

PACKED_ATTENTION = "embedserve_packed"
"""The name under which transformers finds ``packed_attention``."""


@dataclass(frozen=True, slots=True)
class Packing:
    """What ``packed_attention`` must know of a pass; made once, used by every layer."""

    groups: tuple[AttentionGroup, ...] = ()
    """On a CPU."""
    windows: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """On a CPU, masks of sliding layers by row length and window, made when the first such layer asks."""
    cumulative: Tensor | None = None
    """On CUDA: int32 ``[rows + 1]``, where each row begins."""
    length_max: int = 0
    tokens: int = 0
    """On a CPU: tokens of all rows; those behind them are filler."""


@dataclass(frozen=True, slots=True)
class _States:
    """One layer's states, each ``[tokens, heads, width]``, and how it attends."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float | None
    window: int | None
    """Tokens to either side that a token sees; ``None`` where it sees its whole row."""


def packing_for(layout: Packed, device: torch.device) -> Packing:
    """The packing of ``layout`` on ``device``."""
    if device.type == "cuda":
        ends = np.concatenate([layout.starts, [layout.ids.size]]).astype(np.int32)
        return Packing(
            cumulative=torch.from_numpy(ends).to(device, non_blocking=True), length_max=int(layout.lengths[0])
        )
    return Packing(
        groups=attention_groups(layout.lengths), length_max=int(layout.lengths[0]), tokens=int(layout.ids.size)
    )


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
    states = _States(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling,
        None if sliding_window is None else sliding_window - 1,
    )
    if packing.cumulative is not None:
        return _varlen(states, packing.cumulative, packing.length_max)[None], None
    result = torch.empty_like(states.query, memory_format=torch.contiguous_format)
    for group in packing.groups:
        mask = _window_mask(packing, group.length, states.window)
        chosen = slice(group.start, group.start + group.rows * group.length)
        result[chosen] = _attend(group, chosen, states, mask)
    # Filler at the end belongs to no row and nobody reads it; what memory held before may be slow to compute with.
    result[packing.tokens :] = 0
    return result[None], None


def _attend(group: AttentionGroup, chosen: slice, states: _States, mask: Tensor | None) -> Tensor:
    """The attention of the group's rows, ``[rows * length, heads, width]``."""
    _, heads, width = states.query.shape

    def rows(packed: Tensor) -> Tensor:
        return packed[chosen].reshape(group.rows, group.length, heads, width).transpose(1, 2)

    attended = functional.scaled_dot_product_attention(
        rows(states.query), rows(states.key), rows(states.value), attn_mask=mask, scale=states.scaling
    )
    return attended.transpose(1, 2).reshape(group.rows * group.length, heads, width)


def _window_mask(packing: Packing, length: int, window: int | None) -> Tensor | None:
    """Which keys each token of a row sees, ``[length, length]``, or ``None`` where it sees all of its row."""
    if window is None or window >= length - 1:
        return None
    if (length, window) not in packing.windows:
        places = torch.arange(length)
        packing.windows[length, window] = (places[:, None] - places[None, :]).abs() <= window
    return packing.windows[length, window]


def _varlen(states: _States, cumulative: Tensor, length_max: int) -> Tensor:
    """``[tokens, heads, width]`` by torch's flash kernel for rows of any length; it exists for CUDA only."""
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

    window = (-1, -1) if states.window is None else (states.window, states.window)
    attended = varlen_attn(
        states.query,
        states.key,
        states.value,
        cumulative,
        cumulative,
        length_max,
        length_max,
        scale=states.scaling,
        window_size=window,
    )
    assert isinstance(attended, Tensor), "a pair comes back only where auxiliary outputs were asked for"
    return attended


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
