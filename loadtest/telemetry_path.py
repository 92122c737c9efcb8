"""What telemetry costs a call, without a server: ``python -m loadtest.telemetry_path``.

The service's own observers are driven in one thread as the API and the engine drive them, with the marks of a short
text's call and passes of ``--rows`` calls, in four modes: ``off``, ``metrics``, ``1 %`` and ``100 %`` of the traces
(spans go to an OTLP endpoint in another process). Given is CPU time over ``off`` a call, of the calling thread and of
the whole process: the difference is the thread that builds and sends spans, and gRPC's own. Caches are warm here and
no other thread wants the interpreter, so that a server pays more; but the figure is steady within a few per cent on a
machine where calls a second are not. ``loadtest.telemetry_cost`` has the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import statistics
import time
from collections.abc import Sequence
from typing import Final

from embedserve.engine.observer import BatchRecord, EngineObserver, Member
from embedserve.engine.stages import Boarding, Ride, Stages
from embedserve.model.backend import PassTimes
from embedserve.scheduling.item import Batch, Shape, Slice, Verdict
from embedserve.telemetry.settings import TelemetrySettings
from embedserve.telemetry.setup import Telemetry, setup_telemetry
from loadtest.result import Run
from loadtest.telemetry_cost import MODES as SERVER_MODES
from loadtest.telemetry_cost import sink

MODES: Final = SERVER_MODES[:4]
METHOD: Final = "embedserve.v1.EmbeddingService/Embed"
METADATA: Final = (("user-agent", "grpc-python-asyncio/1.85.1 grpc-c/53.0.0 (linux; chttp2)"),)
PEER: Final = "ipv4:127.0.0.1:40312"
EDGES: Final = (16, 32, 64, 128, 256, 512)
TOKENS: Final = 12
STAGE_NS: Final = 700_000
"""Of each stage but the shortest: which bucket a duration falls into costs the same."""
CALLS: Final = 1000
"""Of one turn; then the queue of spans is left to empty, so that none is dropped and all are paid for."""


def main() -> int:
    parser = argparse.ArgumentParser(description="The cost of telemetry a call, without a server.")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--rows", type=int, default=12, help="calls in one pass")
    parser.add_argument("--profile", choices=MODES, help="print a profile of the calling thread in this mode instead")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    run = Run("telemetry_path")
    with sink() as (endpoint, _):
        modes = {mode: started(mode, endpoint) for mode in MODES}
        if options.profile:
            asyncio.run(profile(modes[options.profile], options.rows))
            return 0
        found = asyncio.run(compare(modes, options.repetitions, options.rows))
        for telemetry in modes.values():
            telemetry.shutdown(5.0)
    print(f"{'telemetry':<10}{'thread, us':>12}{'process, us':>13}   a call over off; passes of {options.rows}")
    for mode, (thread_us, process_us) in found.items():
        print(f"{mode:<10}{thread_us:>12.1f}{process_us:>13.1f}")
    if options.write:
        run.write(
            {"rows": options.rows, "us_over_off": {m: {"thread": t, "process": p} for m, (t, p) in found.items()}}
        )
    return 0


def started(mode: str, endpoint: str) -> Telemetry:
    """Telemetry as the service sets it up in ``mode``."""
    settings = TelemetrySettings(
        bucket_edges=EDGES,
        log_requests="off" if mode == "off" else "errors",
        trace_sample_ratio=float(mode.removesuffix(" %")) / 100 if mode.endswith("%") else 0.0,
    )
    ours = {"OTEL_SDK_DISABLED": "true"} if mode == "off" else {}
    if mode.endswith("%"):
        ours = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true"}
    os.environ.update(ours)
    try:
        return setup_telemetry(settings)
    finally:
        for name in ours:
            del os.environ[name]


async def compare(modes: dict[str, Telemetry], repetitions: int, rows: int) -> dict[str, tuple[float, float]]:
    """CPU time of the thread and of the process over ``off`` a call, in microseconds: medians."""
    seen: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    for repetition in range(repetitions + 1):
        taken = {mode: await turn(telemetry, rows) for mode, telemetry in modes.items()}
        if repetition:  # the first one warms up
            off_thread, off_process = taken["off"]
            for mode, (thread_us, process_us) in taken.items():
                seen[mode].append((thread_us - off_thread, process_us - off_process))
    return {
        mode: (statistics.median([t for t, _ in runs]), statistics.median([p for _, p in runs]))
        for mode, runs in seen.items()
    }


async def turn(telemetry: Telemetry, rows: int) -> tuple[float, float]:
    """Some calls, and their spans on their way."""
    thread, process = time.thread_time_ns(), time.process_time_ns()
    for batch_id in range(CALLS // rows):
        one_pass(telemetry, batch_id, rows)
        await asyncio.sleep(0)
    thread = time.thread_time_ns() - thread
    await asyncio.sleep(0.15)  # spans leave at once where so many wait; what is left over falls into the next turn
    calls = CALLS // rows * rows * 1e3
    return thread / calls, (time.process_time_ns() - process) / calls


def one_pass(telemetry: Telemetry, batch_id: int, rows: int) -> None:
    """What the API and the engine tell of one pass and its calls."""
    calls, engine = telemetry.call_observer, telemetry.engine_observer
    now = time.monotonic_ns()
    arrived = now - 12 * STAGE_NS
    traces = []
    for _ in range(rows):
        traces.append(calls.begin(METHOD, METADATA, arrived, PEER))
        engine.tokenized(1, TOKENS, 0, 30_000)
        engine.admitted(1, TOKENS)
    contexts = [trace.context for trace in traces]
    stages = [marks(arrived + 40_000) for _ in range(rows)]
    handle = dispatched(engine, batch_id, stages, contexts, now)
    engine.settled(Verdict.DONE.value, rows)
    for trace, own in zip(traces, stages, strict=True):
        engine.request_finished(own, verdict="done")
        trace.end(
            status="OK", stages=own, error_type=None,
            attributes={"deadline_ms": 2000.0, "texts": 1, "tenant": "default", "model": "sentence-transformers/all",
                        "dimensions": 384, "encoding": "float"},
        )  # fmt: skip
    engine.batch_finished(record(batch_id, contexts, handle, now))


def marks(arrived_ns: int) -> Stages:
    """The life of a short text's call."""
    stages = Stages(arrived_ns)
    stages.validated_ns = arrived_ns + 30_000
    stages.admitted_ns = arrived_ns + 40_000
    stages.tokenized_ns = arrived_ns + 90_000
    stages.queued_ns = arrived_ns + 120_000
    stages.dequeued_ns = arrived_ns + STAGE_NS
    stages.assembled_ns = stages.dequeued_ns + 50_000
    stages.computed_ns = stages.dequeued_ns + 10 * STAGE_NS
    stages.texts, stages.tokens, stages.bucket, stages.predicted_ns = 1, TOKENS, TOKENS, 9 * STAGE_NS
    stages.rides.append(Ride(1, 12, TOKENS, 1, stages.dequeued_ns, stages.computed_ns))
    return stages


def dispatched(
    engine: EngineObserver, batch_id: int, stages: Sequence[Stages], contexts: Sequence[object | None], now: int
) -> object | None:
    """As ``engine.record.board`` does."""
    sampled = [own for own, context in zip(stages, contexts, strict=True) if context is not None]
    handle = engine.batch_dispatched(batch_id) if sampled else None
    if handle is not None:
        for own in sampled:
            own.boardings.append(Boarding(batch_id, len(stages), 1, now, handle))
    return handle


def record(batch_id: int, contexts: Sequence[object | None], handle: object | None, now: int) -> BatchRecord:
    """A pass that ended well."""
    rows, start = len(contexts), now - 10 * STAGE_NS
    slices = tuple(Slice(number, (0,)) for number in range(rows))
    batch = Batch(batch_id, slices, Shape.PACKED, TOKENS, rows, rows * TOKENS, rows * TOKENS, start)
    times = PassTimes(start, start + 50_000, start + 60_000, now - 60_000, now - 50_000, now - 40_000)
    members = [Member(context, 0, 1, TOKENS, start) for context in contexts]
    return BatchRecord(batch, members, "ok", start - 40_000, times, now, 9 * STAGE_NS, None, handle)


async def profile(telemetry: Telemetry, rows: int) -> None:
    """Print what the calling thread does, by its own time."""
    await turn(telemetry, rows)
    profiler = cProfile.Profile()
    for _ in range(5):
        profiler.enable()
        for batch_id in range(CALLS // rows):
            one_pass(telemetry, batch_id, rows)
        profiler.disable()
        await asyncio.sleep(0.3)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    raise SystemExit(main())
