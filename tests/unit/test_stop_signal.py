"""Which signal is a wish to stop, and which one to stop at once."""

from __future__ import annotations

import signal

from embedserve.stop_signal import TOGETHER_S, StopSignals


def test_those_that_come_together_are_one_wish() -> None:
    told: list[object] = []
    now = [100.0]
    signals = StopSignals(lambda: told.append("stop"), told.append, lambda: now[0])

    signals.take(signal.SIGTERM)
    now[0] += TOGETHER_S - 0.001
    signals.take(signal.SIGTERM)
    signals.take(signal.SIGINT)
    assert told == ["stop"]

    now[0] += 0.001
    signals.take(signal.SIGINT)
    assert told == ["stop", signal.SIGINT]
