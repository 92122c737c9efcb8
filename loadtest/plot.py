"""Plots as inline SVG, coloured by the page's style sheet: light, dark and print need no second picture.

Decides axes, ticks and marks. Must never know what is plotted. Series are told apart by colour and by a label, points
carry a title that a pointer shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

__all__ = ["Band", "Line", "bars", "chart", "short"]

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 26, 14, 46
COLOURS = 6
"""Classes c0 to c5; a seventh line begins anew."""
ROW = 26
LABEL_WIDTH = 250


@dataclass(frozen=True, slots=True)
class Line:
    """One series. ``None`` in ``y`` is a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    points: bool = False
    """Whether each value is marked."""


@dataclass(frozen=True, slots=True)
class Band:
    """A stretch of the x axis with a name."""

    label: str
    begins: float
    ends: float


def short(value: float) -> str:
    """A tick's label."""
    if value and abs(value) < 0.01:
        return f"{value:.3g}"
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e6 if unit == 'M' else 1e3):g}{unit}"
    return f"{value:.4g}"


def chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    bands: Sequence[Band] = (),
    x_ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """Lines over a common x axis that begins where they begin; y begins at 0, or is logarithmic."""
    xs = [x for line in lines for x, y in zip(line.x, line.y, strict=True) if y is not None]
    ys = [y for line in lines for y in line.y if y is not None and (y > 0 or not log_y)]
    if not xs or not ys:
        return '<p class="none">Nothing to show.</p>'
    x_low, x_high = (x_ticks[0][0], x_ticks[-1][0]) if x_ticks else (min(0.0, *xs), max(xs) or 1.0)
    ticks_y = _log_ticks(min(ys), max(ys)) if log_y else _ticks(0.0, max(ys) or 1.0)
    place_x = _scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    low, high = ticks_y[0], max(ticks_y[-1], *ys)
    linear = _scale(low, high, HEIGHT - BOTTOM, TOP)
    logarithmic = _scale(log10(low), log10(high), HEIGHT - BOTTOM, TOP) if log_y else linear

    def place_y(value: float) -> float:
        return logarithmic(log10(max(value, low))) if log_y else linear(value)

    named = x_ticks or [(tick, short(tick)) for tick in _ticks(x_low, x_high) if tick <= x_high]
    axes = [
        (f'x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}"', x_label),
        (f'transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)"', y_label),
    ]
    parts = [
        *_bands(bands, place_x),
        *(_grid_y(place_y(tick), short(tick)) for tick in ticks_y),
        *(_tick_x(place_x(tick), name) for tick, name in named),
        *(part for number, line in enumerate(lines) for part in _line(number, line, place_x, place_y, log_y=log_y)),
        *(f'<text class="axis" {place} text-anchor="middle">{escape(label)}</text>' for place, label in axes),
    ]
    name = escape(f"{y_label} against {x_label}")
    legend = "".join(
        f'<span class="key"><i class="c{i % COLOURS}"></i>{escape(line.label)}</span>' for i, line in enumerate(lines)
    )
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
    return f'{picture}<div class="keys">{legend}</div>'


def bars(rows: Sequence[tuple[str, float, str]], *, highest: float | None = None, colour: int = 0) -> str:
    """One bar a row: its name, its value, and the value in words."""
    if not rows:
        return '<p class="none">Nothing to show.</p>'
    top = highest or max(value for _, value, _ in rows) or 1.0
    room = WIDTH - LABEL_WIDTH - 120
    height = ROW * len(rows) + 8
    parts = []
    for number, (name, value, words) in enumerate(rows):
        y, size = 4 + number * ROW, max(1.0, room * value / top)
        parts.append(
            f'<text class="tick" x="{LABEL_WIDTH - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="bar c{colour}" x="{LABEL_WIDTH}" y="{y + 3}" width="{size:.1f}" height="{ROW - 8}">'
            f"<title>{escape(name)}: {escape(words)}</title></rect>"
            f'<text class="tick" x="{LABEL_WIDTH + size + 6:.1f}" y="{y + 16}">{escape(words)}</text>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="bars">{"".join(parts)}</svg>'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    width = (high - low) or 1.0
    return lambda value: start + (value - low) / width * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below ``low`` to above ``high``, about five."""
    step = 10.0 ** floor(log10((high - low) or 1.0))
    for part in (0.2, 0.5, 1.0, 2.0):
        if (high - low) / (step * part) <= 6:
            step *= part
            break
    first, last = floor(low / step), ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade between the two, and the ones right outside."""
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    ticks = [mantissa * 10.0**decade for decade in decades for mantissa in (1, 2, 5)]
    below = [tick for tick in ticks if tick <= low]
    above = [tick for tick in ticks if tick >= high]
    return [tick for tick in ticks if below[-1] <= tick <= above[0]] if below and above else ticks


def _grid_y(y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
    )


def _tick_x(x: float, label: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(label)}</text>'


def _bands(bands: Sequence[Band], place: Callable[[float], float]) -> Iterator[str]:
    for number, band in enumerate(bands):
        left, right = place(band.begins), place(band.ends)
        yield f'<rect class="band{number % 2}" x="{left:.1f}" y="{TOP}" width="{max(0.0, right - left):.1f}"'
        yield f' height="{HEIGHT - BOTTOM - TOP}"><title>{escape(band.label)}</title></rect>'
        if right - left > 7 * len(band.label):
            yield f'<text class="tick" x="{(left + right) / 2:.1f}" y="{TOP + 11}" text-anchor="middle">'
            yield f"{escape(band.label)}</text>"


def _line(
    number: int, line: Line, place_x: Callable[[float], float], place_y: Callable[[float], float], *, log_y: bool
) -> Iterator[str]:
    colour = f"c{number % COLOURS}"
    path, pen_up = [], True
    for x, y in zip(line.x, line.y, strict=True):
        if y is None or (log_y and y <= 0):
            pen_up = True
            continue
        path.append(f"{'M' if pen_up else 'L'}{place_x(x):.1f} {place_y(y):.1f}")
        pen_up = False
        if line.points:
            yield f'<circle class="{colour}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3.2">'
            yield f"<title>{escape(line.label)}: {short(y)} at {short(x)}</title></circle>"
    yield f'<path class="{colour}" d="{" ".join(path)}"/>'
