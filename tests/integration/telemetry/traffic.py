"""Calls and a pass, as the API and the engine would tell of them."""

from __future__ import annotations

import time
from dataclasses import dataclass

from embedserve.api.observer import CallTrace
from embedserve.engine.observer import BatchRecord, Member
from embedserve.engine.stages import Boarding, Ride, Stages
from embedserve.model.backend import PassTimes
from embedserve.scheduling.item import Batch, Shape, Slice
from embedserve.telemetry.setup import Telemetry

METHOD = "embedserve.v1.EmbeddingService/Embed"
MS = 1_000_000


@dataclass
class Traffic:
    """What was sent through the observers."""

    trace_ids: list[str | None]


def ride_together(telemetry: Telemetry, metadata: list[list[tuple[str, str | bytes]]]) -> Traffic:
    """One call for each entry of ``metadata``, all answered by one pass. Must run on an event loop."""
    begun = time.monotonic_ns() - 20 * MS
    calls: list[CallTrace] = [
        telemetry.call_observer.begin(METHOD, sent, begun, "ipv4:127.0.0.1:4242") for sent in metadata
    ]
    rows = len(calls)
    batch = Batch(1, tuple(Slice(n, (0,)) for n in range(rows)), Shape.PACKED, 10, rows, 10 * rows, 10 * rows, begun)
    members = [Member(call.context, 0, 1, 10, begun + 5 * MS) for call in calls]
    times = PassTimes(*(begun + n * MS for n in range(8, 14)))
    sampled = any(call.context is not None for call in calls)
    trace = telemetry.engine_observer.batch_dispatched(1) if sampled else None
    record = BatchRecord(batch, members, "ok", begun + 7 * MS, times, begun + 14 * MS, 5 * MS, trace=trace)
    telemetry.engine_observer.batch_finished(record)
    for call in calls:
        stages = Stages(
            begun, begun + MS, begun + 2 * MS, begun + 4 * MS, begun + 5 * MS, begun + 8 * MS, begun + 9 * MS,
            begun + 14 * MS, begun + 15 * MS, texts=1, tokens=10, bucket=16, predicted_ns=10 * MS,
            rides=[Ride(1, rows, 10, 1, begun + 8 * MS, begun + 14 * MS)],
            boardings=[Boarding(1, rows, 1, begun + 7 * MS, trace)] if trace is not None else [],
        )  # fmt: skip
        telemetry.engine_observer.request_finished(stages, verdict="done")
        call.end(status="OK", stages=stages, error_type=None, attributes={"texts": 1, "model": "m"})
    return Traffic([call.trace_id for call in calls])
