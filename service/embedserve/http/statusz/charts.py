"""Small pictures of numbers, as SVG without a style of its own.

Decides what a bar and a line look like in shape; the style sheet gives them colour. A picture is never the only place
where something is said: a bar stands beside its number, and a line has its lowest, highest and last value in words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from embedserve.http.statusz.markup import Html, tag

__all__ = ["bar", "line"]

WIDTH, HEIGHT = 240, 24


def bar(part: float | None, *, level: str = "") -> Html:
    """A part of a whole. ``level`` is ``warn`` where it is too much."""
    width = 0 if part is None else max(0.0, min(part, 1.0)) * 100
    return tag(
        "svg",
        tag("rect", class_="track", width=100, height=8),
        tag("rect", class_=f"fill {level}".strip(), width=f"{width:.1f}", height=8),
        class_="bar",
        viewBox="0 0 100 8",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def line(values: Sequence[float | None], write: Callable[[float], str], what: str, *, top: float | None = None) -> Html:
    """How a value went, oldest on the left. ``top`` is the value of the upper edge; else the highest there is."""
    known = [value for value in values if value is not None]
    highest = max(known, default=0.0)
    ceiling = top or highest or 1.0
    step = WIDTH / max(len(values) - 1, 1)
    points = [
        (index * step, HEIGHT - 1 - min(value / ceiling, 1.0) * (HEIGHT - 2))
        for index, value in enumerate(values)
        if value is not None
    ]
    path = " ".join(f"{'L' if index else 'M'}{x:.1f} {y:.1f}" for index, (x, y) in enumerate(points))
    area = f"{path} L{points[-1][0]:.1f} {HEIGHT} L{points[0][0]:.1f} {HEIGHT} Z" if points else ""
    said = f"{what}: from {write(min(known))} to {write(highest)}, now {write(known[-1])}" if known else f"{what}: none"
    return tag(
        "svg",
        tag("path", class_="area", d=area),
        tag("path", class_="line", d=path),
        class_="spark",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=said,
    )
