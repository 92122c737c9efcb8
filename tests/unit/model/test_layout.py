"""Index arithmetic of a pass: nothing is lost, doubled or swapped, and malformed batches are named."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedserve.model.backend import TokenBatch
from embedserve.model.layout import attention_groups, check_batch, packed, padded, pass_size

row_lengths = st.lists(st.integers(1, 90), min_size=1, max_size=40)


def batch_of(lengths: list[int], **changes: Any) -> TokenBatch:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    fields: dict[str, Any] = {
        "ids": np.arange(1, offsets[-1] + 1, dtype=np.int32),
        "offsets": offsets,
        "normalize": np.ones(len(lengths), np.bool_),
        "pad_to": None,
    }
    return TokenBatch(**fields | changes)


class TestPacked:
    @given(lengths=row_lengths)
    def test_every_token_is_there_once_in_its_place(self, lengths: list[int]) -> None:
        batch = batch_of(lengths)

        layout = packed(batch, np.array(lengths))

        assert sorted(layout.order) == list(range(len(lengths)))
        assert (np.diff(layout.lengths) <= 0).all()
        for place, row in enumerate(layout.order):
            tokens = slice(layout.starts[place], layout.starts[place] + layout.lengths[place])
            expected = batch.ids[batch.offsets[row] : batch.offsets[row + 1]]
            assert layout.ids[tokens].tolist() == expected.tolist()
            assert layout.positions[tokens].tolist() == list(range(lengths[row]))
            assert set(layout.rows[tokens]) == {place}

    def test_equal_rows_keep_their_order(self) -> None:
        """Which makes a pass reproducible."""
        assert packed(batch_of([3, 5, 3, 5]), np.array([3, 5, 3, 5])).order.tolist() == [1, 3, 0, 2]

    def test_offset_positions_skip_the_padding_token_as_fairseq_does(self) -> None:
        batch = batch_of([4, 3], ids=np.array([7, 1, 8, 9, 5, 5, 1], np.int32))

        layout = packed(batch, np.array([4, 3]), offset_pad_id=1)

        assert layout.positions.tolist() == [2, 1, 3, 4, 2, 3, 1]


class TestPadded:
    @given(lengths=row_lengths)
    def test_real_places_hold_the_tokens_in_order(self, lengths: list[int]) -> None:
        batch = batch_of(lengths)

        grid = padded(batch, np.array(lengths), 96, 0)

        assert grid.ids.shape == (len(lengths), 96)
        assert grid.ids.reshape(-1)[grid.real].tolist() == batch.ids.tolist()
        assert grid.mask.sum(axis=1).tolist() == lengths
        assert not grid.ids[~grid.mask].any()


class TestAttentionGroups:
    @given(lengths=row_lengths)
    def test_cover_all_rows_by_their_length(self, lengths: list[int]) -> None:
        ordered = np.array(sorted(lengths, reverse=True))

        groups = attention_groups(ordered)

        row = start = 0
        for group in groups:
            rows = ordered[row : row + group.rows]
            assert group.start == start
            assert set(rows) == {group.length}
            row, start = row + group.rows, start + group.rows * group.length
        assert row == len(lengths)
        assert len(groups) == len(set(lengths))


class TestChecks:
    @pytest.mark.parametrize(
        ("batch", "sentence"),
        [
            (batch_of([2, 3], ids=np.array([1, 2, 3, 99, 4], np.int32)), "row 1 has the token id 99, outside"),
            (batch_of([2, 3], ids=np.array([1, 2, -1, 3, 4], np.int32)), "row 1 has the token id -1, outside"),
            (batch_of([2, 17]), "row 1 has 17 tokens; between 1 and 16 fit"),
            (batch_of([2, 9], pad_to=8), "row 1 has 9 tokens; between 1 and 8 fit"),
            (batch_of([2, 0, 3]), "row 1 has 0 tokens; between 1 and 16 fit"),
            (batch_of([2], offsets=np.array([0, 3], np.int32)), "offsets do not span the 2 token ids"),
            (batch_of([2], offsets=np.array([1, 2], np.int32)), "offsets do not span the 2 token ids"),
            (batch_of([2], offsets=np.array([0], np.int32)), "offsets do not span the 2 token ids"),
            (batch_of([4], offsets=np.array([0, 3, 2, 4], np.int32)), "one entry for each of the 3 rows"),
            (
                batch_of([4], offsets=np.array([0, 3, 2, 4], np.int32), normalize=np.ones(3, np.bool_)),
                "row 1 has -1 tokens",
            ),
            (batch_of([2], skip=np.array([0, 0], np.int32)), "one entry for each of the 1 rows"),
        ],
    )
    def test_malformed_batch_is_refused_by_row(self, batch: TokenBatch, sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            check_batch(batch, vocab_size=50, length_max=16)

    def test_good_batch_gives_its_lengths(self) -> None:
        assert check_batch(batch_of([2, 16]), vocab_size=50, length_max=16).tolist() == [2, 16]


class TestPassSize:
    def test_holds_the_tokens_and_at_most_an_eighth_more(self):
        for tokens in range(129, 20_000):
            assert tokens <= pass_size(tokens) <= tokens * 1.125

    def test_small_passes_go_up_in_sixteens(self):
        assert [pass_size(n) for n in (1, 16, 17, 128, 129)] == [16, 16, 32, 128, 144]

    def test_there_are_few(self):
        """Each size costs kernels that are made once and kept."""
        assert len({pass_size(n) for n in range(1, 4097)}) == 48
