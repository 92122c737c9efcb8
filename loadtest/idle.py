"""What an idle server costs: ``python -m loadtest.idle``. It must be 0.0 % of a core.

The server is the product as it is served by default, with its real model. It serves some calls first (an idle process
that has never worked proves little), one client stays connected and silent, and nobody scrapes. Then every thread's CPU
time (``schedstat``, in nanoseconds) and context switches are read before and after 30 s. Under 0.05 % rounds to 0.0 %.
Threads that woke are listed: a name and a number of wake-ups a second are what a profile would begin with
(``strace -f -p PID``, ``py-spy dump --pid PID``).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1 import embedding_pb2_grpc
from loadtest.nullmodel import write_checkpoint
from loadtest.result import Run
from loadtest.server import Server, null_server, product

LIMIT_PERCENT = 0.05
"""Of one core; what rounds to 0.0 %."""
SETTLE_S = 3.0
"""After the last call, for what a call leaves behind: telemetry's loop watch, allocator and thread pool timers."""


def main() -> int:
    parser = argparse.ArgumentParser(description="CPU of an idle server.")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--calls", type=int, default=200, help="served before")
    parser.add_argument(
        "--null", action="store_true", help="on the null model: what is left is not the model's library"
    )
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    run = Run("idle")
    with tempfile.TemporaryDirectory() as folder:
        started = null_server(write_checkpoint(Path(folder) / "null-1024")) if options.null else product()
        with started as server, grpc.insecure_channel(server.target) as channel:
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]
            for number in range(options.calls):
                stub.Embed(pb.EmbedRequest(texts=[f"text {number} of a call that is over", "and one more"]))
            time.sleep(SETTLE_S)
            found = watch(server, options.seconds)
    show(found)
    if not options.no_write:
        run.write(
            {"model": "null" if options.null else server.ready["model"], **found}, "idle_null" if options.null else None
        )
    return 0 if found["percent_of_a_core"] < LIMIT_PERCENT else 1


def watch(server: Server, seconds: float) -> dict[str, Any]:
    """CPU and context switches of each thread over ``seconds``."""
    before, begun = server.threads(), time.monotonic()
    time.sleep(seconds)
    after, took = server.threads(), time.monotonic() - begun
    threads: list[dict[str, Any]] = []
    for tid, now in after.items():
        cpu_ns = now.cpu_ns - (before[tid].cpu_ns if tid in before else 0)
        switches = now.switches - (before[tid].switches if tid in before else 0)
        if cpu_ns or switches:
            threads.append(
                {"thread": now.name, "cpu_ms": round(cpu_ns / 1e6, 3), "switches_per_s": round(switches / took, 2)}
            )
    cpu_s = sum(thread["cpu_ms"] for thread in threads) / 1e3
    return {
        "seconds": round(took, 2),
        "cpu_seconds": round(cpu_s, 5),
        "percent_of_a_core": round(100 * cpu_s / took, 4),
        "switches_per_s": round(sum(thread["switches_per_s"] for thread in threads), 2),
        "threads": len(after),
        "threads_that_woke": sorted(threads, key=lambda thread: -thread["cpu_ms"]),
    }


def show(found: dict[str, Any]) -> None:
    percent = found["percent_of_a_core"]
    verdict = "met" if percent < LIMIT_PERCENT else "MISSED"
    print(f"idle for {found['seconds']:.0f} s: {percent:.3f} % of a core ({found['cpu_seconds'] * 1e3:.1f} ms), "
          f"{found['switches_per_s']:.1f} context switches/s; mark 0.0 %: {verdict}")  # fmt: skip
    for thread in found["threads_that_woke"]:
        print(f"  {thread['thread']:<24}{thread['cpu_ms']:>9.2f} ms {thread['switches_per_s']:>8.2f} switches/s")


if __name__ == "__main__":
    raise SystemExit(main())
