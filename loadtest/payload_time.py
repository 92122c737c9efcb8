"""Bytes to texts and vectors to bytes, in a warm loop: ``python -m loadtest.payload_time``.

The nearest counterpart of the rival's "json de/serialization, payload serialization, cast & reshape" (p90 44, 51 and
55 us for 8, 16 and 32 texts at 1024 floats): parsing the request, checking it, encoding the vectors, building and
serialising the answer, with the product's own functions and nothing between them. It says what that work costs in
itself. What it costs in a server that has slept since its last call, with caches that other threads have used, is
``loadtest.service_time``'s PAYLOAD, and what the whole service adds is its other lines.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from embedserve.api import wire
from embedserve.api.encoding import encode
from embedserve.api.validation import RequestLimits, RequestValidator
from embedserve.engine.stages import Stages
from embedserve.testing.backends import fake_identity
from embedserve.v1 import embedding_pb2 as pb
from loadtest.result import Run, percentiles, spread

MARKS_US = {8: 44.0, 16: 51.0, 32: 55.0}
DIMENSION = 1024
TEXT = "asdf" * 126
CALLS = 3000
REPETITIONS = 7


def once(size: int) -> list[float]:
    """Microseconds of each of ``CALLS`` payloads of ``size`` texts."""
    identity = fake_identity(DIMENSION, 512)
    validator, named = RequestValidator(identity, RequestLimits()), wire.identity_message(identity)
    request = pb.EmbedRequest(texts=[TEXT] * size).SerializeToString()
    vectors = np.random.default_rng(5).standard_normal((size, DIMENSION), dtype=np.float32)
    counts, cut, sizes = [254] * size, [False] * size, [size] * size
    took = []
    for _ in range(CALLS):
        begun = time.perf_counter_ns()
        valid = validator.embed(wire.parse_embed_request(request))
        stages = Stages(arrived_ns=begun, responded_ns=begun)
        parts = wire.unary_parts(
            encode(vectors, valid.encoding),
            counts,
            cut,
            sizes,
            identity=named,
            dimensions=valid.dimensions,
            tokens=254 * size,
            batches=1,
        )
        answer = wire.finish_unary(parts, wire.stage_timings(stages))
        took.append((time.perf_counter_ns() - begun) / 1e3)
    assert len(pb.EmbedResponse.FromString(answer).embeddings) == size
    return took


def main() -> int:
    """Print and keep p50, p90 and p99 for each size; 0 when every p90 is within its mark."""
    run = Run("payload_time")
    found: dict[int, list[dict[str, float]]] = {size: [] for size in MARKS_US}
    for _ in range(REPETITIONS):
        for size in MARKS_US:
            found[size].append(percentiles(once(size)))
    figures: dict[str, Any] = {
        str(size): {p: spread([one[p] for one in blocks]) for p in ("p50", "p90", "p99")}
        | {"mark_p90": MARKS_US[size], "met": spread([one["p90"] for one in blocks])["median"] <= MARKS_US[size]}
        for size, blocks in found.items()
    }
    for texts, one in figures.items():
        p50, p90, p99 = (one[p]["median"] for p in ("p50", "p90", "p99"))
        print(f"{texts} texts: p50 {p50}, p90 {p90}, p99 {p99} us; mark {one['mark_p90']}")
    run.write({"unit": "us", "repetitions": REPETITIONS, "calls": CALLS, "batches": figures})
    return 0 if all(one["met"] for one in figures.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
