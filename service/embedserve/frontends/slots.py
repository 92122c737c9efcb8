"""Which bytes of a shared memory are whose: a buddy allocator (Knowlton, 1965).

Decides where a call's ids and vectors lie, and that they have room or are told so at once. Must never know what is in
them, nor who else maps them: one process alone gives slots out and takes them back.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["Slot", "SlotAllocator"]

SMALLEST_BYTES: Final = 4096
"""A page: one short text with its vector, and rows of two slots never share a cache line."""


class Slot(NamedTuple):
    """Bytes ``offset`` to ``offset + size`` of the memory."""

    offset: int
    size: int


class SlotAllocator:
    """Gives out slots of a power of two of bytes; each pair of free neighbours becomes one slot again."""

    def __init__(self, size: int) -> None:
        """``size`` bytes in all, a power of two of pages."""
        assert size >= SMALLEST_BYTES and size & (size - 1) == 0, "a power of two of pages"  # noqa: PT018
        self._size = size
        self._free: list[set[int]] = [set() for _ in range((size // SMALLEST_BYTES).bit_length())]
        self._free[-1].add(0)
        self._taken: dict[int, int] = {}
        self.used = 0
        """Bytes that are given out."""

    @property
    def size(self) -> int:
        """Bytes in all, and in the largest slot that there can be."""
        return self._size

    def take(self, size: int) -> Slot | None:
        """A slot of at least ``size`` bytes, or ``None`` where there is no room now."""
        wanted = max(0, (size - 1).bit_length() - (SMALLEST_BYTES.bit_length() - 1))
        order = wanted
        while order < len(self._free) and not self._free[order]:
            order += 1
        if order >= len(self._free):
            return None
        offset = self._free[order].pop()
        while order > wanted:
            order -= 1
            self._free[order].add(offset + (SMALLEST_BYTES << order))
        self._taken[offset] = order
        self.used += SMALLEST_BYTES << order
        return Slot(offset, SMALLEST_BYTES << order)

    def give(self, slot: Slot) -> None:
        """Take ``slot`` back. Raises ``KeyError`` for one that was not given out."""
        order = self._taken.pop(slot.offset)
        self.used -= SMALLEST_BYTES << order
        offset = slot.offset
        while order + 1 < len(self._free):
            buddy = offset ^ (SMALLEST_BYTES << order)
            if buddy not in self._free[order]:
                break
            self._free[order].remove(buddy)
            offset = min(offset, buddy)
            order += 1
        self._free[order].add(offset)
