"""Which graph a batch takes: arithmetic, for any batch within the limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedserve.model.cuda.ladder import GraphKey, Ladder

LADDER = Ladder(tokens_max=16_384, length_max=512, rows_max=512, growth=1.25)
KEYS = LADDER.keys()


@st.composite
def batches(draw: st.DrawFn) -> list[int]:
    """Row lengths within the limits of ``LADDER``."""
    rows = draw(st.integers(1, 512))
    longest = draw(st.integers(1, 512))
    rest = draw(st.integers(1, max(1, min(longest, (16_384 - longest) // max(rows - 1, 1)))))
    return [longest] + [rest] * (rows - 1)


class TestKeys:
    @given(batches())
    def test_any_batch_has_a_key_that_covers_it_and_was_captured(self, lengths: list[int]) -> None:
        key = LADDER.key_for(sum(lengths), max(lengths), len(lengths))

        assert key is not None
        assert key in KEYS
        assert key.tokens >= sum(lengths)
        assert key.length >= max(lengths)
        assert key.rows >= len(lengths)

    @given(st.integers(1, 16_384))
    def test_a_pass_is_filled_up_by_a_quarter_or_less_than_a_step(self, tokens: int) -> None:
        key = LADDER.key_for(tokens, 1, 1)

        assert key is not None
        assert key.tokens < max(tokens * 1.25, tokens + 64) + 1e-9

    def test_the_largest_comes_first(self) -> None:
        keys = KEYS

        assert keys[0] == GraphKey(16_384, 512, 512)
        assert [key.tokens for key in keys] == sorted((key.tokens for key in keys), reverse=True)
        assert len(set(keys)) == len(keys)

    def test_no_key_is_captured_that_no_batch_takes(self) -> None:
        """8 rows of up to 128 tokens are 1,024 at the most, and a row of more than 256 is more than 64."""
        for key in KEYS:
            assert any(LADDER.key_for(*shape) == key for shape in _extremes(key)), key

    def test_a_batch_over_a_limit_has_none(self) -> None:
        assert LADDER.key_for(16_385, 1, 1) is None
        assert LADDER.key_for(600, 513, 2) is None
        assert LADDER.key_for(600, 1, 513) is None

    def test_the_number_of_graphs_is_bounded(self) -> None:
        assert len(KEYS) <= 180
        assert len(Ladder(tokens_max=16_384, length_max=512, rows_max=512, growth=1.5).keys()) <= 120

    @pytest.mark.parametrize("tiles_max", [1, 16, 64, 127, 128, 200, 512])
    def test_what_tiles_serve_is_a_class_of_lengths(self, tiles_max: int) -> None:
        """A pass of no longer rows has a key of no longer rows, and one of longer rows never has such a key."""
        ladder = Ladder(tokens_max=2048, length_max=512, rows_max=64, growth=1.5, tiles_max=tiles_max)
        keys = ladder.keys()
        for longest in range(1, 513):
            for rows in (1, 4, 64):
                if longest + rows - 1 > 2048:
                    continue
                key = ladder.key_for(longest + rows - 1, longest, rows)
                assert key is not None
                assert (key.length <= tiles_max) == (longest <= tiles_max)
                assert key in keys

    def test_every_key_has_an_example_that_it_covers(self) -> None:
        for ladder in (LADDER, Ladder(tokens_max=2048, length_max=512, rows_max=64, growth=1.5, tiles_max=16)):
            keys = ladder.keys()
            for key in keys:
                lengths = key.example()
                assert 1 <= min(lengths) <= max(lengths) <= key.length
                assert len(lengths) <= key.rows
                assert key.tokens // 2 < sum(lengths) <= key.tokens or len(lengths) == key.rows

    def test_small_limits_make_a_small_ladder(self) -> None:
        assert Ladder(tokens_max=16, length_max=8, rows_max=1, growth=1.5).keys() == (GraphKey(64, 8, 1),)


def _extremes(key: GraphKey) -> list[tuple[int, int, int]]:
    """Batches at the corners of a key: as many tokens as it takes, or just as many as its rows can have."""
    return [
        (tokens, longest, rows)
        for rows in (key.rows, key.rows // 8 + 1, 1)
        for longest in (key.length, key.length // 2 + 1, 1)
        for tokens in (min(key.tokens, longest + (rows - 1) * longest),)
        if tokens >= longest + rows - 1
    ]
