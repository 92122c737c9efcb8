"""Batches of random ids, and how alike the vectors are that two ways give for them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from embedserve.model.backend import TokenBatch
from tests.unit.model.checkpoints import VOCAB_SIZE

LENGTHS = [3, 40, 7, 7, 128, 41, 3, 12]


def batch_of(lengths: list[int], pad_to: int | None = None, *, seed: int = 0, **changes: Any) -> TokenBatch:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.random.default_rng(seed).integers(5, VOCAB_SIZE, int(offsets[-1])).astype(np.int32)
    return TokenBatch(ids, offsets, np.ones(len(lengths), np.bool_), pad_to, **changes)


def cosines(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float((np.sum(left * right, axis=1) / norms).min())
