"""The engine alone on a device: tokens a second in, vectors out, with as many passes at once as it takes.

Decides how a rate is taken and what of the time is whose. Must never know marks, a service or a rival.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedserve.model.backend import PassTimes, TokenBatch
from embedserve.model.checkpoint import load_checkpoint
from embedserve.model.compiled import least_cosine
from embedserve.model.cuda.host import HostAccelerator
from embedserve.model.cuda.settings import CudaSettings, GraphSettings
from embedserve.model.torch_backend import TorchBackend

__all__ = ["Device", "batches_of", "load", "parity", "rate"]

SEED = 17
IDS_FROM = 5
"""Below are the special tokens."""
BATCHES = 24
"""That a rate goes round; enough that lengths come in many mixtures."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where, and how long each figure is taken."""

    name: str
    dtype: str
    seconds: float
    repetitions: int
    batch_tokens: int


def load(folder: Path, device: Device, *, graphs: bool = True, rows_max: int = 512, **cuda: Any) -> TorchBackend:
    """The backend as the service makes it, warm; on a CPU with what stands in for streams and graphs."""
    growth = 3 if device.name == "cpu" else 1.25
    settings = CudaSettings(graphs=GraphSettings(enabled=graphs, growth=growth, rows_max=rows_max), **cuda)
    backend = TorchBackend(
        load_checkpoint(str(folder), max_input_length=512),
        device=device.name,
        dtype=device.dtype,
        cuda=settings,
        accelerator=HostAccelerator() if device.name == "cpu" else None,
    )
    backend.warm_up(device.batch_tokens)
    return backend


def batches_of(lengths: tuple[int, int], batch_tokens: int, vocabulary: int, rows_max: int = 512) -> list[TokenBatch]:
    """Full batches of rows whose lengths lie evenly between both."""
    rng = np.random.default_rng(SEED)
    made = []
    for _ in range(BATCHES):
        rows: list[int] = []
        while len(rows) < rows_max:
            length = int(rng.integers(lengths[0], lengths[1] + 1))
            if sum(rows) + length > batch_tokens:
                break
            rows.append(length)
        offsets = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
        ids = rng.integers(IDS_FROM, vocabulary, int(offsets[-1])).astype(np.int32)
        made.append(TokenBatch(ids, offsets, np.ones(len(rows), np.bool_), None))
    return made


def rate(backend: TorchBackend, batches: Sequence[TokenBatch], device: Device) -> dict[str, Any]:
    """Tokens and texts a second, and what part of the wall the device was at work; medians of the repetitions."""
    runs = [_run(backend, batches, device.seconds) for _ in range(device.repetitions)]
    figures: dict[str, Any] = {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
    figures["tokens_per_s_all"] = [round(run["tokens_per_s"]) for run in runs]
    return figures


def _run(backend: TorchBackend, batches: Sequence[TokenBatch], seconds: float) -> dict[str, float]:
    turns = iter(range(1 << 62))
    turning = threading.Lock()
    ends = time.monotonic() + seconds

    def caller() -> list[tuple[PassTimes, int, int]]:
        done = []
        while time.monotonic() < ends:
            with turning:
                batch = batches[next(turns) % len(batches)]
            result = backend.embed(batch)
            done.append((result.times, batch.ids.size, len(batch.offsets) - 1))
        return done

    callers = backend.passes_at_once
    with ThreadPoolExecutor(callers) as threads:
        passes = [one for part in threads.map(lambda _: caller(), range(callers)) for one in part]
    begun = min(times.start_ns for times, _, _ in passes)
    wall_ns = max(times.copied_out_ns for times, _, _ in passes) - begun
    return {
        "tokens_per_s": sum(tokens for _, tokens, _ in passes) / wall_ns * 1e9,
        "texts_per_s": sum(rows for _, _, rows in passes) / wall_ns * 1e9,
        "busy": _busy_ns([times for times, _, _ in passes]) / wall_ns,
        "host_ms": float(np.median([times.assembled_ns - times.start_ns for times, _, _ in passes])) / 1e6,
        "passes": float(len(passes)),
    }


def _busy_ns(passes: list[PassTimes]) -> int:
    """How long some pass was computed: each begins when it is copied in and the one before is through."""
    busy = free = 0
    for times in sorted(passes, key=lambda times: times.forward_ns):
        busy += max(0, times.forward_ns - max(times.copied_in_ns, free))
        free = max(free, times.forward_ns)
    return busy


def parity(backend: TorchBackend, reference: TorchBackend, texts: int, length_max: int) -> dict[str, float]:
    """The least cosine of ``texts`` rows in batches of all sizes against ``reference``, a row at a time."""
    rng = np.random.default_rng(SEED)
    lengths = np.maximum(3, (length_max ** rng.random(texts)).astype(np.int64))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = rng.integers(IDS_FROM, backend.identity.vocab_size, int(offsets[-1])).astype(np.int32)
    whole = TokenBatch(ids, offsets, np.ones(texts, np.bool_), None)
    wanted = np.concatenate([reference.embed(whole.rows(np.array([row]))).vectors for row in range(texts)])
    least: list[float] = []
    for size in (1, 7, 64, 300):
        order = rng.permutation(texts) if size > 1 else np.arange(0, texts, 10)
        for start in range(0, order.size, size):
            chosen = order[start : start + size]
            found = backend.embed(whole.rows(chosen)).vectors
            least.append(least_cosine(found, wanted[chosen]))
    other = float(np.median(np.sum(wanted[:-1] * wanted[1:], axis=1)))
    return {"texts": texts, "least_cosine": float(np.min(least)), "median_cosine_of_different_texts": other}
