"""How numbers, durations and instants are written for people.

Decides units and digits. Must never know what they measure. Three digits at most say something; a no-break space
stands between a number and its unit.
"""

from __future__ import annotations

import math
import time

from embedserve.http.statusz.markup import Html, tag

__all__ = ["NONE", "amount", "clock", "count", "duration", "instant", "rate", "several", "share", "size"]

NONE = "\N{EN DASH}"
"""Where there is nothing to say."""
_SPACE = "\N{NO-BREAK SPACE}"
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


def _digits(value: float) -> str:
    """Three significant digits, and none after the point from 100 on."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 9.995 else 2}f}".rstrip("0").rstrip(".")


def count(value: float) -> str:
    """A whole number."""
    return f"{value:,.0f}"


def amount(value: float | None) -> str:
    """Any number."""
    return NONE if value is None else _digits(value)


def several(number: float, noun: str) -> str:
    """So many of something."""
    return f"{count(number)} {noun}" + ("" if number == 1 else "s")


def rate(per_s: float) -> str:
    """Something a second."""
    return f"{_digits(per_s)}/s"


def share(part: float | None) -> str:
    """A part of the whole, in percent; what is there is never written as 0."""
    if part is None:
        return NONE
    percent = part * 100
    if 0 < percent < 0.1:
        return f"<0.1{_SPACE}%"
    if percent < 9.95:
        return f"{percent:.1f}".removesuffix(".0") + f"{_SPACE}%"
    return f"{99 if 99 < percent < 100 else percent:.0f}{_SPACE}%"


def duration(seconds: float | None) -> str:
    """How long something took, or is old."""
    if seconds is None or math.isnan(seconds):
        return NONE
    if seconds < 0.0000005:
        return f"0{_SPACE}s"
    if seconds < 0.001:
        return f"{_digits(seconds * 1e6)}{_SPACE}µs"
    if seconds < 0.9995:
        return f"{_digits(seconds * 1e3)}{_SPACE}ms"
    if seconds < 2 * _MINUTE:
        return f"{_digits(seconds)}{_SPACE}s"
    for whole, unit, part, small in ((_DAY, "d", _HOUR, "h"), (_HOUR, "h", _MINUTE, "min"), (_MINUTE, "min", 1, "s")):
        if seconds >= whole:
            rest = int(seconds % whole) // part
            return f"{int(seconds // whole)}{_SPACE}{unit}" + (f"{_SPACE}{rest}{_SPACE}{small}" if rest else "")
    return NONE


def clock(at_s: float, now_s: float) -> str:
    """An instant, UTC: the time of day, and the date where it is not today's."""
    at = time.gmtime(at_s)
    of_day = time.strftime("%H:%M:%S", at)
    return of_day if at[:3] == time.gmtime(now_s)[:3] else time.strftime("%d %b ", at) + of_day


def instant(at_s: float | None, now_s: float) -> Html | str:
    """An instant, UTC, that machines can read too."""
    if at_s is None:
        return NONE
    return tag("time", clock(at_s, now_s), datetime=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s)))


def size(octets: float) -> str:
    """Bytes."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if octets >= 1 << power:
            return f"{_digits(octets / (1 << power))}{_SPACE}{unit}"
    return f"{octets:.0f}{_SPACE}B"
