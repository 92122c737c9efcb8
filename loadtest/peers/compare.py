"""Everybody on the same texts, in turn: A B C A B C, one measured while the others are frozen.

Decides the order of turns, what a turn's figures are, and how repetitions become one: medians with their range, and the
ratio of embedserve to a peer taken within each repetition, so that a machine that slows down slows both. Must never
know how a peer is called or how calls are scheduled: ``loadtest.drive`` does that.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from loadtest.corpus import calls_of
from loadtest.drive import Progress, TargetFailed, drive
from loadtest.peers.process import PeerProcess
from loadtest.peers.sentence_transformers import BATCH_SIZES, EncodeTarget, SentenceTransformers
from loadtest.result import spread
from loadtest.scenario import Scenario

__all__ = ["BASE", "MARKS", "compared", "summary", "table", "turn"]

BASE = "embedserve"
MARKS: Mapping[str, Mapping[str, float]] = {
    "coral": {"short": 5, "mixed": 5, "ingest": 4, "ingest_mixed": 4},
    "infinity": {"short": 10, "mixed": 10, "ingest": 10, "ingest_mixed": 10},
}
"""How many times the texts a second of a peer embedserve must reach, by scenario."""
SETTLE_WINDOW_S = 0.4
"""After a turn; 60 turns wait so long each."""
OFFLINE_S = 3.0
OFFLINE_TEXTS = (64, 4096)
"""Fewest and most texts of one offline encode; between them as many as take about ``OFFLINE_S``."""
KEPT = ("texts_per_s", "calls_per_s", "failed_share", "p50_ms", "p95_ms", "p99_ms", "server_cores", "client_cores",
        "server_cpu_ms_per_text", "rss_mib", "offline_texts_per_s", "loop_us")  # fmt: skip
PERCENTILES = ("p50", "p95", "p99")

Turn = dict[str, Any]


def turn(server: PeerProcess, scenario: Scenario, before: Turn | None = None) -> Turn:
    """One turn of one peer: its figures, or ``{"failed": sentence}``. It is thawed for it, and frozen afterwards.

    ``before`` is its turn of an earlier repetition, which knows the best batch size of an offline encode.
    """
    server.thaw()
    meter = _Meter(server, scenario.seconds)
    try:
        result = asyncio.run(
            drive(scenario, partial(server.peer.target, server.address, server.model), on_progress=meter)
        )
        found = _figures(result.figures(), meter, server)
        if isinstance(server.peer, SentenceTransformers):
            size = (before or {}).get("offline_batch_size")
            found |= asyncio.run(_offline(server, scenario, found["texts_per_s"], (size,) if size else BATCH_SIZES))
        return found
    except TargetFailed as error:
        return {"failed": str(error)}
    finally:
        # What is left of this turn's calls must not be done in the peer's next turn, or in the time of another.
        server.settle(SETTLE_WINDOW_S)
        server.freeze()


def compared(
    servers: Sequence[PeerProcess], scenario: Scenario, repetitions: int, say: Callable[[str], None]
) -> dict[str, list[Turn]]:
    """Every peer's turns, interleaved; ``say`` is told each one as it ends."""
    turns: dict[str, list[Turn]] = {server.peer.label: [] for server in servers}
    for repetition in range(repetitions):
        for server in servers:
            own = turns[server.peer.label]
            found = turn(server, scenario, own[0] if own else None)
            own.append(found)
            what = found.get("failed") or f"{found['texts_per_s']:.0f} texts/s, p50 {found['p50_ms']:.1f} ms"
            say(f"  {scenario.name} {repetition + 1}/{repetitions} {server.peer.label}: {what}")
    return turns


def summary(turns: Mapping[str, Sequence[Turn]], scenario: str) -> dict[str, Any]:
    """Medians, ranges, ratios and marks of one scenario, ready for JSON."""
    peers: dict[str, Any] = {}
    for label, own in turns.items():
        good = [one for one in own if "failed" not in one]
        peers[label] = {
            **{name: spread([one[name] for one in good], 3) for name in KEPT if good and name in good[0]},
            "statuses": dict(sum((Counter(one["statuses"]) for one in good), Counter())),
            "notes": sorted({note for one in good for note in one["notes"]}),
            "failed_turns": [one["failed"] for one in own if "failed" in one],
        }
        ratios = _ratios(turns.get(BASE, ()), own)
        if label != BASE and ratios:
            peers[label]["embedserve_is_times"] = spread(ratios, 2)
            mark = MARKS.get(label, {}).get(scenario)
            if mark is not None:
                peers[label] |= {"mark": mark, "met": bool(peers[label]["embedserve_is_times"]["median"] >= mark)}
    return {"scenario": scenario, "peers": peers, "turns": {label: list(own) for label, own in turns.items()}}


def table(found: Mapping[str, Any]) -> str:
    """One scenario for the terminal."""
    head = (f"{'':<30}{'texts/s (range)':>24}{'p50':>9}{'p95':>9}{'p99':>9} ms {'failed':>7}{'server':>8}{'client':>8}"
            f"{'ms/text':>9}{'RSS':>7}  embedserve is (range)")  # fmt: skip
    lines = [f"{found['scenario']}", head]
    for label, one in found["peers"].items():
        if "texts_per_s" not in one:
            lines.append(f"{label:<30}  failed: {one['failed_turns'][0]}")
            continue
        rate = one["texts_per_s"]
        lines.append(
            f"{label:<30}{_ranged(rate, 0):>24}"
            + "".join(f"{one[f'{name}_ms']['median']:>9.1f}" for name in PERCENTILES)
            + f"    {one['failed_share']['median']:>6.1%}{one['server_cores']['median']:>8.2f}"
            + f"{one['client_cores']['median']:>8.2f}{one['server_cpu_ms_per_text']['median']:>9.2f}"
            + f"{one['rss_mib']['median']:>7.0f}  {_verdict(one)}"
        )
        if "offline_texts_per_s" in one:
            bound = one["offline_texts_per_s"]
            lines.append(f"{'  offline, best batches':<30}{_ranged(bound, 0):>24}  {'(no service)':>20}")
        lines += [f"  {label}: {note}" for note in one["notes"]]
    lines.append(
        "server, client: cores used; ms/text: CPU time of the server; RSS: MiB after the run; failed: share of calls"
    )
    return "\n".join(lines)


def _verdict(one: Mapping[str, Any]) -> str:
    if "embedserve_is_times" not in one:
        return ""
    verdict = f"{_ranged(one['embedserve_is_times'], 2)} x"
    return verdict + (f", mark {one['mark']:g} x {'met' if one['met'] else 'MISSED'}" if "mark" in one else "")


def _ranged(value: Mapping[str, float], digits: int) -> str:
    return f"{value['median']:.{digits}f} ({value['lowest']:.{digits}f}-{value['highest']:.{digits}f})"


def _ratios(base: Sequence[Turn], own: Sequence[Turn]) -> list[float]:
    """Embedserve's texts a second over the peer's, in each repetition in which both have some."""
    pairs = [(a.get("texts_per_s", 0.0), b.get("texts_per_s", 0.0)) for a, b in zip(base, own, strict=False)]
    return [ours / theirs for ours, theirs in pairs if ours and theirs]


def _figures(figures: Mapping[str, Any], meter: _Meter, server: PeerProcess) -> Turn:
    (phase,) = figures["phases"]
    latency = phase["latency_ms"] or dict.fromkeys(PERCENTILES, float("nan"))
    return {
        "texts_per_s": phase["texts_per_s"],
        "calls_per_s": phase["calls_per_s"],
        "failed_share": phase["failed_share"],
        "statuses": phase["statuses"],
        **{f"{name}_ms": latency[name] for name in PERCENTILES},
        "server_cores": meter.cores,
        "server_cpu_ms_per_text": 1e3 * meter.cores / phase["texts_per_s"] if phase["texts_per_s"] else float("nan"),
        "client_cores": sum(client["cpu_share"] for client in figures["clients"]),
        "rss_mib": server.rss_mib(),
        "notes": [*figures["void"], *figures["notes"]],
    }


async def _offline(server: PeerProcess, scenario: Scenario, rate: float, sizes: Sequence[int]) -> Turn:
    """The bound that no service can pass, and what the loop around the library costs."""
    calls = calls_of(scenario)
    fewest, most = OFFLINE_TEXTS
    wanted = round(min(max(rate * OFFLINE_S, fewest), most))
    texts = [text for call in calls[:wanted] for text in call][:wanted]
    target = EncodeTarget(server.address)
    await target.open()
    try:
        rates = {size: await target.offline(texts, size) for size in sizes}
        best = max(rates, key=lambda size: rates[size])
        return {
            "offline_texts_per_s": rates[best],
            "offline_batch_size": best,
            "offline_texts": len(texts),
            "loop_us": await target.loop_cost_us(calls[0]),
        }
    finally:
        await target.close()


class _Meter:
    """Reads the server's CPU time while its run goes on; warm-up and connecting are not in it."""

    def __init__(self, server: PeerProcess, seconds: float) -> None:
        self._server = server
        self._seconds = seconds
        self._first: tuple[float, float] | None = None
        self._last: tuple[float, float] | None = None

    def __call__(self, progress: Progress) -> None:
        if 0 <= progress.seconds <= self._seconds:
            self._last = (time.monotonic(), self._server.cpu_s())
            self._first = self._first or self._last

    @property
    def cores(self) -> float:
        """Cores that the server used on average."""
        if self._first is None or self._last is None or self._first[0] == self._last[0]:
            return float("nan")
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
