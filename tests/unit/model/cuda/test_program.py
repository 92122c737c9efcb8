"""What a graph would hold: traced with real tensors, it must ask for no value, and a replay must compute another batch.

The trace (``make_fx``) is what a capture is on CUDA: operations on the buffers that were there, and no Python. It
refuses to be asked for a tensor's value, where a capture would refuse to wait for the device.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from embedserve.model.checkpoint import load_checkpoint
from embedserve.model.cuda.inputs import InputLayout
from embedserve.model.cuda.program import Program
from embedserve.model.cuda.rows_attention import ReferenceRows
from embedserve.model.layout import packed
from embedserve.model.torch_backend import TorchBackend
from tests.unit.model.batches import batch_of, cosines
from tests.unit.model.checkpoints import PACKED, save_checkpoint, save_encoder

KEY = InputLayout(tokens=256, rows=16)
LENGTH_MAX = 128
MODES = ["mean", "cls", "lasttoken", "max", "weightedmean"]


class Captured:
    """One model's program, traced over buffers that stay."""

    def __init__(self, model: TorchBackend) -> None:
        self.model = model
        self.buffer = torch.zeros(KEY.size, dtype=torch.int32)
        program = Program(model._model, model._pooling, model._dense, ReferenceRows, tiles_length_max=LENGTH_MAX)
        # As TorchBackend and Program set it before a pass.
        model._model.config._attn_implementation = "embedserve_packed"

        def work(buffer: Tensor) -> Tensor:
            return program.vectors(KEY.views(buffer, skips=True), LENGTH_MAX)

        with torch.no_grad():
            self.replay = make_fx(work)(self.buffer)

    @property
    def from_host(self) -> list[str]:
        """Values that are made anew from the host's memory: a copy for which a capture has no way."""
        loaded = [*self.model._model.buffers(), *self.model._pooling.buffers()]
        there = {buffer.untyped_storage().data_ptr() for buffer in loaded}
        targets = [str(node.target) for node in self.replay.graph.nodes]
        constants = [target for target in targets if target.startswith("_tensor_constant")]
        return [target for target in targets if "lift_fresh" in target] + [
            name for name in constants if getattr(self.replay, name).untyped_storage().data_ptr() not in there
        ]

    def agrees(self, lengths: list[int], skip: list[int] | None = None) -> bool:
        batch = batch_of(lengths, seed=len(lengths), skip=None if skip is None else np.array(skip, np.int32))
        layout = packed(batch, np.array(lengths), self.model._offset_pad_id)
        KEY.write(
            self.buffer.numpy(),
            layout,
            normalize=batch.normalize,
            skip=batch.skip,
            filler_id=self.model._pad_id,
            filler_position=self.model._offset_pad_id or 0,
        )
        with torch.no_grad():
            replayed = self.replay(self.buffer).numpy()[: len(lengths)]
        vectors = np.empty_like(replayed)
        vectors[layout.order] = replayed
        return cosines(vectors, self.model.embed(batch).vectors) > 0.999999


class TestCapture:
    @pytest.mark.parametrize("architecture", PACKED)
    def test_no_architecture_asks_the_device_for_a_value(self, tmp_path: Path, architecture: str) -> None:
        """Two batches that share nothing but the key; the trace was made with neither."""
        loaded = load_checkpoint(str(save_encoder(tmp_path, architecture)))
        captured = Captured(TorchBackend(loaded, dtype="float32", threads=1))

        assert captured.from_host == []
        assert captured.agrees([3, 40, 7, 7, 128])
        assert captured.agrees([1] * 16)

    def test_no_way_of_pooling_does(self, tmp_path: Path) -> None:
        """With control tokens and leading tokens to leave out: the most that the captured part has to look at."""
        loaded = load_checkpoint(str(save_checkpoint(tmp_path, pooling=MODES)))
        captured = Captured(TorchBackend(loaded, dtype="float32", threads=1, control_tokens=("[SEP]",)))

        assert captured.from_host == []
        assert captured.agrees([3, 40, 7, 7, 128], [1, 5, 9, 0, 64])
        assert captured.agrees([20, 20], [3, 30])
