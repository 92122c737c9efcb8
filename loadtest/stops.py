"""SIGTERM under load, 20 times: ``python -m loadtest.stops``. Real server, real model. Mark: 0 accepted requests lost.

Each time a new server, 16 callers who follow its health as the published service config tells a client to, and a
SIGTERM in the middle. An accepted request is lost when its caller gets anything but an answer or a refusal that says
that nothing was done: UNAVAILABLE for a call that no handler had seen. The server's own log says how many it cut off,
and its metrics, read while it drains, how many calls it has begun and not ended.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from loadtest.result import Run, spread
from loadtest.server import Server, product
from loadtest.texts import texts_of

STOPS = 20
CALLERS = 16
BEFORE_S = 1.0
"""Under load before the signal; a little more each time, so that it meets every phase of a pass."""
SERVICE_CONFIG = Path(__file__).resolve().parent.parent / "deploy" / "clients" / "service_config.json"
SETTINGS = ("--shutdown.settle_ms", "1000")
"""The default; a test's server has 0."""


def main() -> int:
    parser = argparse.ArgumentParser(description="SIGTERM under load, again and again.")
    parser.add_argument("--stops", type=int, default=STOPS, choices=range(1, 101), metavar="1..100")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    noted = Run("stops")
    texts = texts_of(64, 64)
    rows = []
    for turn in range(options.stops):
        with product(*SETTINGS) as server:
            rows.append(asyncio.run(one_stop(server, texts, BEFORE_S + turn * 0.013)))
        print(turn + 1, rows[-1], flush=True)
    statuses: Counter[str] = sum((Counter(row["statuses"]) for row in rows), Counter())
    found = {
        "stops": options.stops,
        "statuses": dict(statuses),
        "lost": sum(row["lost"] for row in rows),
        "exit_codes": dict(Counter(row["exit_code"] for row in rows)),
        "stop_ms": spread([row["stop_ms"] for row in rows], 0),
    }
    print(found)
    if not options.no_write:
        noted.write({**found, "runs": rows})
    return 0 if found["lost"] == 0 and set(found["exit_codes"]) == {0} else 1


async def one_stop(server: Server, texts: list[str], before_s: float) -> dict[str, Any]:
    """Callers until the server is gone."""
    statuses: Counter[str] = Counter()
    lost: list[str] = []
    gone = asyncio.Event()
    options = [
        ("grpc.service_config", SERVICE_CONFIG.read_text()),
        ("grpc.use_local_subchannel_pool", 1),
        # A retry would hide what became of the first attempt.
        ("grpc.enable_retries", 0),
    ]

    async def caller(channel: Any, number: int) -> None:
        stub = EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]
        while not gone.is_set():
            number += 1
            request = pb.EmbedRequest(texts=[texts[number % len(texts)]] * (1 + number % 4))
            try:
                answer = await stub.Embed(request, timeout=20)
            except grpc.aio.AioRpcError as error:
                statuses[error.code().name] += 1
                if error.code() not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}:
                    lost.append(f"{error.code().name}: {error.details()}")
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    await asyncio.sleep(0.02)
            else:
                statuses["OK"] += 1
                if len(answer.embeddings) != len(request.texts):
                    lost.append("vectors are missing")

    channels = [grpc.aio.insecure_channel(server.target, options=options) for _ in range(4)]
    for channel in channels:
        await channel.channel_ready()
    callers = [asyncio.ensure_future(caller(channels[n % 4], n)) for n in range(CALLERS)]
    await asyncio.sleep(before_s)
    signalled = time.perf_counter()
    os.kill(server.pid, signal.SIGTERM)
    code = await asyncio.to_thread(server.wait)
    stop_ms = (time.perf_counter() - signalled) * 1e3
    gone.set()
    await asyncio.gather(*callers)
    for channel in channels:
        await channel.close()
    return {
        "statuses": dict(statuses),
        "lost": len(lost),
        "lost_as": sorted(set(lost)),
        "exit_code": code,
        "stop_ms": round(stop_ms),
    }


if __name__ == "__main__":
    raise SystemExit(main())
