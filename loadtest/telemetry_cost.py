"""What telemetry costs: ``python -m loadtest.telemetry_cost``.

Servers of ours, one for each mode, stand side by side (an idle one costs nothing) and are loaded in turn, in an order
that rotates, several times over; medians and ranges are reported.

    off       OTEL_SDK_DISABLED, no Prometheus, no access log
    metrics   without a collector: metrics for Prometheus, no spans
    1 %       spans of 1 % of the calls go to an OTLP endpoint in another process, which forgets them
    100 %     spans of every call
    lines     as 1 %, and a line in the log for every call: the default. The others have none; it is a price of its own

Two loads. NULL, one text of 504 characters a call on the null model: CPU time of the whole server process a call, so
that the difference to ``off`` is the cost of telemetry in microseconds. MODEL, one short text a call by 64 callers on
the real model: calls a second, of which 2 % and 8 % are the budgets at 1 % and 100 %. The share is reckoned twice: as
calls/s lost, which on a small machine holds the client's and the endpoint's CPU too and swings by a few per cent, and
as CPU time a call gained on the real model's server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from embedserve.v1 import embedding_pb2 as pb
from loadtest.nullmodel import TEXT, write_checkpoint
from loadtest.result import Run, spread
from loadtest.server import ROOT, Server, null_server, product
from loadtest.tether import tethered

EMBED = "/embedserve.v1.EmbeddingService/Embed"
MODES = ("off", "metrics", "1 %", "100 %", "lines")
LINES = {"off": "off", "lines": "all"}
RATIOS = {"1 %": "0.01", "100 %": "1.0", "lines": "0.01"}
BUDGET_PERCENT = {"1 %": 2.0, "100 %": 8.0}
NULL_REQUEST = pb.EmbedRequest(texts=[TEXT]).SerializeToString()
MODEL_REQUEST = pb.EmbedRequest(texts=["how do I reset the password of my account"]).SerializeToString()
CALLERS = {"null": 8, "model": 64}


def main() -> int:
    parser = argparse.ArgumentParser(description="The cost of telemetry.")
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.8, help="of load, in each repetition of each mode")
    parser.add_argument("--loads", nargs="+", choices=("null", "model"), default=("null", "model"))
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], default=MODES[1:], help="beside off")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    run = Run("telemetry_cost")
    loads = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "null-1024")
        for load in options.loads:
            request = {"null": NULL_REQUEST, "model": MODEL_REQUEST}[load]
            with sink() as (endpoint, spans):
                start_each = partial(start, load, checkpoint=checkpoint, endpoint=endpoint)
                loads[load] = compare(
                    load, request, ("off", *options.modes), start_each, options.repetitions, options.seconds
                )
            loads[load]["spans_exported"] = spans[0]
            show(load, loads[load])
    met = True
    for mode, most in BUDGET_PERCENT.items():
        if mode in loads.get("model", {}):
            met = met and loads["model"][mode]["cpu_percent_over_off"]["median"] <= most
            print(f"{mode}: at most {most} % of the real model's CPU time a call: {'met' if met else 'MISSED'}")
    if not options.no_write:
        run.write(
            {"repetitions": options.repetitions, "seconds": options.seconds, "budgets_percent": BUDGET_PERCENT, **loads}
        )
    return 0 if met else 1


@contextlib.contextmanager
def sink() -> Iterator[tuple[str, list[int]]]:
    """An OTLP endpoint; the list holds the spans that came, once it has ended."""
    process = subprocess.Popen(
        tethered([sys.executable, "-m", "loadtest.otlp_sink"]), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    spans: list[int] = []
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}", spans
    finally:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        spans.append(int(out))


def start(load: str, mode: str, checkpoint: Path, endpoint: str) -> contextlib.AbstractContextManager[Server]:
    """A server in one mode. No admission policy: a refused call would look cheap."""
    settings = ["--admission.policies", "none", "--telemetry.log_requests", LINES.get(mode, "errors")]
    env: Mapping[str, str] = {}
    if mode == "off":
        settings += ["--telemetry.prometheus", "false"]
        env = {"OTEL_SDK_DISABLED": "true"}
    elif mode != "metrics":
        settings += ["--telemetry.trace_sample_ratio", RATIOS[mode]]
        env = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true"}
    if load == "null":
        return null_server(checkpoint, *settings, env=env)
    return product(*settings, env=env)


def compare(
    load: str,
    request: bytes,
    modes: Sequence[str],
    start_each: Callable[[str], contextlib.AbstractContextManager[Server]],
    repetitions: int,
    seconds: float,
) -> dict[str, Any]:
    """Calls/s and CPU a call of each mode."""
    seen: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    with contextlib.ExitStack() as stack:
        servers = {mode: stack.enter_context(start_each(mode)) for mode in modes}
        for server in servers.values():
            asyncio.run(drive(server, request, CALLERS[load], seconds / 2))
        for repetition in range(repetitions):
            turn = repetition % len(modes)
            for mode in (*modes[turn:], *modes[:turn]):
                seen[mode].append(asyncio.run(drive(servers[mode], request, CALLERS[load], seconds)))
    return summary(seen)


async def drive(server: Server, request: bytes, callers: int, seconds: float) -> tuple[float, float]:
    """Calls a second, and CPU microseconds of the server process a call."""
    done = 0

    async def caller() -> None:
        nonlocal done
        while time.monotonic() < ends:
            await embed(request)
            done += 1

    async with grpc.aio.insecure_channel(server.target) as channel:
        embed: Any = channel.unary_unary(EMBED)
        await embed(request)
        cpu, begun = server.cpu_ns(), time.monotonic()
        ends = begun + seconds
        await asyncio.gather(*(caller() for _ in range(callers)))
        took = time.monotonic() - begun
        # Spans leave in batches some time later; what is left over falls into this mode's next turn.
        return done / took, (server.cpu_ns() - cpu) / done / 1e3


def summary(seen: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians and ranges; differences are taken within a repetition, where the machine was the same."""
    found: dict[str, Any] = {}
    base = seen["off"]
    for mode, runs in seen.items():
        pairs = list(zip(runs, base, strict=True))
        found[mode] = {
            "calls_per_s": spread([rate for rate, _ in runs]),
            "cpu_us_per_call": spread([cpu for _, cpu in runs]),
            "calls_percent_under_off": spread([100 * (1 - ours[0] / off[0]) for ours, off in pairs], 2),
            "cpu_us_over_off": spread([ours[1] - off[1] for ours, off in pairs], 2),
            "cpu_percent_over_off": spread([100 * (ours[1] / off[1] - 1) for ours, off in pairs], 2),
        }
    return found


def show(load: str, found: dict[str, Any]) -> None:
    print(f"{load}: medians (range); {found['spans_exported']} spans came to the endpoint")
    print(
        f"  {'telemetry':<10}{'calls/s':>9}{'CPU us/call':>13}{'over off, us':>14}"
        f"{'over off, %':>30}{'calls/s lost, %':>28}"
    )
    for mode in (mode for mode in MODES if mode in found):
        one = found[mode]
        cpu, lost = one["cpu_percent_over_off"], one["calls_percent_under_off"]
        print(f"  {mode:<10}{one['calls_per_s']['median']:>9.0f}{one['cpu_us_per_call']['median']:>13.0f}"
              f"{one['cpu_us_over_off']['median']:>14.1f}"
              f"{cpu['median']:>12.1f} ({cpu['lowest']:>6.1f} to {cpu['highest']:>5.1f})"
              f"{lost['median']:>10.1f} ({lost['lowest']:>6.1f} to {lost['highest']:>5.1f})")  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
