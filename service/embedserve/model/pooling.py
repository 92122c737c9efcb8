"""Token vectors to one vector a row, with the arithmetic of sentence-transformers 6.2's ``Pooling``.

Decides which tokens count and how they are combined. It only ever sees real tokens, end to end: padding is dropped
before it, so that nothing in a pad can reach a result. Must never know how the batch lay in the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from embedserve.model.pipeline import PoolingSpec

__all__ = ["Pooling", "Segments", "token_weights"]

Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Segments:
    """Where each row's tokens lie; int64, on the device of the token vectors."""

    ids: Tensor
    """Shape ``[tokens]``."""
    starts: Tensor
    """Shape ``[rows]``."""
    lengths: Tensor
    """Shape ``[rows]``, each at least 1."""
    rows: Tensor
    """Shape ``[tokens]``: the row of each token."""
    skip: Tensor | None = None
    """Shape ``[rows]``: leading tokens to leave out."""


class Pooling(nn.Module):
    """One vector a row: the spec's modes, concatenated.

    Control tokens are left out of ``mean``, ``mean_sqrt_len`` and ``weighted_mean`` (a maximum or a single token is not
    an average that they could dilute). A row with no token left, because all are control tokens or belong to the
    prompt, is pooled over all its tokens: the alternative, a vector of zeros, has no direction.
    """

    def __init__(self, spec: PoolingSpec, control_ids: tuple[int, ...] = ()) -> None:
        """``control_ids`` are the token ids to leave out."""
        super().__init__()
        self.modes = spec.modes
        self.control_ids: Tensor
        self.register_buffer("control_ids", torch.tensor(control_ids, dtype=torch.int64), persistent=False)
        self.has_control = bool(control_ids)

    def forward(self, hidden: Tensor, segments: Segments) -> Tensor:
        """``hidden`` is ``[tokens, hidden_size]``; the result is ``[rows, hidden_size * modes]`` in float32.

        Sums are made in float32 whatever the dtype of ``hidden``, as sentence-transformers makes them.
        """
        hidden = hidden.float()
        after_prompt = self._after_prompt(segments)
        averaged = self._without_control(segments, after_prompt)
        return torch.cat([self._pool(mode, hidden, segments, after_prompt, averaged) for mode in self.modes], dim=-1)

    def _after_prompt(self, segments: Segments) -> Tensor | None:
        """Mask ``[tokens]`` of the tokens after the prompt, or ``None`` where all count."""
        if segments.skip is None:
            return None
        skip = segments.skip.masked_fill(segments.skip >= segments.lengths, 0)
        positions = torch.arange(segments.rows.shape[0], device=skip.device) - segments.starts[segments.rows]
        return positions >= skip[segments.rows]

    def _without_control(self, segments: Segments, after_prompt: Tensor | None) -> Tensor | None:
        """Mask ``[tokens]`` of the tokens that averages count, or ``None`` where all count."""
        if not self.has_control:
            return after_prompt
        # isin itself sorts where there are many, and then a GPU has to wait for a number of its own.
        keep = (segments.ids[:, None] != self.control_ids).all(dim=-1)
        if after_prompt is not None:
            keep = keep & after_prompt
        empty = _sum(keep.float()[:, None], segments) == 0
        return keep | empty[:, 0][segments.rows]

    def _pool(
        self, mode: str, hidden: Tensor, segments: Segments, after_prompt: Tensor | None, averaged: Tensor | None
    ) -> Tensor:
        if mode == "cls":
            first = segments.starts
            if segments.skip is not None:
                first = first + segments.skip.masked_fill(segments.skip >= segments.lengths, 0)
            return hidden[first]
        if mode == "last_token":
            return hidden[segments.starts + segments.lengths - 1]
        if mode == "max":
            kept = hidden if after_prompt is None else hidden.masked_fill(~after_prompt[:, None], float("-inf"))
            return torch.segment_reduce(kept, "max", lengths=segments.lengths, axis=0, unsafe=True)
        if mode == "weighted_mean":
            positions = torch.arange(segments.rows.shape[0], device=hidden.device) - segments.starts[segments.rows]
            weights = (positions + 1).float()[:, None]
            if averaged is not None:
                weights = weights * averaged[:, None]
            return _sum(hidden * weights, segments) / _sum(weights, segments)
        counts = segments.lengths.float()[:, None]
        if averaged is not None:
            hidden = hidden * averaged[:, None]
            counts = _sum(averaged.float()[:, None], segments)
        return _sum(hidden, segments) / (counts if mode == "mean" else counts.sqrt())


def _sum(values: Tensor, segments: Segments) -> Tensor:
    """``[tokens, n]`` to ``[rows, n]``; row by row, so that a neighbour cannot change a sum."""
    # unsafe skips the check that lengths add up, which would make a CUDA device wait for its answer.
    return torch.segment_reduce(values, "sum", lengths=segments.lengths, axis=0, unsafe=True)


def token_weights(
    modes: tuple[str, ...],
    control_ids: Int,
    ids: npt.NDArray[np.integer[Any]],
    lengths: Int,
    skip: Int | None,
) -> Float | None:
    """What each token counts in each mode, ``[modes, tokens]``: the vector of a row is the weighted sum of its tokens.

    The same rules as ``Pooling``, for a forward pass that pools by itself. ``None`` where a mode is no weighted sum
    (``max``). ``ids`` is ``[tokens]``, ``lengths`` and ``skip`` are ``[rows]``.
    """
    if "max" in modes:
        return None
    if modes == ("mean",) and skip is None and not control_ids.size:  # nearly every model, nearly every time
        return np.repeat((1.0 / lengths).astype(np.float32), lengths)[None]
    starts = np.cumsum(lengths) - lengths
    rows = np.repeat(np.arange(lengths.size), lengths)
    positions = np.arange(rows.size) - starts[rows]
    leading = np.zeros_like(lengths) if skip is None else np.where(skip < lengths, skip, 0)
    counts = positions >= leading[rows]
    if control_ids.size:
        kept = counts & ~np.isin(ids, control_ids)
        none_left = np.add.reduceat(kept, starts) == 0
        counts = kept | none_left[rows]
    result = np.zeros((len(modes), rows.size), np.float32)
    for place, mode in enumerate(modes):
        if mode == "cls":
            result[place, starts + leading] = 1.0
        elif mode == "last_token":
            result[place, starts + lengths - 1] = 1.0
        else:
            weights = counts * (positions + 1.0) if mode == "weighted_mean" else counts.astype(np.float64)
            sums = np.add.reduceat(weights, starts)
            result[place] = weights / (np.sqrt(sums) if mode == "mean_sqrt_len" else sums)[rows]
    return result
