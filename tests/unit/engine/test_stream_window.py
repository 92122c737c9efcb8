"""How much of one stream is admitted at a time."""

from __future__ import annotations

import time
from typing import cast

import pytest

from embedserve.engine.call import Call
from embedserve.engine.intake import Intake
from embedserve.engine.stages import Stages
from embedserve.engine.stream import WINDOW_PASSES, Window


class Estimates:
    """Says how long texts are before they are tokenised."""

    def __init__(self, tokens: int, pass_tokens: int) -> None:
        self.tokens, self.pass_tokens = tokens, pass_tokens

    def estimate(self, _call: Call, items: int) -> int:
        return self.tokens * items


def window(texts: int, tokens: int, pass_tokens: int, items: int = 512) -> Window:
    call = Call(Stages(time.monotonic_ns()), texts=["a"] * texts)
    return Window(call, cast(Intake, Estimates(tokens, pass_tokens)), items)


class TestWindow:
    def test_of_short_texts_it_is_the_setting(self) -> None:
        short = window(10_000, 5, 2_000)

        assert (short.piece, short.limit) == (128, 512)

    @pytest.mark.parametrize("tokens", [50, 232, 512])
    def test_of_long_ones_it_is_some_passes(self, tokens: int) -> None:
        """A window of 512 texts would be seconds of work, for which admission refuses everybody else."""
        long = window(10_000, tokens, 2_000)

        assert long.piece * tokens <= 2_000
        assert long.limit * tokens <= WINDOW_PASSES * 2_000
        assert long.limit >= 3 * long.piece  # enough for a device that takes two at once

    def test_a_text_that_fills_a_pass_goes_alone(self) -> None:
        longest = window(100, 512, 512)

        assert (longest.piece, longest.limit) == (1, WINDOW_PASSES)
        assert window(100, 900, 512).piece == 1

    def test_it_follows_what_texts_turn_out_to_be(self) -> None:
        changing = window(10_000, 5, 2_000)
        for _ in range(20):
            changing.saw(changing.piece, changing.piece * 250)
        grown = changing.piece
        for _ in range(40):
            changing.saw(changing.piece, changing.piece * 5)

        assert grown == 8
        assert changing.piece == 128

    def test_a_stream_shorter_than_a_piece(self) -> None:
        assert window(1, 5, 2_000).piece == 128
