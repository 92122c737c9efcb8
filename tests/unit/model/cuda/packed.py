"""Backends whose packed passes run on the host's accelerator, and batches for them."""

from typing import Any

import numpy as np

from embedserve.model.backend import GraphReport
from embedserve.model.checkpoint import Checkpoint
from embedserve.model.cuda.host import HostAccelerator
from embedserve.model.cuda.settings import CudaSettings, GraphSettings
from embedserve.model.torch_backend import TorchBackend

SKIP = np.array([1, 2, 0, 9, 5, 0, 1, 0], np.int32)
TOKENS_MAX = 512
GRAPHS = GraphSettings(growth=1.5, rows_max=16)
WITHOUT = GraphSettings(enabled=False)


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
