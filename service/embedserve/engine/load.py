"""How loaded the engine is, for balancers, probes and people.

Decides what "accepting", "degraded" and "overloaded" mean. Must never know who asks: GetLoad, the HTTP health page and
the metrics all say the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from embedserve.scheduling.scheduler import Scheduler

__all__ = ["NO_LOAD", "LoadReport", "add_loads", "report_load"]

ORDINARY_TOKENS = 32
"""A request of ordinary size: one short text."""
DEGRADED_SHARE = 0.7
"""Share of a limit from which the server asks to be sent less; py-gpu-inference uses the same of its drain limit."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The load now; the fields of GetLoad and of the HTTP health page."""

    state: str
    """``healthy``, ``degraded``, ``overloaded`` or ``not_serving``."""
    accepting_requests: bool
    queued_tokens: int
    service_rate_tokens_per_second: float
    estimated_drain_time_ms: float
    p95_latency_ms: float
    queue_depth: int
    uptime_seconds: int
    running_items: int
    running_tokens: int


NO_LOAD: Final = LoadReport("not_serving", False, 0, 0.0, 0.0, 0.0, 0, 0, 0, 0)
"""Before there is an engine that has one."""


def report_load(scheduler: Scheduler, *, serving: bool, started_ns: int, full: bool = False) -> LoadReport:
    """Take a snapshot.

    ``serving`` says whether the process takes requests at all, ``started_ns`` since when; ``full`` that the engine
    itself would refuse one more, whatever the scheduler says.
    """
    now = time.monotonic_ns()
    load, depth = scheduler.load(now), scheduler.depth
    accepting = serving and not full and load.accepting
    if accepting:
        accepting = scheduler.judge(ORDINARY_TOKENS, 1, now_ns=now, advisory=True) is None
    state = "healthy"
    if not serving:
        state = "not_serving"
    elif not accepting:
        state = "overloaded"
    elif _degraded(scheduler, now):
        state = "degraded"
    return LoadReport(
        state=state,
        accepting_requests=accepting,
        queued_tokens=load.queued_tokens,
        service_rate_tokens_per_second=load.tokens_per_second,
        estimated_drain_time_ms=load.drain_ns / 1e6,
        p95_latency_ms=(load.p95_sojourn_ns or 0) / 1e6,
        queue_depth=depth.waiting_items,
        uptime_seconds=(now - started_ns) // 1_000_000_000 if started_ns else 0,
        running_items=depth.running_items,
        running_tokens=load.running_tokens,
    )


def _degraded(scheduler: Scheduler, now_ns: int) -> bool:
    """Whether a limit that is in force is near, or the latency policy sheds."""
    depth, figures = scheduler.depth, scheduler.figures(now_ns)
    items, tokens = depth.waiting_items + depth.running_items, depth.waiting_tokens + depth.running_tokens
    if not items:
        return False  # policies refuse nobody on an idle server, and their figures are those of the last question
    queue, drain = figures["queue"], figures.get("throughput", {})
    shares = [items / queue["max_queue_items"], tokens / queue["max_queue_tokens"]]
    if drain:
        shares.append(drain["drain_ns"] / drain["max_drain_ns"])
    if "gradient" in figures:
        gradient = figures["gradient"]
        shares.append(max(tokens, items * gradient["item_tokens"]) / gradient["limit_tokens"])
    return max(shares) > DEGRADED_SHARE or figures.get("latency_p95", {}).get("shed_share", 0.0) > 0


def add_loads(reports: Sequence[LoadReport]) -> LoadReport:
    """Several engines behind one port as one: those that serve, added up.

    A newcomer goes to one that has room, so that the best of them says whether it is taken; where one is missing the
    rest ask to be sent less (``degraded``). The drain time is that of all work at all rates. At least one report.
    """
    serving = [report for report in reports if report.state != "not_serving"]
    if len(reports) == 1 or not serving:
        return reports[0]
    rate = sum(report.service_rate_tokens_per_second for report in serving)
    states = {report.state for report in serving}
    state = next(state for state in ("healthy", "degraded", "overloaded") if state in states)
    if state == "healthy" and len(serving) < len(reports):
        state = "degraded"
    drained = sum(report.estimated_drain_time_ms * report.service_rate_tokens_per_second for report in serving)
    return LoadReport(
        state=state,
        accepting_requests=any(report.accepting_requests for report in serving),
        queued_tokens=sum(report.queued_tokens for report in serving),
        service_rate_tokens_per_second=rate,
        estimated_drain_time_ms=drained / rate if rate else 0.0,
        p95_latency_ms=max(report.p95_latency_ms for report in serving),
        queue_depth=sum(report.queue_depth for report in serving),
        uptime_seconds=max(report.uptime_seconds for report in reports),
        running_items=sum(report.running_items for report in serving),
        running_tokens=sum(report.running_tokens for report in serving),
    )
