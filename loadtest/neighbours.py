"""What one caller does to the others: ``python -m loadtest.neighbours``. Real server, real model, one client process.

* ``abandoned``: 1,000 calls are sent and cancelled. Mark: 0 queued tokens at once after the last, and a lone call right
  after takes what it takes on an idle server (coral-gpu-inference kept 139,264 tokens of 24 such calls).
* ``malformed``: of 8 calls at once one is bad, in each of many ways. Mark: 0 of the 7 others hurt, every vector right.
* ``behind``: one short text sent while a call of 64 texts of 200 words runs. Mark: delayed by less than the time of one
  batch (embedeer: 2,475 ms).
* ``bulk``: an interactive caller beside a stream of 10,000 texts. Mark: its p99 moves by one batch at most.

One batch is a full one: the most that the scheduler puts into one pass, ``scheduling.max_batch_ms`` of predicted time.
How long passes really took is read from the server's own metrics and stands beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from loadtest.result import Run
from loadtest.server import Server, product
from loadtest.texts import texts_of

SETTINGS = ("--admission.throughput.max_drain_ms", "3600000")
"""Nothing here is to be refused for its size: what is measured is what the admitted do to each other."""
ABANDONED = 1_000
ROUNDS = 12
BEHIND = 20
BULK_TEXTS = 10_000
BULK_TOKENS = 50
BULK_JOBS = 2
"""One after the other: with one and a caller of 8 calls a second the p99 was the second worst of 120 calls."""
INTERACTIVE_PER_S = 20.0
INTERACTIVE = (("x-embedserve-priority", "interactive"),)
BULK = (("x-embedserve-priority", "bulk"),)
SHORT = "how do I renew a passport"
BATCH_MS = 50.0
"""A full batch: the default of ``scheduling.max_batch_ms``."""

Vector = npt.NDArray[np.float32]


def main() -> int:
    parser = argparse.ArgumentParser(description="What one caller does to the others.")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--only", choices=list(MEASUREMENTS), action="append")
    parser.add_argument("settings", nargs="*", help="after --: settings of the server, as to `embedserve serve`")
    options = parser.parse_args()
    noted = Run("neighbours")
    found: dict[str, Any] = {}
    for name in options.only or MEASUREMENTS:
        with product(*SETTINGS, *options.settings) as server:
            found[name] = asyncio.run(_with_stub(server, MEASUREMENTS[name]))
        print(name, found[name], flush=True)
    if not options.no_write:
        noted.write(found)
    return 0 if all(row["met"] for row in found.values()) else 1


async def _with_stub(server: Server, measure: Callable[[Server, Any], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub = EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]
        for _ in range(20):
            await stub.Embed(pb.EmbedRequest(texts=[SHORT]))
        return await measure(server, stub)


async def timed(call: Awaitable[Any]) -> tuple[float, Any]:
    """Milliseconds, and the answer."""
    begun = time.perf_counter()
    answer = await call
    return (time.perf_counter() - begun) * 1e3, answer


async def alone(stub: Any, times: int = 30) -> list[float]:
    """Latencies of a short text on an idle server, ms, ascending."""
    return sorted([(await timed(stub.Embed(pb.EmbedRequest(texts=[SHORT]))))[0] for _ in range(times)])


async def abandoned(_server: Server, stub: Any) -> dict[str, Any]:
    """Send, wait until most are queued, cancel them all, ask."""
    idle = await alone(stub)
    requests = [pb.EmbedRequest(texts=[text]) for text in texts_of(128, ABANDONED)]
    calls = [stub.Embed(request) for request in requests]
    peak = 0
    while peak < ABANDONED * 128 * 3 // 4:
        load = await stub.GetLoad(pb.GetLoadRequest())
        peak = max(peak, load.queued_tokens)
    for call in calls:
        call.cancel()
    cancelled_at = time.perf_counter()
    left = (await stub.GetLoad(pb.GetLoadRequest())).queued_tokens
    asked_ms = (time.perf_counter() - cancelled_at) * 1e3
    settled_ms = asked_ms
    while (await stub.GetLoad(pb.GetLoadRequest())).queued_tokens:
        settled_ms = (time.perf_counter() - cancelled_at) * 1e3
    lone_ms, _ = await timed(stub.Embed(pb.EmbedRequest(texts=[SHORT])))
    load = await stub.GetLoad(pb.GetLoadRequest())
    again = await alone(stub)
    return {
        "queued_tokens_before": peak,
        "queued_tokens_at_the_first_question": left,
        "first_question_ms": round(asked_ms, 1),
        "queued_tokens_0_after_ms": round(settled_ms, 1),
        "queued_tokens_after": load.queued_tokens,
        "running_items_after": load.running_items,
        "lone_call_ms": round(lone_ms, 1),
        "idle_p50_max_ms": [round(idle[len(idle) // 2], 1), round(idle[-1], 1)],
        "afterwards_p50_max_ms": [round(again[len(again) // 2], 1), round(again[-1], 1)],
        # The pass that runs when the calls are abandoned has to end first: it cannot be interrupted.
        "met": load.queued_tokens == 0 and settled_ms < 1000,
    }


def _bad_requests() -> dict[str, bytes]:
    good = pb.EmbedRequest(texts=["a text"])
    over = pb.EmbedRequest(texts=["word " * 2_000], truncate=pb.TRUNCATE_NONE)
    ids = pb.EmbedRequest(token_ids=[pb.TokenIds(ids=[101, 4_000_000_000, 102])])
    return {
        "bad UTF-8": b"\x12\x02\xff\xfe",
        "cut short": good.SerializeToString()[:-2],
        "no texts": b"",
        "an empty text": pb.EmbedRequest(texts=["fine", ""]).SerializeToString(),
        "too long a text": over.SerializeToString(),
        "an id that is no token": ids.SerializeToString(),
        "ids and texts": pb.EmbedRequest(texts=["a"], token_ids=ids.token_ids).SerializeToString(),
        "too many dimensions": pb.EmbedRequest(texts=["a"], dimensions=100_000).SerializeToString(),
        "another model": pb.EmbedRequest(texts=["a"], model="no/such").SerializeToString(),
        "an unknown encoding": b"\x12\x01a\x40\x63",
        "100,000 empty texts": b"\x12\x00" * 100_000,
        "17 MiB": b"\x12\x01a" * (17 * 1024 * 1024 // 3),
    }


async def malformed(server: Server, stub: Any) -> dict[str, Any]:
    """Each bad request among 7 good ones, at once, several times."""
    texts = texts_of(40, 7)
    expected = [_vector(await stub.Embed(pb.EmbedRequest(texts=[text]))) for text in texts]
    random = Random(17)
    hurt, answered, worst, codes = 0, 0, 1.0, {}
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(server.target, options=options) as channel:
        raw: Any = channel.unary_unary("/embedserve.v1.EmbeddingService/Embed")

        async def bad(body: bytes) -> str:
            try:
                await raw(body, timeout=10)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        for _ in range(ROUNDS):
            for name, body in _bad_requests().items():
                calls: list[Any] = [stub.Embed(pb.EmbedRequest(texts=[text]), timeout=10) for text in texts]
                calls.insert(random.randrange(8), bad(body))
                answers = await asyncio.gather(*calls, return_exceptions=True)
                codes[name] = next(answer for answer in answers if isinstance(answer, str))
                good = [answer for answer in answers if not isinstance(answer, str)]
                for answer, vector in zip(good, expected, strict=True):
                    if isinstance(answer, BaseException):
                        hurt += 1
                        continue
                    answered += 1
                    worst = min(worst, float(_vector(answer) @ vector))
    return {
        "innocents_answered": answered,
        "innocents_hurt": hurt,
        "worst_cosine_to_alone": round(worst, 6),
        "status_of_the_bad_one": codes,
        "met": hurt == 0 and worst > 0.999 and "OK" not in codes.values() and "UNKNOWN" not in codes.values(),
    }


async def behind(server: Server, stub: Any) -> dict[str, Any]:
    """One short text at some instant of a call of 64 texts of 200 words."""
    idle = await alone(stub)
    large = pb.EmbedRequest(texts=texts_of(202, 64))
    await stub.Embed(large)
    count, seconds = passes(server)
    took = [(await timed(stub.Embed(large)))[0] for _ in range(5)]
    count, seconds = (now - then for now, then in zip(passes(server), (count, seconds), strict=True))
    pass_ms, large_ms = seconds / count * 1e3, float(np.median(took))
    random = Random(17)
    waits = []
    for _ in range(BEHIND):
        call = asyncio.ensure_future(stub.Embed(large))
        # The first third: the rest of the large call is still to come, so that it stands before the small one.
        await asyncio.sleep(random.uniform(0.002, large_ms / 3e3))
        waits.append((await timed(stub.Embed(pb.EmbedRequest(texts=[SHORT]))))[0])
        assert not call.done(), "the large call was over before the small one"
        await call
    delays = sorted(wait - idle[len(idle) // 2] for wait in waits)
    return {
        "large_call_ms": round(large_ms),
        "passes_of_the_large_call": round(count / 5, 1),
        "pass_ms": round(pass_ms, 1),
        "small_call_alone_ms": round(idle[len(idle) // 2], 1),
        "delay_p50_max_ms": [round(delays[len(delays) // 2], 1), round(delays[-1], 1)],
        "batch_ms": BATCH_MS,
        "met": delays[-1] < BATCH_MS,
    }


async def bulk(server: Server, stub: Any) -> dict[str, Any]:
    """An interactive caller, open loop, before and during a bulk job."""
    request = pb.EmbedStreamRequest(texts=texts_of(BULK_TOKENS, BULK_TEXTS))
    before = await _interactive(stub, seconds=30.0)
    count, seconds = passes(server)
    done = asyncio.Event()

    async def job() -> tuple[int, float]:
        begun, items = time.perf_counter(), 0
        for _ in range(BULK_JOBS):
            async for message in stub.EmbedStream(request, metadata=BULK):
                items += len(message.embeddings)
        done.set()
        return items, time.perf_counter() - begun

    running = asyncio.ensure_future(job())
    beside = await _interactive(stub, until=done)
    items, job_s = await running
    count, seconds = (now - then for now, then in zip(passes(server), (count, seconds), strict=True))
    pass_ms = seconds / count * 1e3
    p99 = [float(np.percentile(x, 99)) for x in (before, beside)]
    return {
        "bulk_texts": items,
        "bulk_texts_per_s": round(items / job_s),
        "mean_pass_ms": round(pass_ms, 1),
        "batch_ms": BATCH_MS,
        "interactive_calls": [len(before), len(beside)],
        "interactive_p50_ms": [round(float(np.median(x)), 1) for x in (before, beside)],
        "interactive_p99_ms": [round(x, 1) for x in p99],
        "met": items == BULK_JOBS * BULK_TEXTS and p99[1] - p99[0] <= BATCH_MS,
    }


async def _interactive(stub: Any, *, seconds: float | None = None, until: asyncio.Event | None = None) -> list[float]:
    """Latencies of one short text a call, Poisson, for so long or until something is done."""
    random, latencies, tasks = Random(5), list[float](), set[asyncio.Task[None]]()
    begun = at = time.perf_counter()

    async def call() -> None:
        latencies.append((await timed(stub.Embed(pb.EmbedRequest(texts=[SHORT]), metadata=INTERACTIVE)))[0])

    while not (until.is_set() if until else at - begun > (seconds or 0.0)):
        at += random.expovariate(INTERACTIVE_PER_S)
        await asyncio.sleep(max(at - time.perf_counter(), 0))
        task = asyncio.ensure_future(call())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return latencies


def passes(server: Server) -> tuple[float, ...]:
    """Passes so far and their seconds, by the server's own metric."""
    found = server.metrics()
    return tuple(found.get(f"embedserve_batch_duration_seconds_{part}", 0.0) for part in ("count", "sum"))


def _vector(answer: pb.EmbedResponse) -> Vector:
    return np.array(answer.embeddings[0].values, dtype=np.float32)


MEASUREMENTS: dict[str, Callable[[Server, Any], Awaitable[dict[str, Any]]]] = {
    "abandoned": abandoned,
    "malformed": malformed,
    "behind": behind,
    "bulk": bulk,
}

if __name__ == "__main__":
    raise SystemExit(main())
