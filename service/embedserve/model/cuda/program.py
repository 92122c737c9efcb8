"""The part of a pass that a graph holds: encoder, pooling with the control-token mask, dense layers, normalisation.

Decides what is computed between the buffer of integers and the vectors. It takes its size from shapes and from the key,
and every other fact from tensors on the device: it never asks the device for a value, so that it can be captured, and a
replay computes the batch that is in the buffers then. Must never know graphs, streams or threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from embedserve.model.attention import PACKED_ATTENTION
from embedserve.model.cuda.inputs import PassInputs
from embedserve.model.cuda.rows_attention import RowsAttention, SegmentTiles
from embedserve.model.dense import scale_to_unit_length
from embedserve.model.pooling import Pooling, Segments

__all__ = ["Program"]


class Program:
    """From a pass's inputs to its vectors."""

    def __init__(
        self,
        model: Any,
        pooling: Pooling,
        dense: nn.Module,
        attention: RowsAttention,
        *,
        tiles_length_max: int = 0,
        compiled: bool = False,
    ) -> None:
        """``attention`` is the kernel for rows of any length; up to ``tiles_length_max`` they take ``SegmentTiles``.

        ``compiled`` lets inductor fuse what lies between the matrix products.
        """
        self._model = model
        self._pooling = pooling
        self._dense = dense
        self._attention = attention
        self.tiles_length_max = tiles_length_max
        """Longest row of the passes that take ``SegmentTiles``."""
        self._compute: Callable[[PassInputs, int], Tensor] = self.vectors
        if compiled:
            self._compute = torch.compile(self.vectors, dynamic=True)

    def run(self, inputs: PassInputs, length_max: int, out: Tensor) -> None:
        """Write the vectors into the first rows of ``out``, float32; those of rows without tokens mean nothing."""
        # Read by transformers in every layer's call; a padded pass sets another.
        self._model.config._attn_implementation = PACKED_ATTENTION  # noqa: SLF001
        out[: inputs.starts.shape[0]].copy_(self._compute(inputs, length_max))

    def vectors(self, inputs: PassInputs, length_max: int) -> Tensor:
        """``[rows, dimension]``."""
        attention = SegmentTiles if length_max <= self.tiles_length_max else self._attention
        ids = inputs.ids.long()
        hidden: Tensor = self._model(
            input_ids=ids[None], position_ids=inputs.positions.long()[None], packing=attention(inputs, length_max)
        ).last_hidden_state[0]
        segments = Segments(
            ids=ids,
            starts=inputs.starts.long(),
            lengths=inputs.lengths.long(),
            rows=inputs.segments.clamp(min=0).long(),
            skip=None if inputs.skip is None else inputs.skip.long(),
        )
        return scale_to_unit_length(self._dense(self._pooling(hidden, segments)), inputs.normalize.bool())
