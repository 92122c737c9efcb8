"""Backends whose packed passes run on the host's accelerator, and batches for them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from embedserve.model.backend import GraphReport, TokenBatch
from embedserve.model.checkpoint import Checkpoint
from embedserve.model.cuda.host import HostAccelerator
from embedserve.model.cuda.settings import CudaSettings, GraphSettings
from embedserve.model.torch_backend import TorchBackend
from tests.unit.model.checkpoints import VOCAB_SIZE

LENGTHS = [3, 40, 7, 7, 128, 41, 3, 12]
SKIP = np.array([1, 2, 0, 9, 5, 0, 1, 0], np.int32)
TOKENS_MAX = 512
GRAPHS = GraphSettings(growth=1.5, rows_max=16)
WITHOUT = GraphSettings(enabled=False)


def batch_of(lengths: list[int], seed: int = 0, **changes: Any) -> TokenBatch:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.random.default_rng(seed).integers(5, VOCAB_SIZE, int(offsets[-1])).astype(np.int32)
    return TokenBatch(ids, offsets, np.ones(len(lengths), np.bool_), None, **changes)


def cosines(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float((np.sum(left * right, axis=1) / norms).min())


def backend_of(
    checkpoint: Checkpoint,
    graphs: GraphSettings = GRAPHS,
    *,
    tiles: int = 0,
    accelerator: HostAccelerator | None = None,
    **options: Any,
) -> TorchBackend:
    return TorchBackend(
        checkpoint,
        dtype="float32",
        threads=1,
        cuda=CudaSettings(graphs=graphs, tiles_length_max=tiles),
        accelerator=accelerator or HostAccelerator(),
        **options,
    )


def graphs_of(backend: TorchBackend) -> GraphReport:
    return backend.report().graphs
