"""How the rows of a batch lie in a forward pass: packed end to end, or padded to one width.

Decides order, positions and attention groups, in numpy, before anything touches the device. Must never know torch or a
model: a layout is index arithmetic over row lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedserve.model.backend import TokenBatch

__all__ = [
    "AttentionGroup",
    "Packed",
    "Padded",
    "attention_groups",
    "check_batch",
    "packed",
    "padded",
    "pass_size",
    "row_positions",
]

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Neighbouring rows of a packed pass that are equally long and attend in one call."""

    start: int
    """First token."""
    rows: int
    length: int
    """Tokens of each row."""


@dataclass(frozen=True, slots=True)
class Packed:
    """All rows end to end, longest first, so that rows of equal length are neighbours."""

    ids: Int
    """Shape ``[tokens]``."""
    positions: Int
    """Shape ``[tokens]``: what the position embedding is asked for; 0 for the first token of a row, in most models."""
    starts: Int
    """Shape ``[rows]``, in pass order."""
    lengths: Int
    """Shape ``[rows]``, in pass order."""
    rows: Int
    """Shape ``[tokens]``: the row of each token, in pass order."""
    order: Int
    """Shape ``[rows]``: ``order[p]`` is the batch's row at place ``p`` of the pass."""


@dataclass(frozen=True, slots=True)
class Padded:
    """Rows side by side, padded at the end to one width."""

    ids: Int
    """Shape ``[rows, width]``."""
    mask: npt.NDArray[np.bool_]
    """Shape ``[rows, width]``: real tokens."""
    real: Int
    """Shape ``[tokens]``: where the real tokens lie in the flattened ids, row by row."""


def check_batch(batch: TokenBatch, vocab_size: int, length_max: int) -> Int:
    """The row lengths of ``batch``. Raises ``ValueError`` naming the first row that the model cannot take.

    An id outside the vocabulary raises an index error on a CPU; on CUDA it ends the context and with it the process.
    """
    offsets = batch.offsets
    lengths = (offsets[1:] - offsets[:-1]).astype(np.int64)
    if offsets.size < 2 or offsets[0] != 0 or offsets[-1] != batch.ids.size:
        raise ValueError(f"offsets do not span the {batch.ids.size} token ids")
    if batch.normalize.size != lengths.size or (batch.skip is not None and batch.skip.size != lengths.size):
        raise ValueError(f"normalize and skip must have one entry for each of the {lengths.size} rows")
    limit = length_max if batch.pad_to is None else min(length_max, batch.pad_to)
    # Extremes first: every pass is looked at, and which row is wrong is asked once in a lifetime.
    if np.minimum.reduce(lengths) < 1 or np.maximum.reduce(lengths) > limit:
        row = int(np.flatnonzero((lengths < 1) | (lengths > limit))[0])
        raise ValueError(f"row {row} has {lengths[row]} tokens; between 1 and {limit} fit")
    if np.minimum.reduce(batch.ids) < 0 or np.maximum.reduce(batch.ids) >= vocab_size:
        place = int(np.flatnonzero((batch.ids < 0) | (batch.ids >= vocab_size))[0])
        row = int(np.searchsorted(offsets, place, side="right")) - 1
        raise ValueError(f"row {row} has the token id {batch.ids[place]}, outside the vocabulary of {vocab_size}")
    return lengths


def packed(batch: TokenBatch, lengths: Int, offset_pad_id: int | None = None) -> Packed:
    """The packed layout of ``batch``, whose rows have ``lengths``.

    ``offset_pad_id`` is the padding id of an architecture whose positions start after it, as RoBERTa's do.
    """
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    starts = np.cumsum(ordered) - ordered
    rows = np.repeat(np.arange(ordered.size), ordered)
    positions = np.arange(rows.size) - starts[rows]
    source = batch.offsets.astype(np.int64)[:-1][order][rows] + positions
    ids = batch.ids[source].astype(np.int64)
    if offset_pad_id is not None:
        positions = _offset_positions(ids, starts, rows, offset_pad_id)
    return Packed(ids, positions, starts, ordered, rows, order)


def pass_size(tokens: int) -> int:
    """Tokens that a packed pass over ``tokens`` runs with, filler at its end included: at most an eighth more.

    oneDNN makes and keeps kernels for each number of tokens that it meets: a new one cost a pass 2 to 18 ms, and 6 MiB
    for as long as its cache holds it, up to 1.2 GiB for a MiniLM (measured, torch 2.13 on Zen 5). Sixteen sizes, then
    eight an octave, leave 48 up to 4,096 tokens, and 3 % of filler in the mean.
    """
    step = max(16, 1 << max((tokens - 1).bit_length() - 4, 0))
    return -(-tokens // step) * step


def row_positions(ids: npt.NDArray[np.integer[Any]], lengths: Int, offset_pad_id: int | None = None) -> Int:
    """What the position embedding is asked for, ``[tokens]``, where rows of ``lengths`` lie end to end in any order."""
    ends = np.add.accumulate(lengths)
    starts = ends - lengths
    if offset_pad_id is not None:
        return _offset_positions(ids, starts, np.repeat(np.arange(lengths.size), lengths), offset_pad_id)
    return np.arange(ends[-1]) - np.repeat(starts, lengths)


def _offset_positions(ids: npt.NDArray[np.integer[Any]], starts: Int, rows: Int, pad_id: int) -> Int:
    """Positions as fairseq counts them: from ``pad_id + 1``, skipping the padding token where a text spells it out."""
    counted = ids != pad_id
    running = np.cumsum(counted)
    before = (running - counted)[starts]
    return np.where(counted, running - before[rows] + pad_id, pad_id)


def padded(batch: TokenBatch, lengths: Int, width: int, pad_id: int) -> Padded:
    """``batch`` with every row padded to ``width`` with ``pad_id``."""
    mask = np.arange(width)[None, :] < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = batch.ids
    return Padded(ids, mask, np.flatnonzero(mask))


def attention_groups(lengths: Int) -> tuple[AttentionGroup, ...]:
    """Cut rows, longest first, into groups of equal length.

    Rows of nearly equal length are not padded to join: the mask costs more than the call that it saves (MiniLM in
    bfloat16, 32 rows of 3 to 300 tokens: 9.4k tokens/s a core without, 8.6k with 1/8 of padding, 8.4k with 1/4).
    """
    values, first, counts = np.unique(-lengths, return_index=True, return_counts=True)
    starts = (np.cumsum(lengths) - lengths)[first]
    return tuple(
        AttentionGroup(start, rows, -value)
        for start, rows, value in zip(starts.tolist(), counts.tolist(), values.tolist(), strict=True)
    )
