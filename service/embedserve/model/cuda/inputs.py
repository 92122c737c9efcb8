"""All that a packed pass needs of its batch, in one buffer of integers: one copy takes it to the device.

Decides where each field lies, and what stands in the places that no row fills. Must never know a model or a stream.

Tokens that fill a pass up belong to no row: their segment is ``FILLER``, no row's bounds include them, and rows that
fill it up have no tokens. Whatever is computed for either stays in its own place, and nobody reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from embedserve.model.layout import Packed

__all__ = ["FILLER", "InputLayout", "PassInputs"]

FILLER: Final = -1
"""The segment of a token that belongs to no row."""
ALIGNMENT: Final = 4
"""Each field begins at 16 bytes, as vectorised kernels like it."""


@dataclass(frozen=True, slots=True)
class PassInputs:
    """Views of one buffer on the device, all int32."""

    ids: Tensor
    """Shape ``[tokens]``."""
    positions: Tensor
    """Shape ``[tokens]``."""
    segments: Tensor
    """Shape ``[tokens]``: the row of each token, or ``FILLER``."""
    cumulative: Tensor
    """Shape ``[rows + 1]``: where each row begins and the last one ends."""
    starts: Tensor
    """Shape ``[rows]``: 0 for a row that is not there, a place that exists in any pass."""
    lengths: Tensor
    """Shape ``[rows]``: 0 for a row that is not there."""
    normalize: Tensor
    """Shape ``[rows]``: 1 where the vector is scaled to unit length."""
    skip: Tensor | None
    """Shape ``[rows]``: leading tokens that pooling leaves out; ``None`` where it is not to look."""


@dataclass(frozen=True, slots=True)
class InputLayout:
    """Where the fields of a pass of so many tokens and rows lie."""

    tokens: int
    rows: int

    @property
    def size(self) -> int:
        """Integers in the buffer."""
        return sum(_aligned(count) for count in self._counts())

    def write(
        self,
        buffer: npt.NDArray[np.int32],
        layout: Packed,
        *,
        normalize: npt.NDArray[np.bool_],
        skip: npt.NDArray[np.int32] | None,
        filler_id: int,
        filler_position: int,
    ) -> None:
        """Write a batch, and what fills it up, into ``buffer``, which has at least ``size`` places.

        ``normalize`` and ``skip`` are in the batch's order. Filler has an id and a position that the embedding knows.
        """
        tokens, rows = layout.ids.size, layout.lengths.size
        assert tokens <= self.tokens, "a batch fits its pass"
        assert rows <= self.rows, "a batch fits its pass"
        ids, positions, segments, cumulative, starts, lengths, normalized, skipped = self._split(buffer)
        values: Any
        for field, values, rest in (
            (ids, layout.ids, filler_id),
            (positions, layout.positions, filler_position),
            (segments, layout.rows, FILLER),
        ):
            field[:tokens] = values
            field[tokens:] = rest
        cumulative[:rows] = layout.starts
        cumulative[rows:] = tokens
        for field, values in (
            (starts, layout.starts),
            (lengths, layout.lengths),
            (skipped, 0 if skip is None else skip[layout.order]),
            (normalized, normalize[layout.order]),
        ):
            field[:rows] = values
            field[rows:] = 0

    def views(self, buffer: Tensor, *, skips: bool) -> PassInputs:
        """The fields in ``buffer``, without a copy; ``skip`` only where the pass ``skips``."""
        ids, positions, segments, cumulative, starts, lengths, normalize, skip = self._split(buffer)
        return PassInputs(ids, positions, segments, cumulative, starts, lengths, normalize, skip if skips else None)

    def _counts(self) -> tuple[int, ...]:
        return self.tokens, self.tokens, self.tokens, self.rows + 1, self.rows, self.rows, self.rows, self.rows

    def _split(self, buffer: Any) -> list[Any]:
        fields, start = [], 0
        for count in self._counts():
            fields.append(buffer[start : start + count])
            start += _aligned(count)
        return fields


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
