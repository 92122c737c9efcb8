"""The series of one burst as a picture: what was offered, answered and refused, and the p99 below.

Decides the drawing only. matplotlib comes with the dependency group ``load``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw"]


def draw(series: dict[str, Any], path: Path) -> None:
    """Write ``path`` as SVG; ``series`` is what ``overload.series`` gives."""
    import matplotlib as mpl  # noqa: PLC0415 - only a run that draws needs it

    mpl.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    # The same numbers give the same file.
    mpl.rcParams["svg.hashsalt"] = "embedserve"
    figure, (calls, latency) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), height_ratios=(3, 2))
    at = series["at"]
    calls.step(at, series["offered"], where="pre", label="offered", color="0.6")
    calls.step(at, series["refused"], where="pre", label="refused", color="tab:orange")
    calls.step(at, series["answered"], where="pre", label="answered in time", color="tab:blue")
    calls.axhline(series["capacity"], linestyle="--", color="tab:green", label="capacity, closed loop")
    calls.set_ylabel("calls per second")
    calls.legend(loc="upper right")
    latency.step(series["p99_at"], series["p99_ms"], where="pre", color="tab:red")
    latency.set_ylabel("p99 of admitted, ms")
    latency.set_ylim(bottom=0)
    latency.set_xlabel("seconds; windows of half a second")
    for axis in (calls, latency):
        axis.axvspan(*series["burst"], color="0.93", zorder=0)
        axis.grid(visible=True, alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(f"written: loadtest/results/{path.name}")
