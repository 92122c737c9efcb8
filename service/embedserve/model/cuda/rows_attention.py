"""How the rows of a packed pass attend on a device: three ways with one signature.

Decides the kernels. Each is made anew within the pass that it serves, from tensors alone, so that a captured pass reads
the rows that are there when it is replayed. Must never know a model, a graph or a stream.

* ``VarlenRows``: torch's flash kernel for rows of any length. CUDA, bfloat16 and float16.
* ``SegmentTiles``: neighbouring tokens in tiles, and a mask that keeps rows apart. For short rows, of which a flash
  kernel's tile of 128 holds one each: a text of 12 tokens uses a hundredth of it. Any device, any dtype.
* ``ReferenceRows``: what the flash kernel computes, row by row and slowly, for a CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from embedserve.model.attention import States
from embedserve.model.cuda.inputs import FILLER, PassInputs

__all__ = ["ReferenceRows", "RowsAttention", "SegmentTiles", "VarlenRows", "varlen_missing"]

TILE: Final = 128
"""Queries of one tile of ``SegmentTiles``."""
REACH_STEP: Final = 16
"""Keys to either side of a tile are a multiple of it: the kernels that take a mask want its rows aligned."""
OUTSIDE: Final = FILLER - 1
"""The segment of places beyond both ends of a pass; unlike any token's."""
VARLEN_ARGUMENTS: Final = ("scale", "window_size")
"""What this needs of ``torch.nn.attention.varlen.varlen_attn``: there in 2.11 to 2.13, not in 2.10."""


class VarlenRows:
    """``varlen_attn`` with the bounds on the device; only the longest length is a number on the host.

    Source: torch 2.13 ``torch/nn/attention/varlen.py``; rows without tokens at the end (torchtitan#4158).
    """

    def __init__(self, inputs: PassInputs, length_max: int) -> None:
        """``length_max`` covers every row of every batch that this pass will be replayed for."""
        self._cumulative = inputs.cumulative
        self._length_max = length_max

    def attend(self, states: States) -> Tensor:
        """``[tokens, heads, width]``; not written where a token belongs to no row."""
        window = (-1, -1) if states.window is None else (states.window, states.window)
        attended: Tensor = _varlen_attn()(
            states.query,
            states.key,
            states.value,
            self._cumulative,
            self._cumulative,
            self._length_max,
            self._length_max,
            scale=states.scaling,
            window_size=window,
        )
        return attended


class SegmentTiles:
    """Scaled-dot-product attention of tiles of queries over the keys that any of their rows can have.

    A tile sees ``length_max - 1`` tokens to either side, so no row that a tile cuts misses one. What it computes in
    vain grows with the longest row: for short ones only. A row that is not finite takes those in its tiles with it (0 *
    NaN is NaN); whoever checks runs each of them once more, alone.
    """

    def __init__(self, inputs: PassInputs, length_max: int) -> None:
        """``length_max`` covers every row of every batch that this pass will be replayed for."""
        tokens = inputs.segments.shape[0]
        self._reach = -(-(length_max - 1) // REACH_STEP) * REACH_STEP
        self._behind = -tokens % TILE
        self._window = TILE + 2 * self._reach
        self._filler = (inputs.segments == FILLER)[:, None, None]
        padded = functional.pad(inputs.segments, (self._reach, self._reach + self._behind), value=OUTSIDE)
        queries = padded[self._reach : self._reach + tokens + self._behind].view(-1, TILE)
        keys = padded.unfold(0, self._window, TILE)
        self._alike = queries[:, :, None] == keys[:, None, :]
        self._masks: dict[int | None, Tensor] = {None: self._alike[:, None]}

    def attend(self, states: States) -> Tensor:
        """``[tokens, heads, width]``; filler attends to filler."""
        tokens, heads, width = states.query.shape
        query = functional.pad(states.query, (0, 0, 0, 0, 0, self._behind)).view(-1, TILE, heads, width)
        attended = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            self._windows(states.key),
            self._windows(states.value),
            attn_mask=self._mask(states.window),
            scale=states.scaling,
        )
        return attended.transpose(1, 2).reshape(-1, heads, width)[:tokens]

    def _windows(self, states: Tensor) -> Tensor:
        """``[tiles, heads, window, width]``, views that overlap; 0 for filler: a mask does not stop its NaN."""
        padded = functional.pad(
            states.masked_fill(self._filler, 0), (0, 0, 0, 0, self._reach, self._reach + self._behind)
        )
        return padded.unfold(0, self._window, TILE).transpose(2, 3)

    def _mask(self, window: int | None) -> Tensor:
        if window not in self._masks:
            assert window is not None
            places = torch.arange(self._window, device=self._alike.device)
            distance = places[None, :] - self._reach - places[:TILE, None]
            self._masks[window] = (self._alike & (distance.abs() <= window))[:, None]
        return self._masks[window]


class ReferenceRows:
    """Row by row, with the bounds as they are in the tensor now: ``VarlenRows`` for a CPU.

    It keeps to that kernel's border cases, so that a test of what is around it means something: what it does not write
    is NaN, the worst that memory may hold, and a row over ``length_max`` is refused where the kernel would be silently
    wrong.
    """

    def __init__(self, inputs: PassInputs, length_max: int) -> None:
        """``length_max`` covers every row of every batch that this pass will be replayed for."""
        self._bounds = inputs.cumulative
        self._length_max = length_max

    def attend(self, states: States) -> Tensor:
        """``[tokens, heads, width]``; NaN where a token belongs to no row."""
        result = torch.full_like(states.query, float("nan"), memory_format=torch.contiguous_format)
        bounds = self._bounds.tolist()
        for start, end in pairwise(bounds):
            if start == end:
                continue
            assert end - start <= self._length_max, "a row is longer than what the pass was captured for"
            query, key, value = (part[None, start:end].transpose(1, 2) for part in states[:3])
            mask = None
            if states.window is not None:
                places = torch.arange(end - start)
                mask = (places[:, None] - places[None, :]).abs() <= states.window
            attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=states.scaling)
            result[start:end] = attended[0].transpose(0, 1)
        return result


RowsAttention = type[VarlenRows] | type[SegmentTiles] | type[ReferenceRows]


def varlen_missing() -> str | None:
    """Why ``VarlenRows`` cannot be used with this torch, or ``None``."""
    try:
        known = inspect.signature(_varlen_attn()).parameters
    except ImportError as error:
        return f"this torch has no kernel for packed rows: {error}"
    missing = [name for name in VARLEN_ARGUMENTS if name not in known]
    return f"this torch's kernel for packed rows does not take {' and '.join(missing)}" if missing else None


@cache
def _varlen_attn() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - not in every torch that a CPU may run

    kernel: Callable[..., Any] = varlen_attn
    return kernel
