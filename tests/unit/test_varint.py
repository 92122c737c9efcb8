"""Numbers as protobuf writes them."""

from __future__ import annotations

import pytest
from google.protobuf import wrappers_pb2

from embedserve.varint import varint


class TestVarint:
    @pytest.mark.parametrize(
        "number",
        [*range(1, 300), *(edge + step for power in range(7, 64, 7) for edge in [1 << power] for step in (-1, 0, 1)),
         (1 << 64) - 1],
    )  # fmt: skip
    def test_is_what_protobuf_writes(self, number):
        assert b"\x08" + varint(number) == wrappers_pb2.UInt64Value(value=number).SerializeToString()

    def test_of_nothing_is_a_byte(self):
        assert varint(0) == b"\0"
