"""Which of several engines takes a call.

Decides it from what each engine has told of its load and what this front end has sent and had back since. Pure: no
clock, no loop. Must never know how a load is told, what an engine refuses, or texts.

A call goes to the engine that would have done it first. A report is some 50 ms old, and each of ``n`` front ends has
the same one: if each added only its own calls to it, all would fill the same gap, and the engine that had least to do
would have ``n`` times too much (the herd of Mitzenmacher, "How Useful Is Old Information?", 2000). So what this front
end has sent since the report counts ``n`` times: the others are taken to do as it does. Where connections are dealt
unevenly, that is wrong by as much for every engine alike, until the next report. Engines that are alike do not
have turns: each front end has a home, which takes its calls until it has a millisecond more to do than another. Calls
that are dealt one by one make small passes and small writes on every engine: on two cores, where a second engine can
only lose, two of a null model did 31 % less than one with turns, 17 % less with homes. Homes are dealt out, since an
engine's event loop has its limit too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = ["Standing", "choose"]


ALIKE_S: Final = 0.001
"""Engines that would be done within so much of each other are alike: no caller notices, and rates are estimates."""


class Standing(NamedTuple):
    """What a front end knows of one engine."""

    usable: bool = True
    """Whether it may be sent anything: it is there, ready and not silent."""
    late: bool = False
    """Whether it has not answered for longer than is usual, and may be about to count as silent."""
    reported_tokens: int = 0
    """That waited or ran when it told its load."""
    tokens_per_second: float = 0.0
    """That it does, as it says; 0 before it has learned it."""
    ours: int = 0
    """Tokens of this front end that are with it now."""
    ours_reported: int = 0
    """... and that were when it told its load."""


def choose(standings: Sequence[Standing], tokens: int, *, front_ends: int, home: int) -> int | None:
    """The place of the engine for a call of ``tokens``, or ``None`` where none is usable.

    Of engines that are alike ``home`` takes it, or the next one after it.
    """
    fastest = max((one.tokens_per_second for one in standings), default=0.0) or 1.0
    # An engine that has not learned its rate is taken for as fast as the fastest: it never would otherwise.
    done_in = {
        place: (one.late, (waiting_tokens(one, front_ends) + tokens) / (one.tokens_per_second or fastest))
        for place, one in enumerate(standings)
        if one.usable
    }
    if not done_in:
        return None
    late, soonest = min(done_in.values())
    alike = [place for place, (is_late, s) in done_in.items() if is_late == late and s <= soonest + ALIKE_S]
    return min(alike, key=lambda place: (place - home) % len(standings))


def waiting_tokens(one: Standing, front_ends: int) -> int:
    """Tokens that are with an engine now, as far as one of ``front_ends`` can tell."""
    return max(one.ours, one.reported_tokens + front_ends * (one.ours - one.ours_reported))
