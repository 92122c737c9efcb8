"""Attention over packed rows: each row sees itself, and no padding is computed.

Decides how one packed pass attends on a CPU (one scaled-dot-product call for each group of rows of like length) and on CUDA
(one variable-length kernel). Must never know a model: transformers calls it through its attention interface, by name.
Source: transformers' ``AttentionInterface``; the name is not in ``AttentionMaskInterface``, so that no mask is built.
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

__all__ = ["PACKED_ATTENTION", "PACKED_ARCHITECTURES", "Packing", "packing_for"]

PACKED_ATTENTION = "embedserve_packed"
"""The name under which transformers finds ``packed_attention``."""

PACKED_ARCHITECTURES = frozenset(
    {"albert", "bert", "camembert", "distilbert", "electra", "modernbert", "nomic_bert", "roberta", "xlm-roberta"}
)
"""Architectures that hand ``packing`` down to the attention and take explicit positions. MPNet and DeBERTa do not: their
attention adds a bias made from the positions of a padded batch."""


@dataclass(frozen=True, slots=True)
class Packing:
    """What ``packed_attention`` must know of a pass; made once, used by every layer."""

    groups: tuple["_Group", ...] = ()
    """On a CPU."""
    cumulative: Tensor | None = None
    """On CUDA: int32 ``[rows + 1]``, where each row begins."""
    length_max: int = 0


@dataclass(frozen=True, slots=True)
class _Group:
    """An ``AttentionGroup`` with what a group of unequal rows needs: where its padded columns come from and go to."""

    shape: AttentionGroup
    gather: Tensor | None = None
    """Shape ``[rows * length]``: the token of each padded place; pads repeat a real token of their row."""
    real: Tensor | None = None
    """Shape ``[tokens]``: the padded place of each token."""
    mask: Tensor | None = None
    """Shape ``[rows, 1, 1, length]``: true where a key is real."""
    windows: dict[int, Tensor] = field(default_factory=dict)
    """Masks of sliding layers by their window, made when the first such layer asks."""


def packing_for(layout: Packed, device: torch.device) -> Packing:
    """The packing of ``layout`` on ``device``."""
    if device.type == "cuda":
        ends = np.concatenate([layout.starts, [layout.ids.size]]).astype(np.int32)
        return Packing(cumulative=torch.from_numpy(ends).to(device, non_blocking=True), length_max=int(layout.lengths[0]))
    groups = []
    row = 0
    for shape in attention_groups(layout.lengths):
        lengths = layout.lengths[row : row + shape.rows]
        groups.append(_group(shape, lengths))
        row += shape.rows
    return Packing(groups=tuple(groups), length_max=int(layout.lengths[0]))


def _group(shape: AttentionGroup, lengths: np.ndarray[Any, np.dtype[np.int64]]) -> _Group:
    if shape.tokens == shape.rows * shape.length:
        return _Group(shape)
    columns = np.arange(shape.length)[None, :]
    mask = columns < lengths[:, None]
    starts = shape.start + np.cumsum(lengths) - lengths
    gather = starts[:, None] + np.minimum(columns, lengths[:, None] - 1)
    return _Group(
        shape,
        torch.from_numpy(gather.reshape(-1)),
        torch.from_numpy(np.flatnonzero(mask)),
        torch.from_numpy(mask[:, None, None, :]),
    )


def packed_attention(
    module: nn.Module,
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
    window = None if sliding_window is None else sliding_window - 1
    if packing.cumulative is not None:
        return _varlen(query, key, value, packing, scaling, window), None
    query, key, value = query[0], key[0], value[0]
    heads, tokens, width = query.shape
    result = query.new_empty((tokens, heads, width))
    for group in packing.groups:
        _attend_group(group, query, key, value, result, scaling, window)
    return result[None], None


def _attend_group(
    group: _Group, query: Tensor, key: Tensor, value: Tensor, result: Tensor, scaling: float | None, window: int | None
) -> None:
    """Write the group's rows of ``result`` (``[tokens, heads, width]``)."""
    shape = group.shape
    end = shape.start + shape.tokens
    heads, _, width = query.shape

    def rows(states: Tensor) -> Tensor:
        chosen = states[:, shape.start : end] if group.gather is None else states.index_select(1, group.gather)
        return chosen.reshape(heads, shape.rows, shape.length, width).transpose(0, 1)

    mask = _mask(group, window)
    attended = functional.scaled_dot_product_attention(rows(query), rows(key), rows(value), attn_mask=mask, scale=scaling)
    attended = attended.transpose(1, 2).reshape(shape.rows * shape.length, heads, width)
    result[shape.start : end] = attended if group.real is None else attended.index_select(0, group.real)


def _mask(group: _Group, window: int | None) -> Tensor | None:
    if window is None or window >= group.shape.length - 1:
        return group.mask
    if window not in group.windows:
        places = torch.arange(group.shape.length)
        near = (places[:, None] - places[None, :]).abs() <= window
        group.windows[window] = near[None, None] if group.mask is None else near[None, None] & group.mask
    return group.windows[window]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - CUDA only

    attended = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        packing.cumulative,
        packing.cumulative,
        packing.length_max,
        packing.length_max,
        scale=scaling,
        window_size=(-1, -1) if window is None else (window, window),
    )
    return attended[None]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
