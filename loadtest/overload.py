"""Goodput under overload: ``python -m loadtest.overload``. Real server, real model, open loop, client beside it.

Method. 128-token texts, one a call. The capacity is measured closed loop, before and after the overload (the mean
counts), on a twin of the server without a policy: one that sheds at its soft threshold would hide what it can do. Then
Poisson arrivals at a multiple of it from a client process that holds back for nothing: a call is counted from the
instant at which it was meant to be sent.

* ``deadline``: 2 x for 60 s with deadlines of 1 s, the default policies. Goodput is the answers that came in time.
* ``burst``: ``latency_p95``, deadlines of 500 ms: 10 s at half the capacity, 20 s at 4 x, 15 s at half again. The same
  percentile of the calls' latency in windows of half a second, before and after, says when the burst is over.

Marks (py-gpu-inference keeps 13 % of its capacity at 2 x by its throughput policy, 41 % by its latency policy):
goodput >= 95 % and >= 85 % of the capacity; p99 of those admitted under their deadline, none of them expires; normal
again within 2 s; goodput in windows of half a second does not swing more than at capacity (see ``swing``).
``results/overload.svg`` is the picture of one ``burst``.

``beside_an_echo`` is what a refusal could cost at the least: the share of its capacity that the closed loop keeps while
a bare ``grpc.aio`` echo on the same machine answers as many calls as are too many here, from a client of its own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from embedserve.v1 import embedding_pb2 as pb
from loadtest.answer import DEADLINE_EXCEEDED, OK, RESOURCE_EXHAUSTED
from loadtest.caller import Calls, Job, begin, finish, run
from loadtest.nullmodel import write_checkpoint
from loadtest.picture import draw
from loadtest.recovery import WINDOW_S, recovery_s, windowed_p99
from loadtest.result import RESULTS, Run, spread
from loadtest.server import Server, echo_server, null_server, product
from loadtest.texts import texts_of

TOKENS = 128
DIMENSION = 384
"""Of the model that is served by default."""
CALLERS = 64
"""Of the closed loop: several full batches at any time."""
WARM_UP_S, CLOSED_S = 5.0, 15.0
OVERLAP_S = 1.5
"""A client process takes up to a second to start: so much longer one of two that are to run beside each other runs."""
MARKS = {"deadline": 0.95, "burst": 0.85}
EXCESS = {"deadline": 1, "burst": 3}
"""Calls that are too many, in multiples of the capacity."""
RECOVERY_S = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Goodput under overload.")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the overload with deadlines of 1 s")
    parser.add_argument("--only", choices=list(MARKS))
    parser.add_argument("--device", help="US:NS: a null model whose pass sleeps so long, instead of the real model")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("settings", nargs="*", help="after --: settings of the server, as to `embedserve serve`")
    options = parser.parse_args()
    noted = Run("overload")
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in MARKS if options.only in {None, kind}}
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(options.repetitions):
            for kind, rows in found.items():
                policy = ("--admission.policies", "latency_p95") if kind == "burst" else ()
                none = ("--admission.policies", "none")
                with (
                    serve(options.device, Path(folder), *options.settings, *none) as twin,
                    serve(options.device, Path(folder), *policy, *options.settings) as server,
                    echo_server(1, DIMENSION) as echo,
                ):
                    requests = make_requests(null=options.device is not None)
                    for each in (twin, server, echo):
                        run(Job(target=each.target, requests=requests, seconds=WARM_UP_S, callers=8))
                    measure = burst if kind == "burst" else deadline
                    rows.append(measure(server, twin, requests, options.seconds, 17 + repetition))
                    rows[-1]["beside_an_echo"] = beside(echo, twin, requests, EXCESS[kind], rows[-1])
                print_row(kind, rows[-1])
    summary = {kind: summarise(rows, MARKS[kind]) for kind, rows in found.items()}
    for kind, row in summary.items():
        print(f"{kind:9} goodput {row['goodput']} of capacity, mark {row['mark']}: {'met' if row['met'] else 'MISSED'}")
        print(f"{'':9} with a bare echo in the place of refusals {row['beside_an_echo']}")
    if not options.no_write:
        name = "overload_device" if options.device else "overload"
        if "burst" in found:
            draw(found["burst"][-1].pop("picture"), RESULTS / f"{name}.svg")
        rows_only = {k: [{n: v for n, v in r.items() if n != "picture"} for r in rows] for k, rows in found.items()}
        noted.write({"repetitions": options.repetitions, "summary": summary, "runs": rows_only}, name)
    return 0 if all(row["met"] for row in summary.values()) else 1


def serve(device: str | None, folder: Path, *settings: str) -> AbstractContextManager[Server]:
    if device is None:
        return product(*settings)
    return null_server(write_checkpoint(folder / "null-384", 384), *settings, device=device)


def make_requests(*, null: bool) -> list[bytes]:
    # Two characters are one token of the null model's vocabulary.
    return [embed(text) for text in (["as" * (TOKENS - 2)] if null else texts_of(TOKENS, 256))]


def embed(*texts: str) -> bytes:
    return pb.EmbedRequest(texts=texts).SerializeToString()


# ---------------------------------------------------------------------------------------------------------- measuring


def capacity(server: Server, requests: list[bytes]) -> tuple[float, float]:
    """Answers a second, closed loop, and how much that swings."""
    calls = run(Job(target=server.target, requests=requests, seconds=CLOSED_S, callers=CALLERS))
    return len(answered(calls, 0.0, CLOSED_S)) / CLOSED_S, swing(calls, 1.0, CLOSED_S)


def beside(echo: Server, twin: Server, requests: list[bytes], excess: int, row: dict[str, Any]) -> float:
    """The share of its capacity that the closed loop keeps beside a bare echo of ``excess`` times as many calls."""
    limit = statistics.mean((row["capacity_before"], row["capacity_after"]))
    job = Job(target=echo.target, requests=requests, seconds=CLOSED_S + OVERLAP_S, rate=excess * limit, timeout_s=1.0)
    client = begin(job)
    kept, _ = capacity(twin, requests)
    finish(client, job)
    return round(kept / limit, 3)


def deadline(server: Server, twin: Server, requests: list[bytes], seconds: float, seed: int) -> dict[str, Any]:
    """2 x the capacity, deadlines of 1 s."""
    before, calm = capacity(twin, requests)
    expired = settled(server, "expired")
    calls = run(
        Job(target=server.target, requests=requests, seconds=seconds, rate=2 * before, timeout_s=1.0, seed=seed)
    )
    expired = settled(server, "expired") - expired
    after, _ = capacity(twin, requests)
    row = judged(calls, 0.0, seconds, statistics.mean((before, after)), 1.0)
    return row | {
        "capacity_before": round(before, 1),
        "capacity_after": round(after, 1),
        "expired_at_the_server": expired,
        "swing_at_capacity": calm,
        "swing": swing(calls, 1.0, seconds),
    }


def burst(server: Server, twin: Server, requests: list[bytes], _seconds: float, seed: int) -> dict[str, Any]:
    """Half the capacity, 4 x, half again; deadlines of 500 ms."""
    before, calm = capacity(twin, requests)
    begins, ends, stops = 10.0, 30.0, 45.0
    job = Job(
        target=server.target,
        requests=requests,
        seconds=stops,
        rate=before / 2,
        bursts=[(begins, ends, 4 * before)],
        timeout_s=0.5,
        seed=seed,
    )
    expired = settled(server, "expired")
    calls = run(job)
    expired = settled(server, "expired") - expired
    after, _ = capacity(twin, requests)
    row = judged(calls, begins, ends, statistics.mean((before, after)), 0.5)
    normal = max(p99 for _, p99 in windowed_p99(waited_for(calls), 1.0, begins))
    return row | {
        "capacity_before": round(before, 1),
        "capacity_after": round(after, 1),
        "expired_at_the_server": expired,
        "swing_at_capacity": calm,
        "swing": swing(calls, begins + 1.0, ends),
        "normal_p99_ms": round(normal * 1e3),
        "recovery_s": round(recovery_s(waited_for(calls), ends, stops, normal), 1),
        "refused_in_normal_times": int(
            np.sum((calls["code"] == RESOURCE_EXHAUSTED) & ((calls["meant"] < begins) | (calls["meant"] > ends + 2)))
        ),
        "picture": series(calls, stops, (begins, ends), before),
    }


def judged(calls: Calls, begin: float, end: float, limit: float, timeout: float) -> dict[str, Any]:
    """Goodput and latency of the calls that were meant to be sent between ``begin`` and ``end``."""
    own = calls[(calls["meant"] >= begin) & (calls["meant"] < end)]
    good = len(answered(calls, begin, end, timeout)) / (end - begin)
    latency = (own["ended"] - own["sent"])[own["code"] == OK]
    refused = own[own["code"] == RESOURCE_EXHAUSTED]
    others = ~np.isin(own["code"], (OK, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED))
    return {
        "offered": round(len(own) / (end - begin), 1),
        "goodput": round(good, 1),
        "ratio": round(good / limit, 3),
        "answered": int(np.sum(own["code"] == OK)),
        "refused": len(refused),
        "expired": int(np.sum(own["code"] == DEADLINE_EXCEEDED)),
        "other_errors": int(np.sum(others)),
        "admitted_p50_p99_max_ms": [round(float(x) * 1e3) for x in (*np.percentile(latency, (50, 99)), latency.max())],
        "refusal_p50_p99_ms": [
            round(float(x) * 1e3, 1) for x in np.percentile(refused["ended"] - refused["sent"], (50, 99))
        ],
        "without_pushback": int(np.sum(np.isnan(refused["pushback_ms"]))),
        "client_late_ms_max": round(float((own["sent"] - own["meant"]).max()) * 1e3),
        "timeout_s": timeout,
    }


def answered(calls: Calls, begin: float, end: float, timeout: float | None = None) -> Calls:
    """Answers that came between ``begin`` and ``end``, in time."""
    good = calls[(calls["code"] == OK) & (calls["ended"] >= begin) & (calls["ended"] < end)]
    return good if timeout is None else good[good["ended"] - good["meant"] <= timeout]


def swing(calls: Calls, begin: float, end: float) -> float:
    """Coefficient of variation of the answers in windows of half a second.

    What batches and noise alone give, and what a policy that flips between all and nothing adds.
    """
    counts, _ = np.histogram(answered(calls, begin, end)["ended"], bins=np.arange(begin, end + 1e-9, WINDOW_S))
    return round(float(counts.std() / counts.mean()), 3)


def waited_for(calls: Calls) -> Calls:
    """Those that were answered or expired."""
    return calls[np.isin(calls["code"], (OK, DEADLINE_EXCEEDED))]


def series(calls: Calls, stops: float, burst_s: tuple[float, float], limit: float) -> dict[str, Any]:
    """What the picture shows."""
    edges = np.arange(0, stops + 1e-9, WINDOW_S)
    per_s = 1 / WINDOW_S
    refused = calls[calls["code"] == RESOURCE_EXHAUSTED]
    p99 = windowed_p99(waited_for(calls), 0.0, stops)
    return {
        "at": edges[1:].tolist(),
        "offered": (np.histogram(calls["meant"], edges)[0] * per_s).tolist(),
        "answered": (np.histogram(answered(calls, 0, stops, 0.5)["ended"], edges)[0] * per_s).tolist(),
        "refused": (np.histogram(refused["ended"], edges)[0] * per_s).tolist(),
        "p99_at": [at for at, _ in p99],
        "p99_ms": [value * 1e3 for _, value in p99],
        "burst": burst_s,
        "capacity": limit,
    }


def settled(server: Server, verdict: str) -> int:
    """Items that the server says ended so, by its own metric."""
    return int(server.metrics().get(f'embedserve_items_settled_total{{verdict="{verdict}"}}', 0.0))


# ------------------------------------------------------------------------------------------------------------ results


def summarise(rows: list[dict[str, Any]], mark: float) -> dict[str, Any]:
    """Medians and ranges, and whether every mark is met."""
    ratio = spread([row["ratio"] for row in rows], 3)
    met = (
        ratio["median"] >= mark
        and all(row["expired"] == 0 == row["expired_at_the_server"] == row["other_errors"] for row in rows)
        and all(row["admitted_p50_p99_max_ms"][1] < row["timeout_s"] * 1e3 for row in rows)
        and statistics.median([row.get("recovery_s", 0.0) for row in rows]) <= RECOVERY_S
    )
    return {
        "mark": mark,
        "met": met,
        "goodput": ratio,
        "expired": sum(row["expired"] for row in rows),
        "swing": spread([row["swing"] for row in rows], 3),
        "beside_an_echo": spread([row["beside_an_echo"] for row in rows], 3),
        "swing_at_capacity": spread([row["swing_at_capacity"] for row in rows], 3),
        "recovery_s": spread([row["recovery_s"] for row in rows]) if "recovery_s" in rows[0] else None,
    }


def print_row(kind: str, row: dict[str, Any]) -> None:
    print(kind, {name: value for name, value in row.items() if name != "picture"}, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
