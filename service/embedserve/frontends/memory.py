"""The memory that a front end and the engine process share: token ids one way, vectors the other.

Decides how arrays lie in a slot. Must never know calls, frames or which slot is free. The memory is an anonymous file
(memfd_create(2)): it has no name that another user could open or that a killed process could leave behind.

A slot first holds what goes in, and later, from its beginning again, what comes out: the engine copies what goes in
before it answers anything. Ids that were read in place could be overwritten while a pass that nobody waits for any
more still gathers them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from embedserve.frontends.slots import Slot
from embedserve.model.tokenizer import TokenizedTexts

__all__ = ["SharedMemory", "create_memory", "rows_bytes", "tokens_bytes"]


def create_memory(size: int) -> int:
    """The descriptor of a new memory of ``size`` bytes; pages that are never touched cost nothing."""
    descriptor = os.memfd_create("embedserve", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor


def tokens_bytes(tokens: int, texts: int) -> int:
    """Bytes that the ids of so many texts need: ids and lengths as int32, a byte for truncated."""
    return 4 * tokens + 5 * texts


def rows_bytes(texts: int, dimensions: int) -> int:
    """Bytes that so many vectors need, each with the rows of its batch as int32."""
    return texts * (4 * dimensions + 4)


class SharedMemory:
    """One mapping. ``read_*`` gives copies, whatever the other side does meanwhile."""

    def __init__(self, descriptor: int) -> None:
        """Map all of it and keep no descriptor."""
        self._map = mmap.mmap(descriptor, 0)
        os.close(descriptor)
        # Made once: a slice of one costs 0.2 us, a new array over the mapping 0.9.
        self._views: dict[type[np.generic], npt.NDArray[np.generic]] = {
            dtype: np.frombuffer(self._map, dtype) for dtype in (np.int32, np.float32, np.bool_)
        }

    def _array(self, slot: Slot, at: int, count: int, dtype: type[np.generic]) -> npt.NDArray[np.generic]:
        view = self._views[dtype]
        size = view.itemsize
        assert at + count * size <= slot.size and slot.offset + slot.size <= view.nbytes, "beyond the slot"  # noqa: PT018
        begin = (slot.offset + at) // size  # slots begin at a page, and what lies in them at a multiple of its size
        return view[begin : begin + count]

    def write_tokens(self, slot: Slot, tokenized: TokenizedTexts) -> None:
        """Ids, lengths, truncated."""
        tokens, texts = len(tokenized.ids), len(tokenized.lengths)
        self._array(slot, 0, tokens, np.int32)[:] = tokenized.ids
        self._array(slot, 4 * tokens, texts, np.int32)[:] = tokenized.lengths
        self._array(slot, 4 * (tokens + texts), texts, np.bool_)[:] = tokenized.truncated

    def read_tokens(self, slot: Slot, tokens: int, texts: int, prompt_tokens: int) -> TokenizedTexts:
        """What ``write_tokens`` wrote."""
        return TokenizedTexts(
            ids=self._array(slot, 0, tokens, np.int32).copy(),  # type: ignore[arg-type]
            lengths=self._array(slot, 4 * tokens, texts, np.int32).copy(),  # type: ignore[arg-type]
            truncated=self._array(slot, 4 * (tokens + texts), texts, np.bool_).copy(),  # type: ignore[arg-type]
            prompt_tokens=prompt_tokens,
        )

    def write_rows(self, slot: Slot, vectors: npt.NDArray[np.float32]) -> None:
        """Vectors, end to end."""
        self._array(slot, 0, vectors.size, np.float32)[:] = vectors.reshape(-1)

    def read_rows(self, slot: Slot, texts: int, dimensions: int) -> npt.NDArray[np.float32]:
        """What ``write_rows`` wrote, shape ``[texts, dimensions]``, the reader's own."""
        flat = self._array(slot, 0, texts * dimensions, np.float32)
        return flat.reshape(texts, dimensions).copy()  # type: ignore[return-value]

    def write_batch_sizes(self, slot: Slot, at: int, sizes: Sequence[int]) -> None:
        """Rows of the batch of each text, behind the vectors."""
        self._array(slot, at, len(sizes), np.int32)[:] = sizes

    def read_batch_sizes(self, slot: Slot, at: int, texts: int) -> list[int]:
        """What ``write_batch_sizes`` wrote."""
        return self._array(slot, at, texts, np.int32).tolist()  # type: ignore[no-any-return]

    def close(self) -> None:
        """Unmap."""
        self._views.clear()
        self._map.close()
