"""Repetitions as one figure each: median and range; and whether they reach the marks.

Decides what of a run is comparable. Void repetitions do not count. Must never know how a run was made.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.scenario import Marks

__all__ = ["FIGURES", "judged", "spread", "summarised"]

FIGURES = {
    "calls_per_s": ("calls/s", True),
    "texts_per_s": ("texts/s", True),
    "tokens_per_s": ("tokens/s", True),
    "p50_ms": ("p50, ms", False),
    "p95_ms": ("p95, ms", False),
    "p99_ms": ("p99, ms", False),
    "failed_share": ("failed", False),
}
"""How each figure is called, and whether more of it is better."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def summarised(repetitions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median and range of each figure of each phase, over the repetitions that count."""
    counted = [one for one in repetitions if not one["void"]]
    phases = (
        [_phase([one["phases"][i] for one in counted]) for i in range(len(counted[0]["phases"]))] if counted else []
    )
    summary: dict[str, Any] = {
        "repetitions": len(repetitions),
        "void": len(repetitions) - len(counted),
        "phases": phases,
    }
    if not counted:
        return summary
    for name in ("capacity", "recovery_s"):
        if all(one[name] is not None for one in counted):
            summary[name] = spread([one[name] for one in counted])
    summary["client_cpu_share"] = spread([sum(c["cpu_share"] for c in one["clients"]) for one in counted])
    efficiency = [
        one["server"]["padding_efficiency"] for one in counted if "padding_efficiency" in one.get("server", {})
    ]
    if efficiency:
        summary["padding_efficiency"] = spread(efficiency)
    return summary


def _phase(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns: dict[str, list[float]] = {name: [] for name in FIGURES}
    for run in runs:
        latency = run["latency_ms"] or {}
        for name in FIGURES:
            value = latency.get(name.removesuffix("_ms")) if name.endswith("_ms") else run[name]
            if value is not None:
                columns[name].append(value)
    return {
        "name": runs[0]["name"],
        "callers": runs[0]["callers"],
        "rate": spread([run["rate"] for run in runs]) if runs[0]["rate"] is not None else None,
        **{name: spread(values) if len(values) == len(runs) else None for name, values in columns.items()},
    }


def judged(marks: Marks, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each mark that was set: its name, what was asked, what was found, and whether it is met. Medians count."""
    phases = summary["phases"]
    if not phases:
        return []

    def medians(name: str) -> list[float]:
        # A phase without an answer has no latency: it meets no mark.
        return [phase[name]["median"] if phase[name] else float("inf") for phase in phases]

    top = max(range(len(phases)), key=lambda i: phases[i]["rate"]["median"] if phases[i]["rate"] else 0.0)
    capacity = summary.get("capacity", {}).get("median")
    recovery = summary.get("recovery_s", {}).get("median")
    found: dict[str, tuple[float | None, bool]] = {
        "calls_per_s_at_least": (max(medians("calls_per_s")), True),
        "texts_per_s_at_least": (max(medians("texts_per_s")), True),
        "p50_ms_at_most": (max(medians("p50_ms")), False),
        "p99_ms_at_most": (max(medians("p99_ms")), False),
        "failed_share_at_most": (max(medians("failed_share")), False),
        "goodput_of_capacity_at_least": (phases[top]["calls_per_s"]["median"] / capacity if capacity else None, True),
        "recovery_s_at_most": (recovery, False),
        "throughput_never_falls_by": (_fall(medians("texts_per_s")), False),
    }
    rows = []
    for name, asked in marks.model_dump(exclude_none=True).items():
        value, more_is_better = found[name]
        met = value is not None and (value >= asked if more_is_better else value <= asked)
        rows.append({"mark": name, "asked": asked, "found": value, "met": met})
    return rows


def _fall(rates: Sequence[float]) -> float:
    """The largest share of the best rate so far that a later phase lost."""
    best = fall = 0.0
    for rate in rates:
        best = max(best, rate)
        fall = max(fall, 1 - rate / best if best else 0.0)
    return fall
