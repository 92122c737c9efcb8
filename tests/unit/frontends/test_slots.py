"""Slots of a shared memory."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from embedserve.frontends.slots import SMALLEST_BYTES, Slot, SlotAllocator


class TestSlots:
    def test_slots_never_overlap_and_all_come_back(self):
        """Whatever is taken and given, no two slots share a byte, and an empty memory is one slot again."""
        size = 256 * SMALLEST_BYTES
        chance, slots, taken = random.Random(17), SlotAllocator(size), []
        for _ in range(3000):
            if taken and chance.random() < 0.5:
                slots.give(taken.pop(chance.randrange(len(taken))))
            else:
                wanted = chance.choice([1, 100, SMALLEST_BYTES, SMALLEST_BYTES + 1, 10 * SMALLEST_BYTES])
                slot = slots.take(wanted)
                if slot is not None:
                    assert slot.size >= wanted
                    taken.append(slot)
            ends = sorted((slot.offset, slot.offset + slot.size) for slot in taken)
            assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))
            assert all(begin >= 0 and end <= size for begin, end in ends)
            assert slots.used == sum(slot.size for slot in taken)
        for slot in taken:
            slots.give(slot)
        assert slots.take(size) == Slot(0, size)

    def test_a_full_memory_says_so(self):
        slots = SlotAllocator(2 * SMALLEST_BYTES)
        first, second = slots.take(1), slots.take(1)
        assert slots.take(1) is None
        assert slots.take(3 * SMALLEST_BYTES) is None
        slots.give(first)
        assert slots.take(2 * SMALLEST_BYTES) is None
        slots.give(second)
        assert slots.take(2 * SMALLEST_BYTES) is not None

    def test_a_slot_is_given_back_once(self):
        slots = SlotAllocator(2 * SMALLEST_BYTES)
        slot = slots.take(1)
        slots.give(slot)
        with pytest.raises(KeyError):
            slots.give(slot)
