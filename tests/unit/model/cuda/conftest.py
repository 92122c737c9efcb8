"""One checkpoint, the model as a CPU runs it, and one with all of its graphs."""

import pytest

from embedserve.model.checkpoint import Checkpoint, load_checkpoint
from embedserve.model.torch_backend import TorchBackend
from tests.unit.model.checkpoints import save_checkpoint
from tests.unit.model.cuda.packed import TOKENS_MAX, backend_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(str(save_checkpoint(tmp_path_factory.mktemp("bert"))))


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> TorchBackend:
    """The model itself, as a CPU runs it: what all else is compared with."""
    return TorchBackend(checkpoint, dtype="float32", threads=1)


@pytest.fixture(scope="module")
def warm(checkpoint: Checkpoint) -> TorchBackend:
    """With all of its graphs."""
    backend = backend_of(checkpoint)
    backend.warm_up(TOKENS_MAX)
    return backend
