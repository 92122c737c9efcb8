"""What a metric is: its kind, its labels, and the names that it goes by.

Decides how OpenTelemetry's names become Prometheus names. Must never know which metrics there are (``instruments``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import Final

__all__ = ["Instrument", "Kind", "Label", "prometheus_label", "prometheus_name"]


class Kind(Enum):
    """What becomes of a value over time."""

    COUNTER = "counter"
    """Only grows."""
    GAUGE = "gauge"
    """Read at the scrape."""
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Label:
    """An attribute of a metric, and the values that are declared for it."""

    name: str
    values: tuple[str, ...] = ()
    """Empty: known at run time only, such as a model's name; still few."""


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric."""

    name: str
    kind: Kind
    unit: str
    """UCUM, as OpenTelemetry writes it: ``s``, ``By``, ``1`` or a noun in braces."""
    description: str
    labels: tuple[Label, ...] = ()
    series: tuple[tuple[str, ...], ...] | None = None
    """The declared label sets where not every combination can occur."""
    buckets: tuple[float, ...] = ()
    """Of a histogram; ``DURATION_BUCKETS_S`` stands for the configured bounds."""
    constant: tuple[tuple[str, str], ...] = ()
    """Attributes that every series carries."""

    def declared(self) -> tuple[tuple[str, ...], ...]:
        """Label sets that are there from the first scrape."""
        return self.series if self.series is not None else tuple(product(*(label.values for label in self.labels)))


_UNITS: Final = {"s": "seconds", "By": "bytes", "1": "ratio"}


def prometheus_name(name: str, unit: str, kind: Kind) -> str:
    """The name that a scrape shows, without ``_bucket``, ``_sum`` and ``_count``.

    After OpenTelemetry's "Prometheus and OpenMetrics Compatibility": dots become underscores, the unit a suffix (a unit
    in braces none, ``1`` becomes ``ratio`` on gauges only), counters end in ``_total``.
    """
    words = "".join(char if char.isalnum() else "_" for char in name)
    suffix = _UNITS.get(unit, "")
    if suffix and not (suffix == "ratio" and kind is not Kind.GAUGE) and not words.endswith(f"_{suffix}"):
        words += f"_{suffix}"
    return f"{words}_total" if kind is Kind.COUNTER else words


def prometheus_label(name: str) -> str:
    """The label that an attribute becomes."""
    return "".join(char if char.isalnum() else "_" for char in name)
