"""How long the fuzz tests run, and what bytes they make of good ones.

A run of the suite tries a fixed number of fixed seeds. ``FUZZ_SECONDS`` in the environment gives each test so much time
and fresh seeds instead; the failing seed is in the assertion's message and replays by ``FUZZ_SEED``.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

from hypothesis import HealthCheck, settings

__all__ = ["PROFILE", "mutated", "seeds"]

FUZZ_S = float(os.environ.get("FUZZ_SECONDS", "0"))
PROFILE = settings(
    max_examples=max(300, int(FUZZ_S * 300)),
    deadline=None,
    derandomize=not FUZZ_S,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


def seeds(count: int) -> Iterator[int]:
    """``range(count)``, or one seed, or fresh ones for ``FUZZ_SECONDS``."""
    if "FUZZ_SEED" in os.environ:
        yield int(os.environ["FUZZ_SEED"])
        return
    yield from range(count)
    ends, seed = time.monotonic() + FUZZ_S, random.SystemRandom().randrange(1 << 40)
    while time.monotonic() < ends:
        yield seed
        seed += 1


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """``raw`` with one to three things wrong."""
    for _ in range(rng.randint(1, 3)):
        raw = _mutated_once(bytearray(raw), rng)
    return raw


def _mutated_once(raw: bytearray, rng: random.Random) -> bytes:
    place = rng.randrange(len(raw) + 1)
    match rng.randrange(8):
        case 0 if raw:  # a bit
            raw[place % len(raw)] ^= 1 << rng.randrange(8)
        case 1 if raw:  # a byte, often one that continues a varint or lies about a length
            raw[place % len(raw)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        case 2:  # cut
            del raw[place:]
        case 3:  # doubled
            raw += raw[place:]
        case 4:  # something in between
            raw[place:place] = rng.randbytes(rng.randint(1, 12))
        case 5:  # groups within groups, which no field of ours has
            depth = rng.choice([1, 50, 99, 100, 101, 5000])
            raw += b"\xfb\x07" * depth + b"\xfc\x07" * rng.choice([depth, 0, depth - 1])
        case 6:  # a varint without an end, a length past the end
            raw += rng.choice([b"\x08" + b"\xff" * 11, b"\x12\xff\xff\xff\xff\x0f", b"\x12\x80\x80\x80\x80\x80\x01x"])
        case _ if raw:  # a piece moved
            piece = raw[place : place + rng.randint(1, 40)]
            raw[rng.randrange(len(raw)) : 0] = piece
    return bytes(raw)
