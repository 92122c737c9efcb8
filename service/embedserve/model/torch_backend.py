"""The ``Backend`` on PyTorch: one encoder on one CPU or GPU.

Decides device, dtype, the shape of a pass (packed or padded) and what a device's errors mean. Must never know where a batch
came from. Every method is called from the thread that built it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from embedserve.errors import StartupError
from embedserve.model.attention import PACKED_ARCHITECTURES, PACKED_ATTENTION, packing_for
from embedserve.model.backend import BatchResult, DeviceLost, DeviceOutOfMemory, DeviceReport, ModelIdentity, PassTimes, TokenBatch
from embedserve.model.checkpoint import OFFSET_POSITIONS, Checkpoint
from embedserve.model.dense import load_dense, scale_to_unit_length
from embedserve.model.encoder import load_encoder
from embedserve.model.layout import Packed, check_batch, packed, padded
from embedserve.model.pooling import Pooling, Segments

__all__ = ["TorchBackend"]


class TorchBackend:
    """A checkpoint, loaded."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        threads: int | None = None,
        control_tokens: tuple[str, ...] = (),
        attention: str = "auto",
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device(device)
        chosen = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        self._model = load_encoder(checkpoint, chosen).to(self._device)
        self._padded_attention = self._model.config._attn_implementation
        self._packed = attention != "padded" and checkpoint.architecture in PACKED_ARCHITECTURES
        pad = checkpoint.config.get("pad_token_id")
        self._pad_id = pad if isinstance(pad, int) else 0
        self._position_offset = self._pad_id + 1 if checkpoint.architecture in OFFSET_POSITIONS else 0
        control_ids: tuple[int, ...] = ()
        self._pooling = Pooling(checkpoint.pipeline.pooling, control_ids).to(self._device)
        self._dense = [load_dense(spec, checkpoint.files.weights(spec.folder)[0]).to(self._device) for spec in checkpoint.pipeline.dense]
        self._identity = checkpoint.identity_for(str(self._device), str(chosen).removeprefix("torch."))

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    def warm_up(self, max_batch_tokens: int) -> None:
        self.embed(TokenBatch(np.array([1, 2, 3], np.int32), np.array([0, 3], np.int32), np.array([True]), None))

    def release_memory(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def report(self) -> DeviceReport:
        return DeviceReport(str(self._device), 0, 0, compiled=False, packed=self._packed)

    def embed(self, batch: TokenBatch) -> BatchResult:
        with torch.inference_mode():
            return self._embed(batch)

    def _embed(self, batch: TokenBatch) -> BatchResult:
        start = time.monotonic_ns()
        lengths = check_batch(batch, self._identity.vocab_size, self._identity.max_input_length)
        if batch.pad_to is None and self._packed:
            layout = packed(batch, lengths)
            order = layout.order
            packing = packing_for(layout, self._device)
            assembled = time.monotonic_ns()
            ids = self._tensor(layout.ids)
            positions = self._tensor(layout.positions) + self._position_offset
            segments = Segments(ids, self._tensor(layout.starts), self._tensor(layout.lengths), self._tensor(layout.rows), None if batch.skip is None else self._tensor(batch.skip.astype(np.int64)[order]))
            normalize = self._tensor(batch.normalize[order])
            copied = time.monotonic_ns()
            self._model.config._attn_implementation = PACKED_ATTENTION
            hidden = self._model(input_ids=ids[None], position_ids=positions[None], packing=packing).last_hidden_state[0]
        else:
            order = None
            width = batch.pad_to or int(lengths.max())
            grid = padded(batch, lengths, width, self._pad_id)
            starts = np.cumsum(lengths) - lengths
            assembled = time.monotonic_ns()
            ids = self._tensor(grid.ids)
            mask = self._tensor(grid.mask) if grid.real.size != grid.mask.size else None
            real = self._tensor(grid.real)
            segments = Segments(ids.reshape(-1)[real], self._tensor(starts), self._tensor(lengths), self._tensor(np.repeat(np.arange(lengths.size), lengths)), None if batch.skip is None else self._tensor(batch.skip.astype(np.int64)))
            normalize = self._tensor(batch.normalize)
            copied = time.monotonic_ns()
            self._model.config._attn_implementation = self._padded_attention
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            hidden = hidden.reshape(-1, hidden.shape[-1])[real]
        forward = time.monotonic_ns()
        vectors = self._pooling(hidden, segments)
        for layer in self._dense:
            vectors = layer(vectors)
        vectors = scale_to_unit_length(vectors, normalize)
        pooled = time.monotonic_ns()
        result = np.empty((lengths.size, vectors.shape[1]), np.float32)
        if order is None:
            result[:] = vectors.cpu().numpy()
        else:
            result[order] = vectors.cpu().numpy()
        return BatchResult(result, PassTimes(start, assembled, copied, forward, pooled, time.monotonic_ns()))

    def _tensor(self, array) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
