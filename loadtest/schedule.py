"""When each call of an open loop is to be sent: computed before the run, from a seed.

Decides instants only. A precomputed schedule is what makes a latency honest: the call's clock starts when it was meant
to be sent, whether or not the client or the server was ready (wrk2; "coordinated omission"). Must never know a clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.scenario import Phase, Scenario

__all__ = ["Span", "arrivals", "timetable"]


@dataclass(frozen=True, slots=True)
class Span:
    """A phase with its place in the run."""

    phase: Phase
    begins: float
    """Seconds since the start of the run."""
    ends: float
    rate: float | None
    """Calls a second of an open loop; ``None`` of a closed one."""


def timetable(scenario: Scenario, capacity: float | None = None) -> list[Span]:
    """Every phase with its begin, end and rate. ``ValueError`` when a rate needs a capacity and there is none."""
    spans, at = [], 0.0
    for phase in scenario.phases:
        rate = phase.rate
        if phase.of_capacity is not None:
            if not capacity:
                raise ValueError(f"phase {phase.name} is a multiple of the capacity, and none is known")
            rate = phase.of_capacity * capacity
        spans.append(Span(phase, at, at + phase.seconds, rate))
        at += phase.seconds
    return spans


def arrivals(spans: list[Span], seed: int) -> npt.NDArray[np.float64]:
    """Instants of all open phases, ascending, in seconds since the start of the run: a Poisson process for each phase.

    Each phase draws from its own stream of the seed, so that a longer first phase leaves the second one as it was.
    """
    drawn = [
        span.begins + instants
        for index, span in enumerate(spans)
        if span.rate is not None
        for instants in [_poisson(span.rate, span.ends - span.begins, np.random.default_rng((seed, index)))]
    ]
    return np.concatenate(drawn) if drawn else np.empty(0)


def _poisson(rate: float, seconds: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    return np.concatenate(list(_pieces(rate, seconds, rng)))


def _pieces(rate: float, seconds: float, rng: np.random.Generator) -> Iterator[npt.NDArray[np.float64]]:
    """Exponential gaps until the time is over; as many at once as are likely to do."""
    at = 0.0
    while at < seconds:
        gaps = rng.exponential(1 / rate, int((seconds - at) * rate * 1.1) + 16)
        instants = at + np.cumsum(gaps)
        yield instants[instants < seconds]
        at = float(instants[-1])
