"""What a run's calls add up to.

Decides every definition: what a latency counts from, what a call in the course of a phase's end is worth, when a run is
void. Must never know a target, a process or a picture. Figures of one run, as ``figures_of`` gives them:

    void            sentences that say why the run proves nothing; empty when it counts
    notes           sentences about what a reader should know before believing a figure
    capacity        calls a second that the rates refer to, or null
    phases          one for each phase, see ``_phase``
    timeline        one list a column, one entry a second
    recovery_s      from the end of the phase with the highest rate until latency is what it was before, or null
    clients         CPU share, calls and unsent calls of each client process
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from loadtest import histogram
from loadtest.ledger import Ledger, Rows
from loadtest.recovery import recovery_s, windowed_p99
from loadtest.scenario import Scenario
from loadtest.schedule import Span, arrivals
from loadtest.target import NO_CONNECTION

__all__ = ["OFFERED_SHARE", "ClientUse", "figures_of"]

OFFERED_SHARE: Final = 0.99
"""An open loop that sent fewer of its calls in time did not offer its rate, and its figures are of another test."""
SLACK_S: Final = 0.01
"""A call that was due right before the end of its phase may be sent so much after it."""
BUSY_SHARE: Final = 0.85
"""Of a core: a client process that needs more is itself what is measured."""
LATE_SHARE: Final = 0.1
"""Lateness of sending over the median latency above which it is told."""
P99_CALLS: Final = 1000
"""Fewer calls than this leave ten or fewer above the 99th percentile."""

REFUSED: Final = "RESOURCE_EXHAUSTED"
EXPIRED: Final = "DEADLINE_EXCEEDED"
PERCENTILES: Final = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}


@dataclass(frozen=True, slots=True)
class ClientUse:
    """What one client process used."""

    cpu_s: float
    took_s: float
    calls: int
    unsent: int

    @property
    def cpu_share(self) -> float:
        """Of one core."""
        return self.cpu_s / self.took_s if self.took_s else 0.0


def figures_of(
    scenario: Scenario, spans: list[Span], ledger: Ledger, clients: tuple[ClientUse, ...], capacity: float | None
) -> dict[str, Any]:
    """All figures of one run, ready for JSON."""
    due = arrivals(spans, scenario.seed)
    phases = [_phase(i, span, ledger, due) for i, span in enumerate(spans)]
    return {
        "void": _void(phases, clients, ledger),
        "notes": _notes(phases, clients),
        "capacity": capacity,
        "phases": phases,
        "timeline": _timeline(ledger, scenario.seconds),
        "recovery_s": _recovery(spans, ledger),
        "clients": [
            {"cpu_share": round(c.cpu_share, 3), "cpu_s": round(c.cpu_s, 3), "calls": c.calls, "unsent": c.unsent}
            for c in clients
        ],
    }


def _phase(index: int, span: Span, ledger: Ledger, due: npt.NDArray[np.float64]) -> dict[str, Any]:
    chosen = ledger.rows["phase"] == index
    rows = ledger.rows[chosen]
    good = ledger.having("OK")[chosen]
    answered = rows[good]
    seconds = span.ends - span.begins
    credit = _credit(answered, span)
    latency = (answered["ended"] - answered["meant"]) * 1e3
    scheduled = int(((due >= span.begins) & (due < span.ends)).sum()) if span.rate is not None else len(rows)
    in_time = int((rows["sent"] < span.ends + SLACK_S).sum())
    statuses: Counter[str] = Counter()
    rejects: Counter[str] = Counter()
    for number, count in zip(*np.unique(rows["outcome"], return_counts=True), strict=True):
        status, reason = ledger.outcomes[number]
        statuses[status] += int(count)
        if status != "OK":
            rejects[f"{status} {reason}".strip()] += int(count)
    refused = ledger.having(REFUSED)[chosen]
    return {
        "name": span.phase.name,
        "begins": span.begins,
        "seconds": seconds,
        "callers": span.phase.callers,
        "rate": span.rate,
        "scheduled": scheduled,
        "offered_share": in_time / scheduled if scheduled else 1.0,
        "calls": len(rows),
        "answered": len(answered),
        "failed_share": 1 - len(answered) / len(rows) if len(rows) else 0.0,
        "statuses": dict(statuses),
        "rejects": dict(rejects.most_common()),
        "calls_per_s": float(credit.sum()) / seconds,
        "texts_per_s": float((credit * answered["items"]).sum()) / seconds,
        "tokens_per_s": float((credit * answered["tokens"]).sum()) / seconds,
        "latency_ms": _spread_of(latency),
        "refusal_ms": _spread_of((rows["ended"] - rows["sent"])[refused] * 1e3),
        "late_ms": _spread_of((rows["sent"] - rows["meant"]) * 1e3) if span.rate is not None else None,
        "server_ms": _spread_of(_told(answered["server_ms"])),
        "first_ms": _spread_of(_told(answered["first_ms"])),
        "retry_after_ms": _spread_of(rows["retry_after_ms"][~np.isnan(rows["retry_after_ms"])]),
        "batch_items": _spread_of(_told(answered["batch_items"])),
        "batches": _batch_sizes(answered),
        "padding_efficiency": float(_told(answered["padding_efficiency"]).mean())
        if len(_told(answered["padding_efficiency"]))
        else None,
        "histogram": histogram.pack(latency),
    }


def _credit(answered: Rows, span: Span) -> npt.NDArray[np.float64]:
    """What each answered call is worth to the phase's rate: the share of its time that lies within the phase.

    A closed loop always ends in the middle of its last calls; to drop them would cost slow calls more than fast ones.
    """
    inside = np.clip(answered["ended"], None, span.ends) - answered["sent"]
    whole = np.maximum(answered["ended"] - answered["sent"], 1e-9)
    return np.asarray(np.clip(inside / whole, 0.0, 1.0), dtype=np.float64)


def _told(column: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Values that the server gave; 0 means that it gave none."""
    return np.asarray(column[column > 0], dtype=np.float64)


def _spread_of(values: npt.NDArray[Any]) -> dict[str, float] | None:
    """Percentiles, mean and highest; ``None`` of nothing."""
    if not len(values):
        return None
    found = np.percentile(values, list(PERCENTILES.values()))
    figures = {name: float(value) for name, value in zip(PERCENTILES, found, strict=True)}
    return {"mean": float(values.mean()), **figures, "max": float(values.max())}


def _batch_sizes(answered: Rows) -> dict[str, float]:
    """Share of the calls that rode in a batch of up to so many texts: powers of two."""
    sizes = _told(answered["batch_items"])
    if not len(sizes):
        return {}
    edges = 2 ** np.ceil(np.log2(sizes))
    found, counts = np.unique(edges, return_counts=True)
    return {str(int(edge)): float(count / len(sizes)) for edge, count in zip(found, counts, strict=True)}


def _timeline(ledger: Ledger, seconds: float) -> dict[str, list[Any]]:
    """Calls by the second: meant to be sent, and how they ended; latency by the second meant.

    Refused is what the server chose to refuse, expired what took longer than its deadline, failed all else that is no
    answer: an UNAVAILABLE is no choice, it is a server or a connection that is gone.
    """
    rows = ledger.rows
    good, refused, expired = ledger.having("OK"), ledger.having(REFUSED), ledger.having(EXPIRED)
    last = float(rows["ended"].max()) if len(rows) else 0.0
    edges = np.arange(0.0, max(seconds, np.ceil(last)) + 1.0)

    def count(values: npt.NDArray[Any]) -> list[int]:
        return [int(n) for n in np.histogram(values, edges)[0]]

    latency = (rows["ended"] - rows["meant"])[good] * 1e3
    which = np.digitize(rows["meant"][good], edges) - 1
    order = np.argsort(which, kind="stable")
    groups = np.split(latency[order], np.searchsorted(which[order], np.arange(1, len(edges) - 1)))
    p50, p99 = ([round(float(np.percentile(g, q)), 3) if len(g) else None for g in groups] for q in (50, 99))
    return {
        "second": [int(edge) for edge in edges[:-1]],
        "sent": count(rows["meant"]),
        "answered": count(rows["ended"][good]),
        "refused": count(rows["ended"][refused]),
        "expired": count(rows["ended"][expired]),
        "failed": count(rows["ended"][~(good | refused | expired)]),
        "p50_ms": p50,
        "p99_ms": p99,
    }


def _recovery(spans: list[Span], ledger: Ledger) -> float | None:
    """Seconds from the end of the highest open phase until the p99 of every later window is normal."""
    rates = [span.rate or 0.0 for span in spans]
    top = int(np.argmax(rates))
    if not 0 < top < len(spans) - 1 or not rates[top] > rates[top - 1] > 0:
        return None
    calls, burst = ledger.rows[ledger.having("OK", EXPIRED)], spans[top]
    before = [p99 for _, p99 in windowed_p99(calls, spans[top - 1].begins, spans[top - 1].ends)]
    return round(recovery_s(calls, burst.ends, spans[-1].ends, max(before)), 2) if before else None


def _void(phases: list[dict[str, Any]], clients: tuple[ClientUse, ...], ledger: Ledger) -> list[str]:
    reasons = [
        f"phase {phase['name']} offered {phase['offered_share']:.1%} of its {phase['rate']:.0f} calls/s, less than "
        f"{OFFERED_SHARE:.0%}: the client is too slow; give it more processes or a machine of its own"
        for phase in phases
        if phase["rate"] is not None and phase["offered_share"] < OFFERED_SHARE
    ]
    if not any(phase["answered"] for phase in phases):
        seen = Counter[str]()
        for phase in phases:
            seen.update(phase["rejects"])
        what = ", ".join(f"{count} x {reason}" for reason, count in seen.most_common(3)) or "no call was sent"
        reasons.append(f"no call was answered: {what}")
    alone = ledger.rows[ledger.having(NO_CONNECTION.status, reason=NO_CONNECTION.reason)]
    if len(alone):
        calls = "1 call" if len(alone) == 1 else f"{len(alone):,} calls"
        reasons.append(
            f"the server was lost: {calls} found nobody who takes a connection, "
            f"the first after {alone['sent'].min():.1f} s"
        )
    unsent = sum(client.unsent for client in clients)
    if unsent:
        reasons.append(f"{unsent} calls were never sent, because too many were open at once")
    return reasons


def _notes(phases: list[dict[str, Any]], clients: tuple[ClientUse, ...]) -> list[str]:
    notes = [
        f"client process {i + 1} used {client.cpu_share:.0%} of a core: it may be what limits the figures"
        for i, client in enumerate(clients)
        if client.cpu_share > BUSY_SHARE
    ]
    timed = [phase for phase in phases if phase["latency_ms"] and phase["late_ms"]]
    late = [phase for phase in timed if phase["late_ms"]["p99"] > LATE_SHARE * phase["latency_ms"]["p50"]]
    if late:
        worst = max(late, key=lambda phase: phase["late_ms"]["p99"])
        notes.append(
            f"the client was late: in phase {worst['name']} 1 % of the calls were sent {worst['late_ms']['p99']:.1f} "
            f"ms or more after their time, which is in their latency (median {worst['latency_ms']['p50']:.1f} ms)"
        )
    few = [p["name"] for p in phases if p["answered"] and p["answered"] < P99_CALLS]
    if few:
        notes.append(f"fewer than {P99_CALLS} answers in {', '.join(few)}: the p99 is of few calls")
    return notes
