"""Passes through compiled code in the place of the model's own, once it is there and gives the same vectors.

Decides when the compiled pass takes over, and what it must stand up to before. Must never know threads of an engine:
whoever asks gets an answer at once, and the slow work is done in a thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedserve.model.backend import BatchResult, TokenBatch
from embedserve.model.layout import row_positions
from embedserve.model.native.compilation import Compilation, CompilationEnd
from embedserve.model.native.compiler import CannotCompile
from embedserve.model.native.library import NativeEncoder, Plan
from embedserve.model.pooling import Pooling, token_weights
from embedserve.model.stopwatch import Stopwatch

__all__ = ["CompiledModel", "Reference", "least_cosine"]

JUDGED_WAIT_S = 30.0
"""Once the code is there, a start waits for the comparison, a second's work, so that the first call finds it."""
VANISHING_NORM = 1e-12

Reference = tuple[TokenBatch, npt.NDArray[np.float32]]
"""A batch and the vectors that the model itself gave for it."""


class CompilationFacts(TypedDict):
    """What a ``DeviceReport`` says of it."""

    compiled: bool
    compiling: bool
    compile_s: float
    compile_cached: bool
    compile_failure: str


class CompiledModel:
    """The compiled form of one model, or the attempt to make it."""

    def __init__(
        self,
        make_plan: Callable[[], Plan],
        *,
        pooling: Pooling,
        dense: Callable[[Tensor], Tensor] | None,
        offset_pad_id: int | None,
        cosine_min: float,
        cache: Path,
        lanes: int,
        nice: int = 0,
    ) -> None:
        """Begin to compile for ``lanes`` cores, whose threads are ``nice``.

        ``dense`` is what follows pooling, if anything; ``cosine_min`` is how alike its vectors must be to the model's.
        """
        self._pooling = pooling
        self._control_ids = pooling.control_ids.numpy()
        self._mean = pooling.modes == ("mean",) and not self._control_ids.size
        """Nearly every model: every token of a row counts alike."""
        self._dense = dense
        self._offset_pad_id = offset_pad_id
        self._cosine_min = cosine_min
        self._compilation: Compilation | None = Compilation(
            self._checked(make_plan), cache=cache, lanes=lanes, nice=nice
        )
        self._end: CompilationEnd | None = None
        self._encoder: NativeEncoder | None = None
        self._taking_over = threading.Lock()

    def compare_with(self, known: Sequence[Reference]) -> None:
        """Let the compiled pass take over when it gives these vectors; wait for that if it is all that is left."""
        compilation = self._compilation
        if compilation is None:  # it has failed already
            return
        compilation.judge_with(lambda encoder: self._judge(encoder, known))
        if compilation.is_made:
            self._take_over(JUDGED_WAIT_S)

    @property
    def ready(self) -> bool:
        """Whether passes go through it from now on. Once true, true for good. Any thread may ask."""
        if self._compilation is not None:
            self._take_over(0.0)
        return self._encoder is not None

    def embed(self, batch: TokenBatch, lengths: npt.NDArray[np.int64], watch: Stopwatch) -> BatchResult:
        """One packed pass over checked rows of ``lengths``; only when ``ready``."""
        assert self._encoder is not None
        vectors = self._vectors(self._encoder, batch, lengths, watch)
        watch.mark_device()
        return BatchResult(vectors, watch.stop())

    def facts(self) -> CompilationFacts:
        """For the device's report."""
        ready, end = self.ready, self._end
        return {
            "compiled": ready,
            "compiling": self._compilation is not None,
            "compile_s": 0.0 if end is None else end.seconds,
            "compile_cached": end is not None and end.cached,
            "compile_failure": "" if end is None else end.why,
        }

    def _take_over(self, timeout_s: float) -> None:
        with self._taking_over:
            end = None if self._compilation is None else self._compilation.end(timeout_s)
            if end is not None:
                self._encoder, self._end, self._compilation = end.encoder, end, None

    def _vectors(
        self, encoder: NativeEncoder, batch: TokenBatch, lengths: npt.NDArray[np.int64], watch: Stopwatch | None = None
    ) -> npt.NDArray[np.float32]:
        positions = weights = None
        if self._offset_pad_id is not None:
            positions = row_positions(batch.ids, lengths, self._offset_pad_id).astype(np.int32)
        if not self._mean or batch.skip is not None:
            skip = None if batch.skip is None else batch.skip.astype(np.int64)
            weights = token_weights(self._pooling.modes, self._control_ids, batch.ids, lengths, skip)
            assert weights is not None, "a mode that is no weighted sum is not compiled"
        if watch is not None:
            watch.mark_assembled()
            watch.mark_device()  # a CPU reads where the batch lies: nothing is copied in
        normalize = batch.normalize if self._dense is None else None
        vectors = encoder.run(batch.ids, batch.offsets, positions=positions, pooling=weights, normalize=normalize)
        if watch is not None:
            watch.mark_device()
        return vectors if self._dense is None else self._densified(self._dense, vectors, batch)

    @staticmethod
    def _densified(
        dense: Callable[[Tensor], Tensor], pooled: npt.NDArray[np.float32], batch: TokenBatch
    ) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            vectors: npt.NDArray[np.float32] = dense(torch.from_numpy(pooled)).numpy()
        # As torch.nn.functional.normalize, which takes ten times as long for one row.
        norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
        scale = np.where(batch.normalize, 1.0 / np.maximum(norms, VANISHING_NORM), 1.0).astype(np.float32)
        vectors *= scale[:, None]
        return vectors

    def _judge(self, encoder: NativeEncoder, known: Sequence[Reference]) -> None:
        """In the thread that compiled, beside passes that serve. Raises ``CannotCompile``."""
        for batch, vectors in known:
            lengths = np.diff(batch.offsets).astype(np.int64)
            result = self._vectors(encoder, batch, lengths)
            cosine = least_cosine(result, vectors)
            if not cosine >= self._cosine_min:  # NaN too
                raise CannotCompile(
                    f"the compiled pass gives other vectors for rows of {lengths.tolist()} tokens (cosine {cosine:.6f})"
                )

    def _checked(self, make_plan: Callable[[], Plan]) -> Callable[[], Plan]:
        def make() -> Plan:
            if "max" in self._pooling.modes:
                raise CannotCompile("the compiled pass pools by weighted sums, and a maximum is none")
            return make_plan()

        return make


def least_cosine(some: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> float:
    """The cosine of the two rows that are least alike; NaN where one is not finite."""
    norms = np.linalg.norm(some, axis=1) * np.linalg.norm(others, axis=1)
    return float(np.min(np.sum(some * others, axis=1) / np.maximum(norms, VANISHING_NORM)))
