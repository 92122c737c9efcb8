"""A process that serves, as a snapshot; tests change what they are about."""

from __future__ import annotations

import dataclasses
from typing import Any

from embedserve.snapshot import (
    Admission,
    Batches,
    Bucket,
    Change,
    Device,
    Ended,
    EngineFacts,
    Figure,
    Latency,
    Model,
    Policy,
    Process,
    Refusal,
    Requests,
    Resource,
    Sizes,
    Snapshot,
    Stage,
    Tokenizer,
    Traffic,
)

NOON = 1_795_262_400.0
"""2026-11-21 12:00:00 UTC."""
FLAT = (None,) * 30 + (0.5,) * 30
TRACE = "0af7651916cd43dd8448eb211c80319c"

PROCESS = Process(
    "serving", NOON - 3600, NOON - 3610, 3610.0, "1.2.3", 4711, "pod-7", ("0.0.0.0:50051",),
    (Change("starting", NOON - 3610), Change("warming", NOON - 3609), Change("serving", NOON - 3600)),
)  # fmt: skip
MODEL = Model(
    "acme/model", "abc123", "sha256:" + "0" * 64, "sha256:" + "1" * 64, "bert", "mean", 384, 512, "float32", "cpu", True
)
RESOURCES = (
    Resource("device", 0.42, FLAT, None),
    Resource("tokenizer", 0.07, FLAT, None),
    Resource("event loop", 0.31, FLAT, None),
)
TRAFFIC = Traffic(
    200.0, 400.0, 9000.0, 0.0, 0.0, 0.0, None, FLAT, FLAT, (0.0,) * 60, (0.0,) * 60, (0.0,) * 60, {"OK": 1234}, 5, None
)  # fmt: skip
BUCKETS = (
    Bucket(16, 3, 30, 0.004, Latency(240, 0.002, 0.005, 0.009), Latency(240, 0.01, 0.02, 0.04)),
    Bucket(512, 1, 400, 0.3, Latency(20, 0.1, 0.3, 0.4), Latency(20, 0.2, 0.5, 0.6)),
)
ADMISSION = Admission(
    True, "healthy", 0.0, None,
    (
        Policy("queue", None, (Figure("tokens held", 430, "tokens", 524_288),)),
        Policy("throughput", None, (Figure("drain time", 0.02, "s", 2.0),)),
    ),
    (),
)  # fmt: skip
SERVING = Snapshot(
    at_s=NOON,
    now_s=10.0,
    window_s=60.0,
    recent_s=300.0,
    step_s=5.0,
    process=PROCESS,
    model=MODEL,
    resources=RESOURCES,
    traffic=TRAFFIC,
    buckets=BUCKETS,
    running_items=8,
    running_tokens=128,
    max_queue_items=65536,
    max_queue_tokens=524_288,
    drain_s=0.02,
    latency=Latency(960, 0.012, 0.05, 0.2),
    stages=(Stage("queue", Latency(960, 0.004, 0.03, 0.1)), Stage("forward", Latency(960, 0.006, 0.02, 0.05))),
    batches=Batches(
        512, 12.5, 40.0, 8.2, 230.0, 0.97, Latency(512, 0.006, 0.02, 0.03),
        (Sizes(1, 1, 12), Sizes(2, 2, 100), Sizes(3, 4, 400)), 512, 4096, {"ok": 512}, 0.004, 0.00006,
    ),
    admission=ADMISSION,
    device=Device(0.004, NOON - 0.01, False, 0, None, 5.0, None, None, None, 0, 0, 0),
    tokenizer=Tokenizer(2, 0, 1024, Latency(100, 0.0001, 0.002, 0.003), 120.0),
    requests=Requests((), (), ()),
)  # fmt: skip


def engine(name: str, *, state: str = "healthy", shown: bool = False) -> EngineFacts:
    return EngineFacts(name, "cuda:7", state, held_tokens=12_345, tokens_per_s=1e6, drain_s=0.012, shown=shown)


def snapshot(**changes: Any) -> Snapshot:
    """The process that serves, with other parts."""
    return dataclasses.replace(SERVING, **changes)


def ended(**changes: Any) -> Ended:
    """A call that took half a second."""
    call = Ended(
        NOON - 2, "Embed", "OK", None, None, "search", 4, 120, 0.5, "queue", 0.4, TRACE,
    )  # fmt: skip
    return dataclasses.replace(call, **changes)


def refusal(**changes: Any) -> Refusal:
    """Calls that are refused for the past P95."""
    known = Refusal("latency_p95", "P95_EXCEEDED", 240, 1000, NOON - 60, NOON - 0.1, TRACE)
    return dataclasses.replace(known, **changes)


def shedding(**changes: Any) -> Snapshot:
    """The device is full and calls are refused."""
    full = (dataclasses.replace(RESOURCES[0], busy=0.97, full_since_s=NOON - 107), *RESOURCES[1:])
    traffic = dataclasses.replace(TRAFFIC, refused_per_s=24.0)
    admission = dataclasses.replace(
        ADMISSION,
        accepting=False,
        state="overloaded",
        share=0.12,
        since_s=NOON - 60,
        refusals=(refusal(),),
        policies=(Policy("latency_p95", "P95_EXCEEDED", (Figure("P95", 0.5, "s", 0.5),)),),
    )
    return snapshot(**{"resources": full, "traffic": traffic, "admission": admission} | changes)
