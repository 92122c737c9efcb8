"""The service against what it is made of: gRPC alone, the engine alone, one bare forward pass, its own memory before.

Decides what is compared with what, always in turns on one machine. Every function gives rows for a table and whether
the mark is met; ``python -m loadtest ceiling|bare|overhead|memory`` prints them. Marks are shares of a bound, not
figures of one machine.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loadtest.deployment import Deployment, Reach, deployed
from loadtest.drive import TargetFailed
from loadtest.runner import repeated, run_in_turns, warmed
from loadtest.scenario import Scenario
from loadtest.summary import spread
from loadtest.table import Teller, number
from loadtest.tether import tethered

__all__ = ["bare", "ceiling", "memory", "overhead"]

ROOT = Path(__file__).resolve().parent.parent
CEILING_MARK = 0.75
"""Of a bare grpc.aio echo's calls a second."""
BARE_MARK = 0.85
"""Of the bare engine's texts a second."""
MATRIX_MARK = 0.60
"""Of large matrix products' FLOP/s."""
OVERHEAD_MARK_MS = 1.0
MEMORY_MARK = 0.02
SETTLED_TEXTS = 100_000
"""Served before memory is first looked at: arenas and caches have their size by then."""
NO_POLICY = ("--admission.policies", "none")
"""A closed loop of so many callers shall be answered, not shed."""


def ceiling(scenario: Scenario, reach: Reach, repeat: int, teller: Teller, command: str) -> dict[str, Any]:
    """The product on the null model against a bare grpc.aio echo, in turns."""
    reach = _without_policies(reach)
    null, echo = run_in_turns(
        scenario, [("null:", reach), ("echo:", reach)], repeat=repeat, teller=teller, command=command
    )
    pairs = list(zip(null["repetitions"], echo["repetitions"], strict=True))
    ratio = spread([_rate(ours) / _rate(bare) for ours, bare in pairs if not ours["void"] and not bare["void"]])
    for side in (null, echo):
        del side["marks"]
    return {
        "null": null,
        "echo": echo,
        "rows": [
            ("null model, calls/s", spread([_rate(ours) for ours, _ in pairs])),
            ("bare grpc.aio echo, calls/s", spread([_rate(bare) for _, bare in pairs])),
            ("null model / echo", ratio),
            ("null model: server's CPU, us a call", spread([_cpu_us(ours) for ours, _ in pairs])),
            ("echo: server's CPU, us a call", spread([_cpu_us(bare) for _, bare in pairs])),
            ("client's CPU, cores", spread([_client(one) for pair in pairs for one in pair])),
        ],
        "mark": f"null model / echo >= {CEILING_MARK}",
        "met": ratio["median"] >= CEILING_MARK,
    }


def bare(scenario: Scenario, reach: Reach, repeat: int, seconds: float, teller: Teller) -> dict[str, Any]:
    """End to end through the service against the engine alone on the same texts, in turns."""
    reach = _without_policies(reach)
    engine: list[dict[str, float]] = []
    served: list[float] = []
    clients: list[float] = []
    matrix: list[float] = []
    with _bare_engine(scenario, reach) as ask, _served(scenario, reach, teller) as server:
        for turn in range(repeat):
            found = ask("all", seconds)
            matrix.append(ask("matrix", min(seconds, 3.0))["share"])
            engine.append(found)
            teller.say(f"engine alone, {turn + 1} of {repeat}: {number(found['texts_per_s'])} texts/s")
            run = repeated(scenario, server, teller, f"{scenario.name} end to end, {turn + 1} of {repeat}")
            _refuse_void(run)
            served.append(max(phase["texts_per_s"] for phase in run["phases"]))
            clients.append(_client(run))
    share = spread([mine / one["texts_per_s"] for mine, one in zip(served, engine, strict=True)])
    forward = spread([mine / one["forward_texts_per_s"] for mine, one in zip(served, engine, strict=True)])
    return {
        "rows": [
            ("end to end, texts/s", spread(served)),
            ("engine alone, tokenising and forward, texts/s", spread([one["texts_per_s"] for one in engine])),
            ("engine alone, forward only, texts/s", spread([one["forward_texts_per_s"] for one in engine])),
            ("engine alone, forward only, tokens/s", spread([one["forward_tokens_per_s"] for one in engine])),
            ("end to end / engine with tokenising", share),
            ("end to end / engine's forward pass", forward),
            ("engine's forward pass / large matrix products, FLOP/s", spread(matrix)),
            ("client's CPU, cores", spread(clients)),
        ],
        "batch_tokens": engine[0]["batch_tokens"],
        "mark": f"end to end / engine with tokenising >= {BARE_MARK}; forward pass / matrix products >= {MATRIX_MARK}",
        "met": share["median"] >= BARE_MARK and spread(matrix)["median"] >= MATRIX_MARK,
    }


def overhead(scenario: Scenario, reach: Reach, repeat: int, seconds: float, teller: Teller) -> dict[str, Any]:
    """One caller's p50 against tokenising and a bare forward pass of the same texts, one at a time, in turns."""
    rows: list[tuple[dict[str, float], float, float]] = []
    with _bare_engine(scenario, reach) as ask, _served(scenario, reach, teller) as server:
        for turn in range(repeat):
            found = ask("one", seconds)
            run = repeated(scenario, server, teller, f"{scenario.name} end to end, {turn + 1} of {repeat}")
            _refuse_void(run)
            phase = run["phases"][0]
            rows.append((found, phase["latency_ms"]["p50"], (phase["server_ms"] or {"p50": float("nan")})["p50"]))
    more = spread([p50 - found["p50_ms"] for found, p50, _ in rows])
    return {
        "rows": [
            ("one caller, p50, ms", spread([p50 for _, p50, _ in rows])),
            ("of it in the server, by its own clock, ms", spread([server_ms for _, _, server_ms in rows])),
            ("bare: tokenise, p50, ms", spread([found["tokenize_p50_ms"] for found, _, _ in rows])),
            ("bare: forward, p50, ms", spread([found["forward_p50_ms"] for found, _, _ in rows])),
            ("bare: both, p50, ms", spread([found["p50_ms"] for found, _, _ in rows])),
            ("the service adds, ms", more),
        ],
        "mark": f"the service adds <= {OVERHEAD_MARK_MS} ms",
        "met": more["median"] <= OVERHEAD_MARK_MS,
    }


def memory(scenario: Scenario, reach: Reach, texts: int, teller: Teller) -> dict[str, Any]:
    """The server's memory after 100,000 texts, and after ``texts``."""
    seen: list[tuple[float, float]] = []
    with _served(scenario, _without_policies(reach), teller) as server:
        done = 0.0
        while done < texts:
            run = repeated(scenario, server, teller, f"{scenario.name}, {done:,.0f} of {texts:,} texts")
            _refuse_void(run)
            done += sum(phase["texts_per_s"] * phase["seconds"] for phase in run["phases"])
            seen.append((done, run["server"]["memory_mib_after"]))
    settled = next((mib for count, mib in seen if count >= min(SETTLED_TEXTS, texts / 2)), seen[-1][1])
    grown = seen[-1][1] / settled - 1
    return {
        "rows": [
            ("texts", _alone(seen[-1][0])),
            ("memory once settled, MiB", _alone(settled)),
            ("memory at the end, MiB", _alone(seen[-1][1])),
            ("grown by, %", _alone(100 * grown)),
        ],
        "memory_mib_by_texts": [[round(count), round(mib, 1)] for count, mib in seen],
        "mark": f"grown by <= {MEMORY_MARK:.0%}",
        "met": grown <= MEMORY_MARK,
    }


@contextlib.contextmanager
def _bare_engine(scenario: Scenario, reach: Reach) -> Iterator[Any]:
    settings = [word for word in reach.settings if word.startswith("--model.")]
    chosen = {word: reach.settings[reach.settings.index(word) + 1] for word in settings}
    pairs = [part for pair in chosen.items() for part in pair]
    process = subprocess.Popen(
        tethered([sys.executable, "-m", "loadtest.bare_engine", *pairs]),
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def hear() -> dict[str, Any]:
        line = stdout.readline()
        if not line:
            raise TargetFailed(f"the bare engine ended with {process.wait()}; what it said is above")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(what: str, seconds: float) -> dict[str, Any]:
        stdin.write(json.dumps({what: seconds}) + "\n")
        stdin.flush()
        return hear()

    try:
        stdin.write(scenario.model_dump_json() + "\n")
        stdin.flush()
        hear()
        yield ask
    finally:
        process.kill()
        process.wait()
        stdin.close()
        stdout.close()


@contextlib.contextmanager
def _served(scenario: Scenario, reach: Reach, teller: Teller) -> Iterator[Deployment]:
    """The product, warm."""
    with deployed("serve:", scenario, reach) as server:
        warmed(server, scenario, reach, teller)
        yield server


def _without_policies(reach: Reach) -> Reach:
    if "--admission.policies" in reach.settings:
        return reach
    return Reach(
        client=reach.client,
        connections=reach.connections,
        metadata=reach.metadata,
        settings=(*reach.settings, *NO_POLICY),
    )


def _refuse_void(run: dict[str, Any]) -> None:
    if run["void"]:
        raise TargetFailed("void: " + "; ".join(run["void"]))


def _rate(run: dict[str, Any]) -> float:
    rate: float = max(phase["calls_per_s"] for phase in run["phases"])
    return rate


def _cpu_us(run: dict[str, Any]) -> float:
    calls = sum(phase["answered"] for phase in run["phases"])
    cpu_s: float = run["server"].get("cpu_s", float("nan"))
    return cpu_s / calls * 1e6 if calls else float("nan")


def _client(run: dict[str, Any]) -> float:
    share: float = sum(client["cpu_share"] for client in run["clients"])
    return share


def _alone(value: float) -> dict[str, float]:
    return spread([value])
