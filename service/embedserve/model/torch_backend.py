"""The ``Backend`` on PyTorch: one encoder on one CPU or GPU.

Decides the shape of a pass (packed or padded), its stages, and what is checked before serving. Must never know where a
batch came from.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedserve.errors import StartupError
from embedserve.model.attention import PACKED_ATTENTION, GroupedRows
from embedserve.model.backend import (
    BatchResult,
    DeviceLost,
    DeviceOutOfMemory,
    DeviceReport,
    ModelIdentity,
    TokenBatch,
    WarmPass,
)
from embedserve.model.checkpoint import Checkpoint
from embedserve.model.compiled import CompiledModel
from embedserve.model.cores import core_count
from embedserve.model.cuda.accelerator import Accelerator
from embedserve.model.cuda.device import CudaAccelerator
from embedserve.model.cuda.passes import PASSES_AT_ONCE, PackedPasses
from embedserve.model.cuda.program import Program
from embedserve.model.cuda.rows_attention import varlen_missing
from embedserve.model.cuda.settings import CudaSettings
from embedserve.model.dense import load_dense, scale_to_unit_length
from embedserve.model.device import DeviceFault, bind_thread, choose_device, choose_dtype, fault_of, report_on
from embedserve.model.encoder import load_encoder
from embedserve.model.lanes import Lanes
from embedserve.model.layout import check_batch, packed, padded, pass_size
from embedserve.model.native.compiler import default_cache
from embedserve.model.native.plan import plan_for
from embedserve.model.pooling import Pooling, Segments
from embedserve.model.stopwatch import Stopwatch, latest
from embedserve.model.warm_up import WarmUp

__all__ = ["Attention", "TorchBackend"]

Attention = Literal["auto", "packed", "padded"]

_T = TypeVar("_T")

WARM_UP_TOKENS_CPU = 2_048
"""Tokens in the largest warm-up pass on a CPU: a pass has no first-time cost there that grows with its size."""
AGREEMENT_COSINE_MIN = {torch.float32: 0.99999, torch.bfloat16: 0.999, torch.float16: 0.999}
"""How alike a row's vectors from the packed and the padded shape must be; the parity that we promise."""
VARLEN_HEAD_WIDTH_MAX = 256
"""Floats in one attention head, and a multiple of 8: what the CUDA kernel for packed rows takes."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """A batch on the device."""

    inputs: dict[str, Any]
    """Keyword arguments of the encoder."""
    segments: Segments
    normalize: Tensor
    real: Tensor | None
    """Places of the real tokens in a padded pass; ``None`` where every place is real."""


class TorchBackend:
    """A loaded checkpoint on one device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        threads: int | None = None,
        control_tokens: tuple[str, ...] = (),
        attention: Attention = "auto",
        compiled: bool = False,
        compile_cache: Path | None = None,
        nice: int = 0,
        cuda: CudaSettings | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        """Load the weights onto ``device``.

        ``dtype`` is ``auto``, ``float32``, ``bfloat16`` or ``float16``; ``threads`` is how many cores a pass on a CPU
        is spread over, all by default; ``control_tokens`` are left out of averages; ``attention`` forces a shape for
        ``pad_to=None`` (``auto`` packs where the architecture and the device can). ``compiled`` has packed passes on a
        CPU compiled for it, beside the model that serves meanwhile; what was compiled is kept in ``compile_cache``,
        the user's own by default, and its threads are ``nice`` to others. ``cuda`` is for packed passes on a GPU, and
        on the ``accelerator`` of a test. Raises ``StartupError``.
        """
        self._device = choose_device(device)
        bind_thread(self._device)
        cores = threads or core_count()
        self._lanes = Lanes(cores) if self._device.type == "cpu" else None
        self._dtype = choose_dtype(dtype, self._device)
        control_ids = checkpoint.token_ids(control_tokens)
        self._model = load_encoder(checkpoint, self._dtype)
        torch.nn.Module.to(self._model, self._device)
        self._padded_attention = self._model.config._attn_implementation  # noqa: SLF001 - transformers' only handle
        self._packed = _can_pack(checkpoint, attention, self._device, self._dtype)
        pad_id = checkpoint.config.get("pad_token_id")
        self._pad_id = pad_id if isinstance(pad_id, int) else 0
        self._offset_pad_id = checkpoint.offset_pad_id
        self._pooling = Pooling(checkpoint.pipeline.pooling, control_ids).to(self._device)
        self._dense = torch.nn.Sequential(*(load_dense(spec, checkpoint.files) for spec in checkpoint.pipeline.dense))
        self._dense.to(self._device)
        self._identity = checkpoint.identity_for(str(self._device), str(self._dtype).removeprefix("torch."))
        self._one_at_a_time = threading.Lock()
        """The model itself takes one pass: its shape of attention is set before each, and its lanes are one set."""
        self._batch_tokens_max = 0
        self._passes: PackedPasses | None = None
        if self._packed and (accelerator is not None or self._device.type == "cuda"):
            self._passes = self._packed_passes(
                checkpoint, accelerator or CudaAccelerator(self._device), cuda or CudaSettings()
            )
        self._compiled: CompiledModel | None = None
        if compiled and self._packed and self._lanes is not None and self._passes is None:
            self._compiled = CompiledModel(
                partial(plan_for, self._model, checkpoint.architecture, self._dtype),
                pooling=self._pooling,
                dense=self._dense if len(self._dense) else None,
                offset_pad_id=self._offset_pad_id,
                cosine_min=AGREEMENT_COSINE_MIN[self._dtype],
                cache=compile_cache or default_cache(),
                lanes=cores,
                nice=nice,
            )

    def _packed_passes(self, checkpoint: Checkpoint, accelerator: Accelerator, cuda: CudaSettings) -> PackedPasses:
        return PackedPasses(
            Program(
                self._model,
                self._pooling,
                self._dense,
                accelerator.attention,
                tiles_length_max=cuda.tiles_length_max,
                compiled=cuda.compiled,
            ),
            accelerator,
            skips=not checkpoint.include_prompt,
            dimension=self._identity.dimension,
            length_max=self._identity.max_input_length,
            pad_id=self._pad_id,
            offset_pad_id=self._offset_pad_id,
            vocab_size=self._identity.vocab_size,
            cosine_min=AGREEMENT_COSINE_MIN[self._dtype],
            graphs=cuda.graphs,
        )

    @property
    def identity(self) -> ModelIdentity:
        """Who this is."""
        return self._identity

    @property
    def passes_at_once(self) -> int:
        """Two on a GPU, where one is copied in beside the other, and once passes are compiled for a CPU.

        There a core that finds nothing left of one begins with the next.
        """
        if self._passes is not None:
            return PASSES_AT_ONCE
        return 2 if self._compiled is not None and self._compiled.ready else 1

    def embed(self, batch: TokenBatch) -> BatchResult:
        """One pass, as ``Backend.embed``. Raises ``ValueError`` naming the row where a batch is malformed."""
        bind_thread(self._device)  # any thread of the worker
        try:
            return self._embed(batch)
        except RuntimeError as error:
            fault = fault_of(error)
            if fault is None:
                raise
            message = str(error)
        # Raised outside the except block: the first error's traceback holds the frames, and they the tensors, of the
        # pass; until it is gone release_memory() could give nothing back.
        if fault is DeviceFault.LOST:
            raise DeviceLost(message)
        raise DeviceOutOfMemory(message)

    def release_memory(self) -> None:
        """Give cached device memory back, between two passes; a CPU has no cache of its own."""
        if self._device.type == "cuda":
            self._alone(torch.cuda.empty_cache)

    def report(self) -> DeviceReport:
        """The device's state."""
        facts: dict[str, Any] = {"compiled": False}
        if self._compiled is not None:
            facts = {**self._compiled.facts()}
        if self._passes is not None:
            facts["graphs"] = self._passes.report()
        return report_on(self._device, packed=self._packed, batch_tokens_max=self._batch_tokens_max, **facts)

    def warm_up(self, max_batch_tokens: int) -> tuple[WarmPass, ...]:
        """Passes over the ladder of lengths in each shape: finite, and alike in both shapes. Raises ``StartupError``.

        Returns what the smallest and the largest of them cost when run once more.

        Seconds on a CPU, where passes end at ``WARM_UP_TOKENS_CPU``; on CUDA they reach ``max_batch_tokens``, or what
        of it fits the device, which ``report`` says then.
        """
        # Made here and not kept: it knows our methods, and a cycle would keep the weights and the lanes' threads until
        # the collector came by.
        warm_up = WarmUp(self.embed, self._identity, packs=self._packed, cosine_min=AGREEMENT_COSINE_MIN[self._dtype])
        if self._passes is None and self._device.type == "cpu":
            tokens_max = min(max_batch_tokens, WARM_UP_TOKENS_CPU)
        else:
            tokens_max = self._batch_tokens_max = warm_up.fitting(max_batch_tokens, self.release_memory)
        known = warm_up.agree(tokens_max)
        if self._passes is not None:
            self._passes.prepare(tokens_max)
            warm_up.still_agree(known, "CUDA graphs")
        if self._compiled is not None:
            self._compiled.compare_with(known)
        return warm_up.costs(tokens_max)

    def _embed(self, batch: TokenBatch) -> BatchResult:
        if self._compiled is not None and self._packs(batch) and self._compiled.ready:
            watch = Stopwatch(self._device)
            return self._compiled.embed(batch, self._checked(batch), watch)
        with torch.inference_mode():
            if self._passes is not None and self._packs(batch):
                begun_ns = time.monotonic_ns()
                return self._passes.embed(batch, self._checked(batch), begun_ns)
            return self._alone(partial(self._embed_alone, batch))

    def _embed_alone(self, batch: TokenBatch) -> BatchResult:
        watch = Stopwatch(self._device)
        return self._embed_uncompiled(batch, self._checked(batch), watch)

    def _alone(self, work: Callable[[], _T]) -> _T:
        """Do ``work`` while nothing else uses the model's own state."""
        with self._one_at_a_time:
            return work() if self._passes is None else self._passes.alone(work)

    def _checked(self, batch: TokenBatch) -> npt.NDArray[np.int64]:
        """Lengths of the rows of a batch that is well formed."""
        return check_batch(batch, self._identity.vocab_size, self._identity.max_input_length)

    def _embed_uncompiled(self, batch: TokenBatch, lengths: npt.NDArray[np.int64], watch: Stopwatch) -> BatchResult:
        # Read by transformers in every layer's call; the two shapes share one set of weights.
        attention = PACKED_ATTENTION if self._packs(batch) else self._padded_attention
        self._model.config._attn_implementation = attention  # noqa: SLF001
        if self._lanes is None:
            return self._compute(batch, lengths, watch)
        shares = self._lanes.shares(lengths)
        if len(shares) == 1:
            with self._lanes.all_on_one(int(lengths.sum()) if lengths.size == 1 else 0):
                return self._compute(batch, lengths, watch)
        parts = self._lanes.run([partial(self._compute_share, batch, lengths, rows) for rows in shares])
        vectors = np.empty((lengths.size, parts[0].vectors.shape[1]), np.float32)
        for rows, part in zip(shares, parts, strict=True):
            vectors[rows] = part.vectors
        return BatchResult(vectors, latest(watch.started_ns, [part.times for part in parts]))

    def _packs(self, batch: TokenBatch) -> bool:
        return batch.pad_to is None and self._packed

    def _compute_share(
        self, batch: TokenBatch, lengths: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
    ) -> BatchResult:
        """One lane's part of a pass."""
        with torch.inference_mode():  # it holds for the thread
            return self._compute(batch.rows(rows), lengths[rows], Stopwatch(self._device))

    def _compute(self, batch: TokenBatch, lengths: npt.NDArray[np.int64], watch: Stopwatch) -> BatchResult:
        packs = self._packs(batch)
        step, order = self._packed_pass(batch, lengths, watch) if packs else self._padded_pass(batch, lengths, watch)
        watch.mark_device()
        hidden: Tensor = self._model(**step.inputs).last_hidden_state
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if packs:
            hidden = hidden[: len(batch.ids)]
        watch.mark_device()
        if step.real is not None:
            hidden = hidden.index_select(0, step.real)
        vectors = scale_to_unit_length(self._dense(self._pooling(hidden, step.segments)), step.normalize)
        watch.mark_device()
        result = np.empty((lengths.size, vectors.shape[1]), np.float32)
        result[order] = vectors.cpu().numpy()
        return BatchResult(result, watch.stop())

    def _packed_pass(
        self, batch: TokenBatch, lengths: npt.NDArray[np.int64], watch: Stopwatch
    ) -> tuple[_Pass, npt.NDArray[np.int64]]:
        layout = packed(batch, lengths, self._offset_pad_id)
        skip = None if batch.skip is None else batch.skip.astype(np.int64)[layout.order]
        filler = pass_size(layout.ids.size) - layout.ids.size
        watch.mark_assembled()
        ids = self._tensor(layout.ids)
        inputs = {
            "input_ids": self._tensor(np.pad(layout.ids, (0, filler), constant_values=self._pad_id))[None],
            "position_ids": self._tensor(np.pad(layout.positions, (0, filler)))[None],
            "packing": GroupedRows(layout),
        }
        segments = self._segments(ids, layout.starts, layout.lengths, layout.rows, skip)
        return _Pass(inputs, segments, self._tensor(batch.normalize[layout.order]), None), layout.order

    def _padded_pass(
        self, batch: TokenBatch, lengths: npt.NDArray[np.int64], watch: Stopwatch
    ) -> tuple[_Pass, npt.NDArray[np.int64]]:
        grid = padded(batch, lengths, batch.pad_to or int(lengths.max()), self._pad_id)
        rows = np.repeat(np.arange(lengths.size), lengths)
        skip = None if batch.skip is None else batch.skip.astype(np.int64)
        watch.mark_assembled()
        inputs = {"input_ids": self._tensor(grid.ids)}
        real = None
        if grid.real.size < grid.mask.size:
            # Without padding there is no mask, and the faster attention kernel runs.
            inputs["attention_mask"] = self._tensor(grid.mask)
            real = self._tensor(grid.real)
        ids = self._tensor(batch.ids.astype(np.int64))
        segments = self._segments(ids, np.cumsum(lengths) - lengths, lengths, rows, skip)
        return _Pass(inputs, segments, self._tensor(batch.normalize), real), np.arange(lengths.size)

    def _segments(
        self,
        ids: Tensor,
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        skip: npt.NDArray[np.int64] | None,
    ) -> Segments:
        return Segments(
            ids=ids,
            starts=self._tensor(starts),
            lengths=self._tensor(lengths),
            rows=self._tensor(rows),
            skip=None if skip is None else self._tensor(skip),
        )

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _can_pack(checkpoint: Checkpoint, attention: Attention, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``pad_to=None`` runs without padding. Raises ``StartupError`` where it must and cannot."""
    reason = None
    if attention == "padded":
        return False
    if not checkpoint.packs:
        reason = f"{checkpoint.architecture} has no packed form"
    elif device.type == "cuda":
        heads = checkpoint.config.get("num_attention_heads") or checkpoint.config.get("n_heads") or 1
        width = checkpoint.hidden_size // heads
        if dtype is torch.float32:
            reason = "the packed kernel takes bfloat16 or float16, not float32"
        elif width % 8 or width > VARLEN_HEAD_WIDTH_MAX:
            reason = f"the packed kernel takes no attention heads of {width} floats"
        else:
            reason = varlen_missing()
    if reason is not None and attention == "packed":
        raise StartupError(f"attention is set to packed, but {reason}")
    return reason is None
