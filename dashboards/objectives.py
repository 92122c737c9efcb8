"""What is promised: the service level objectives, as ratios of counters.

Decides which calls count, which of them are bad, and how many may be. Must never know a panel or how often a rule runs.
Burn rates and windows are those of the Site Reliability Workbook, chapter 5, "Alerting on SLOs", table 5-8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dashboards.query import Scope, share
from embedserve.telemetry import instruments as m
from embedserve.telemetry import semconv

__all__ = [
    "AVAILABILITY", "BURNS", "EMBED", "EMBEDDING", "FAILED", "LATENCY", "LATENCY_BOUND_S", "OBJECTIVES",
    "PAGE_CALLS_MIN", "SHED", "WINDOWS", "Burn", "Objective",
]  # fmt: skip

EMBEDDING: Final = {"rpc_method": "|".join(semconv.EMBEDDING_METHODS)}
"""Calls that carry texts. Questions about the server (GetLoad, GetModel) are not what it is for."""
EMBED: Final = {"rpc_method": semconv.EMBEDDING_METHODS[0]}

FAILED: Final = ("INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED")
"""Statuses that are the server's fault, or that a caller has to take for it."""
SHED: Final = "RESOURCE_EXHAUSTED"
"""Refusals are a decision, with a hint, and have an alert of their own."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A share of calls that must be good, over 30 days."""

    name: str
    target: float
    counts: str
    """In words: which calls, and what makes one bad."""
    runbook: str
    """Heading of OPERATIONS.md."""
    every: Mapping[str, str]
    """Labels of the calls that count."""
    good: Mapping[str, str]
    """Labels of those that are good: with ``le`` they are counted in a bucket of the histogram."""

    @property
    def budget(self) -> float:
        """Share of calls that may be bad."""
        return round(1 - self.target, 9)

    def bad(self, scope: Scope, *, grows: str = "rate") -> str:
        """Bad calls in a second, or over the window with ``grows="increase"``."""
        grow = scope.rate if grows == "rate" else scope.increase
        good = grow(m.RPC_DURATION, where=self.good, part="_bucket" if "le" in self.good else "_count")
        return f"({grow(m.RPC_DURATION, where=self.every, part='_count')} - {good})"

    def ratio(self, scope: Scope) -> str:
        """Share of calls that are bad; nothing where there are no calls."""
        return share(self.bad(scope), scope.rate(m.RPC_DURATION, where=self.every, part="_count"))


_STATUS: Final = "rpc_response_status_code"
LATENCY_BOUND_S: Final = 0.5
"""What ``admission.latency_p95.slo_ms`` promises by default; a bound of the histogram, or nothing could be counted."""

AVAILABILITY: Final = Objective(
    "availability",
    0.999,
    "calls that carry texts and end with OK, INTERNAL, UNAVAILABLE or DEADLINE_EXCEEDED; the last three are bad",
    "Calls fail",
    {**EMBEDDING, _STATUS: "|".join(("OK", *FAILED))},
    {**EMBEDDING, _STATUS: "OK"},
)
LATENCY: Final = Objective(
    "latency",
    0.95,
    f"calls of Embed that end with OK; bad are those that took more than {LATENCY_BOUND_S:g} s",
    "High P95",
    {**EMBED, _STATUS: "OK"},
    {**EMBED, _STATUS: "OK", "le": f"{LATENCY_BOUND_S:g}"},
)
OBJECTIVES: Final = (AVAILABILITY, LATENCY)


@dataclass(frozen=True, slots=True)
class Burn:
    """A speed at which the error budget is spent, and how it is seen."""

    factor: float
    """1 spends the budget in 30 days."""
    long: str
    short: str
    """The same over a window a twelfth as long, so that the alert ends soon after the trouble."""
    severity: str


BURNS: Final = (
    Burn(14.4, "1h", "5m", "page"),
    Burn(6, "6h", "30m", "page"),
    Burn(3, "1d", "2h", "ticket"),
    Burn(1, "3d", "6h", "ticket"),
)
WINDOWS: Final = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
PAGE_CALLS_MIN: Final = 10
"""Bad calls in the long window below which nobody is woken: one failure of five calls at night is no outage."""
