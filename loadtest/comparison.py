"""Two sides against each other, figure by figure.

Decides what counts as a difference: the ranges of the repetitions do not overlap. Sides that were run in turns are also
compared pair by pair, so that a machine that slows down hurts both alike. Must never know how they were run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loadtest.summary import FIGURES, spread, summarised

__all__ = ["NO_DIFFERENCE", "compared", "verdict"]

NO_DIFFERENCE = "no difference shown"
ONE_EACH = "no difference shown: one repetition has no range"
ENOUGH = 3
"""Repetitions of each side below which two ranges are apart by luck too often (1 in 3 for 2 of each)."""


def compared(a: Mapping[str, Any], b: Mapping[str, Any], *, interleaved: bool) -> dict[str, Any]:
    """Compare two results of ``store.py``. Raises ``ValueError`` when they are of different tests."""
    _same_test(a, b)
    sides = [summarised(side["repetitions"]) for side in (a, b)]
    counted = [side["repetitions"] - side["void"] for side in sides]
    rows = [
        _row(i, name, a, b, sides, interleaved=interleaved, enough=min(counted) > 1)
        for i in range(min(len(side["phases"]) for side in sides))
        for name in FIGURES
        if all(side["phases"][i][name] is not None for side in sides)
    ]
    notes = []
    for label, side in zip("AB", sides, strict=True):
        if side["void"]:
            notes.append(f"{label}: {side['void']} of {side['repetitions']} repetitions are void and do not count")
    if min(counted) < ENOUGH:
        notes.append(f"fewer than {ENOUGH} repetitions of a side: ranges this short are apart by luck too often")
    if not interleaved:
        notes.append("the sides were not run in turns: whatever else changed between them is in the difference, too")
    if a["machine"] != b["machine"]:
        notes.append("the clients ran on different machines")
    return {
        "scenario": a["scenario"]["name"],
        "a": a["target"],
        "b": b["target"],
        "interleaved": interleaved,
        "repetitions": counted,
        "rows": rows,
        "notes": notes,
    }


def _same_test(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    for part in ("texts", "method", "seed", "timeout_s", "phases"):
        for place, left, right in _differences(part, a["scenario"][part], b["scenario"][part]):
            raise ValueError(
                f"these are different tests: {place} is {left} in A and {right} in B; run both with one scenario"
            )


def _differences(place: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two settings differ, with both values; a phase's name is no setting."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            if key != "name":
                yield from _differences(f"{place}.{key}", a.get(key), b.get(key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (one, other) in enumerate(zip(a, b, strict=True), 1):
            yield from _differences(f"{place}[{number}]", one, other)
    elif isinstance(a, list) and isinstance(b, list):
        yield f"the number of {place}", len(a), len(b)
    elif a != b:
        yield place, _shown(a), _shown(b)


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def _row(
    phase: int,
    name: str,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    sides: Sequence[Mapping[str, Any]],
    *,
    interleaved: bool,
    enough: bool,
) -> dict[str, Any]:
    left, right = (side["phases"][phase][name] for side in sides)
    ratio: dict[str, float] | None = None
    if interleaved:
        ratios = [
            x / y
            for one, other in zip(a["repetitions"], b["repetitions"], strict=True)
            if not one["void"] and not other["void"]
            for x, y in [(_figure(one, phase, name), _figure(other, phase, name))]
            if x is not None and y
        ]
        ratio = spread(ratios) if ratios else None
    elif right["lowest"] > 0:
        ratio = {
            "median": left["median"] / right["median"],
            "lowest": left["lowest"] / right["highest"],
            "highest": left["highest"] / right["lowest"],
        }
    return {
        "phase": sides[0]["phases"][phase]["name"],
        "figure": name,
        "a": left,
        "b": right,
        "ratio": ratio,
        "verdict": verdict(left, right, ratio, more_is_better=FIGURES[name][1]) if enough else ONE_EACH,
    }


def _figure(run: Mapping[str, Any], phase: int, name: str) -> float | None:
    found = run["phases"][phase]
    value: float | None = (
        (found["latency_ms"] or {}).get(name.removesuffix("_ms")) if name.endswith("_ms") else found[name]
    )
    return value


def verdict(
    a: Mapping[str, float], b: Mapping[str, float], ratio: Mapping[str, float] | None, *, more_is_better: bool
) -> str:
    """In words: which side is better, or that nothing is shown.

    Where the ranges overlap, or the pairs do not agree on who is better, nothing is shown.
    """
    apart = a["lowest"] > b["highest"] or b["lowest"] > a["highest"]
    agreed = ratio is None or ratio["lowest"] > 1 or ratio["highest"] < 1
    if not apart or not agreed:
        return NO_DIFFERENCE
    better = "A" if (a["median"] > b["median"]) == more_is_better else "B"
    if not min(a["median"], b["median"]):
        return f"{better} is better"
    times = max(a["median"], b["median"]) / min(a["median"], b["median"])
    return f"{better} is better, {times:.2f} x"
