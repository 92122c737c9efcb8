"""Half an hour of everything at once: ``python -m loadtest.soak [--minutes 30]``. Real server, real model.

One client process sends, open loop at about half of the capacity with a burst of 2 x each two minutes: single texts,
lists, streams, and among them calls that are cancelled, deadlines that are too short, bad requests, streams whose
reader stops reading, and connections that are dropped with their calls. Every ten seconds the server is weighed.

Marks: each call ends with one status that its kind allows; at the end nothing waits, runs or is in flight, the server's
counts of calls begun and ended and of items admitted and settled agree; after the first five minutes memory grows by
less than 2 % (the median of the last fifth of the samples against that of the fifth after the warm-up); tasks, threads
and descriptors are back where they were.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from loadtest.result import Run
from loadtest.server import Server, soak_server
from loadtest.texts import texts_of

RATE = 40.0
"""Calls per second in quiet times, of 2 texts in the mean: about half of what two cores do."""
BURST_EVERY_S, BURST_S, BURST_FACTOR = 120.0, 10.0, 4.0
SAMPLE_S = 10.0
WARM_UP_S = 300.0
GROWTH_MAX = 0.02
SETTLE_S = 20.0
"""At the end, before the last look: readers that stopped have to be found stalled."""
SETTINGS = ("--server.stream_stall_ms", "5000")
CODES = grpc.StatusCode

Action = Callable[["Traffic"], Awaitable[None]]


class Traffic:
    """Sends calls of many kinds and counts how each ended."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.random = Random(17)
        self.texts = texts_of(16, 200) + texts_of(60, 100) + texts_of(250, 30)
        self.ended: dict[str, Counter[str]] = {}
        self.wrong: Counter[str] = Counter()
        self.channels = [self.connect() for _ in range(4)]

    def connect(self) -> Any:
        """A connection of its own."""
        return grpc.aio.insecure_channel(
            self.target, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        )

    def stub(self, channel: Any = None) -> Any:
        """The calls of one connection, any if none is given."""
        return EmbeddingServiceStub(channel or self.random.choice(self.channels))  # type: ignore[no-untyped-call]

    def some(self, count: int) -> list[str]:
        """So many texts of 16, 60 and 250 tokens."""
        return self.random.choices(self.texts, k=count)

    async def end(self, kind: str, call: Awaitable[Any], allowed: set[str]) -> Any:
        """Wait for a call, count its status."""
        answer = None
        try:
            answer = await call
            status = "OK"
        except grpc.aio.AioRpcError as error:
            status = error.code().name
        except asyncio.CancelledError:
            status = "CANCELLED"
        self.ended.setdefault(kind, Counter())[status] += 1
        if status not in allowed:
            self.wrong[f"{kind}: {status}"] += 1
        return answer

    async def single(self) -> None:
        """One text."""
        request = pb.EmbedRequest(texts=self.some(1))
        await self.end("single", self.stub().Embed(request, timeout=10), {"OK", "RESOURCE_EXHAUSTED"})

    async def several(self) -> None:
        """A list; every text must have its vector."""
        count = self.random.choice([2, 4, 8, 32])
        answer = await self.end(
            "several", self.stub().Embed(pb.EmbedRequest(texts=self.some(count))), {"OK", "RESOURCE_EXHAUSTED"}
        )
        if answer is not None and len(answer.embeddings) != count:
            self.wrong["several: vectors are missing"] += 1

    async def stream(self) -> None:
        """100 texts, read to the end."""
        texts = self.some(100)

        async def read() -> None:
            indexes = [e.index async for m in call for e in m.embeddings]
            if sorted(indexes) != list(range(len(texts))):
                self.wrong["stream: vectors are missing or doubled"] += 1

        call = self.stub().EmbedStream(pb.EmbedStreamRequest(texts=texts), metadata=(("x-embedserve-tenant", "soak"),))
        await self.end("stream", read(), {"OK", "RESOURCE_EXHAUSTED"})

    async def cancelled(self) -> None:
        """Cancelled after 20 ms in the mean: queued, tokenised, running or done."""
        call = self.stub().Embed(pb.EmbedRequest(texts=self.some(self.random.choice([1, 40]))))
        asyncio.get_running_loop().call_later(self.random.expovariate(50), call.cancel)
        await self.end("cancelled", call, {"OK", "RESOURCE_EXHAUSTED", "CANCELLED"})

    async def cancelled_stream(self) -> None:
        """Cancelled after its first message."""
        call = self.stub().EmbedStream(pb.EmbedStreamRequest(texts=self.some(200)))

        async def read_one() -> None:
            async for _ in call:
                break
            call.cancel()
            async for _ in call:
                pass

        await self.end("cancelled stream", read_one(), {"OK", "RESOURCE_EXHAUSTED", "CANCELLED"})

    async def short_deadline(self) -> None:
        """1 to 100 ms."""
        seconds = self.random.choice([0.001, 0.005, 0.02, 0.1])
        call = self.stub().Embed(pb.EmbedRequest(texts=self.some(4)), timeout=seconds)
        await self.end("short deadline", call, {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"})

    async def bad(self) -> None:
        """Not a request."""
        raw = self.random.choice(self.channels).unary_unary("/embedserve.v1.EmbeddingService/Embed")
        body = self.random.choice([b"\x12\x02\xff\xfe", b"", b"\x12\x00" * 50_000, b"\x12\x01a\x40\x63", b"\x0a"])
        # In a burst it is refused before anybody reads it.
        await self.end("bad", raw(body), {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"})

    async def stalled_reader(self) -> None:
        """Reads one message and no more, for longer than the server waits."""
        channel = self.connect()
        call = self.stub(channel).EmbedStream(pb.EmbedStreamRequest(texts=self.some(3000)))

        async def read_one() -> None:
            await call.read()
            await asyncio.sleep(8)
            call.cancel()
            raise asyncio.CancelledError

        await self.end("stalled reader", read_one(), {"CANCELLED", "RESOURCE_EXHAUSTED"})
        await channel.close()

    async def vanished(self) -> None:
        """Drops a connection with calls on it."""
        channel = self.connect()
        calls = [self.stub(channel).Embed(pb.EmbedRequest(texts=self.some(2))) for _ in range(3)]
        await asyncio.sleep(self.random.expovariate(50))
        await channel.close()
        for call in calls:
            await self.end("vanished", call, {"OK", "CANCELLED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"})

    async def count(self) -> None:
        """Token counts."""
        request = pb.CountTokensRequest(texts=self.some(3))
        await self.end("count tokens", self.stub().CountTokens(request), {"OK"})

    async def run(self, seconds: float) -> None:
        """Open loop until the time is over, then wait for all."""
        kinds: list[tuple[Action, float]] = [
            (Traffic.single, 60),
            (Traffic.several, 12),
            (Traffic.stream, 1),
            (Traffic.cancelled, 6),
            (Traffic.cancelled_stream, 1),
            (Traffic.short_deadline, 8),
            (Traffic.bad, 6),
            (Traffic.stalled_reader, 0.05),
            (Traffic.vanished, 2),
            (Traffic.count, 4),
        ]
        actions, weights = zip(*kinds, strict=True)
        tasks: set[asyncio.Task[None]] = set()
        begun = at = time.perf_counter()
        while at - begun < seconds:
            burst = (at - begun) % BURST_EVERY_S >= BURST_EVERY_S - BURST_S
            at += self.random.expovariate(RATE * (BURST_FACTOR if burst else 1.0))
            await asyncio.sleep(max(at - time.perf_counter(), 0))
            task = asyncio.ensure_future(self.random.choices(actions, weights)[0](self))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        while tasks:
            await asyncio.wait(tasks, timeout=60)
        for channel in self.channels:
            await channel.close()


def weigh(server: Server) -> dict[str, int]:
    """Memory, threads, descriptors; tasks and what waits, by the server's own word."""
    os.kill(server.pid, signal.SIGUSR1)
    told = json.loads(server.line())
    status = dict(x.split(":", 1) for x in Path(f"/proc/{server.pid}/status").read_text().splitlines() if ":" in x)
    return {
        "rss_kib": int(status["VmRSS"].split()[0]),
        "threads": int(status["Threads"]),
        "descriptors": len(list(Path(f"/proc/{server.pid}/fd").iterdir())),
        **told,
    }


async def act(server: Server, minutes: float) -> dict[str, Any]:
    """The whole story."""
    idle = weigh(server)
    traffic = Traffic(server.target)
    samples: list[dict[str, Any]] = []
    begun = time.perf_counter()

    async def sample() -> None:
        while True:
            samples.append({"at_s": round(time.perf_counter() - begun), **await asyncio.to_thread(weigh, server)})
            await asyncio.sleep(SAMPLE_S)

    sampling = asyncio.ensure_future(sample())
    await traffic.run(minutes * 60)
    sampling.cancel()
    await asyncio.sleep(SETTLE_S)
    last = weigh(server)
    ends = server.metrics()
    return report(idle, last, samples, traffic, ends)


def report(
    idle: dict[str, int], last: dict[str, int], samples: list[dict[str, Any]], traffic: Traffic, ends: dict[str, float]
) -> dict[str, Any]:
    """What came of it, against the marks."""
    warm = [s["rss_kib"] for s in samples if s["at_s"] >= WARM_UP_S] or [s["rss_kib"] for s in samples]
    fifth = max(len(warm) // 5, 1)
    growth = statistics.median(warm[-fifth:]) / statistics.median(warm[:fifth]) - 1
    admitted = ends.get("embedserve_items_admitted_total", 0.0)
    settled = ends.get("embedserve_items_settled_total", 0.0)
    calls = sum(sum(counter.values()) for counter in traffic.ended.values())
    quiet = all(last[name] == 0 for name in ("calls", "requests", "waiting_items", "waiting_tokens", "running_items"))
    return {
        "calls": calls,
        "ended": {kind: dict(counter) for kind, counter in sorted(traffic.ended.items())},
        "wrong": dict(traffic.wrong),
        "items_admitted": admitted,
        "items_settled": settled,
        "active_calls_at_the_end": ends.get("embedserve_rpc_active_calls", 0.0),
        "idle_before": idle,
        "idle_after": last,
        "rss_growth_after_warm_up": round(growth, 4),
        "rss_mib": [round(s["rss_kib"] / 1024) for s in samples[:: max(len(samples) // 30, 1)]],
        "met": {
            "statuses": not traffic.wrong,
            "nothing_left": quiet,
            "settled_once": admitted == settled,
            "memory": growth < GROWTH_MAX,
            "tasks": last["tasks"] <= idle["tasks"] + 2,
            "threads": last["threads"] <= idle["threads"] + 4,
            "descriptors": last["descriptors"] <= idle["descriptors"] + 4,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Half an hour of everything at once.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("settings", nargs="*", help="after --: settings of the server, as to `embedserve serve`")
    options = parser.parse_args()
    noted = Run("soak")
    with soak_server(*SETTINGS, *options.settings) as server:
        found = asyncio.run(act(server, options.minutes))
    print(json.dumps(found, indent=1))
    if not options.no_write:
        noted.write({"minutes": options.minutes, **found})
    return 0 if all(found["met"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
