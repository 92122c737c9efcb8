"""How long before the end of a pass the next one is closed."""

import pytest

from embedserve.engine.engine import EngineSettings
from embedserve.engine.tokenization import TokenizerSettings

US = 1_000


def settings(overlap_us: int) -> EngineSettings:
    return EngineSettings(
        tokenizer=TokenizerSettings(threads=1, max_pending=1, inline_chars=0, chunk_texts=1),
        max_requests_in_flight=1,
        batches_in_flight=2,
        prepare_ahead_ns=1_000 * US,
        overlap_ahead_ns=overlap_us * US,
        warm_up_tokens=1,
        stream_window_items=1,
    )


@pytest.mark.parametrize(
    ("pass_us", "ahead_us"),
    [
        (0, 1_000),
        (4_000, 1_000),
        (12_000, 3_000),
        (20_000, 5_000),
        (80_000, 5_000),
    ],
)
def test_a_quarter_of_a_pass_between_the_limits(pass_us: int, ahead_us: int) -> None:
    """Beside a short pass one that is closed early takes one or two texts and leaves the others waiting for both."""
    assert settings(5_000).ahead_ns(2, pass_us * US) == ahead_us * US


def test_a_device_that_takes_one_needs_time_to_hand_over_and_no_more() -> None:
    assert settings(5_000).ahead_ns(1, 80_000 * US) == 1_000 * US


def test_no_overlap_can_be_asked_for() -> None:
    assert settings(0).ahead_ns(2, 80_000 * US) == 0
