"""A pass's rows are the right slices of the right submissions, in order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedserve.engine.worker import Part, Pass, assemble


def part(lengths: list[int], indexes: list[int], first_id: int, *, normalize: bool = True, skip: int = 0) -> Part:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    ids = np.arange(first_id, first_id + int(offsets[-1]), dtype=np.int32)
    return Part(ids, offsets, tuple(indexes), normalize, skip)


@st.composite
def passes(draw: st.DrawFn) -> list[Part]:
    parts = []
    for number in range(draw(st.integers(1, 4))):
        lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
        indexes = sorted(draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
        parts.append(part(lengths, indexes, 1000 * number, normalize=draw(st.booleans()), skip=draw(st.integers(0, 2))))
    return parts


class TestAssemble:
    """``assemble``."""

    @given(passes())
    def test_row_r_is_the_rth_index_of_the_parts_read_in_order(self, parts: list[Part]) -> None:
        expected = [(p.ids[p.offsets[i] : p.offsets[i + 1]], p.normalize, p.skip) for p in parts for i in p.indexes]
        batch = assemble(Pass(1, parts, len(expected), None))

        assert batch.offsets.dtype == batch.ids.dtype == np.int32
        assert len(batch.offsets) == len(expected) + 1
        for r, (ids, normalize, skip) in enumerate(expected):
            assert np.array_equal(batch.ids[batch.offsets[r] : batch.offsets[r + 1]], ids)
            assert batch.normalize[r] == normalize
            assert (0 if batch.skip is None else batch.skip[r]) == skip

    def test_a_submission_that_rides_alone_is_not_copied(self) -> None:
        alone = part([3, 4], [0, 1], 7)
        batch = assemble(Pass(1, [alone], 2, None))

        assert np.shares_memory(batch.ids, alone.ids)

    def test_no_skip_array_is_made_where_nothing_is_skipped(self) -> None:
        assert assemble(Pass(1, [part([3], [0], 7)], 1, None)).skip is None
