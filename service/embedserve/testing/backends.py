"""Backends without a model: one that answers, one that fails as it is told.

Decides vectors that depend on every token id and its place, so that a test can tell whose row it got. Stands where
``model.backend.Backend`` stands.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from embedserve.model.backend import (
    BatchResult,
    DeviceLost,
    DeviceOutOfMemory,
    DeviceReport,
    ModelIdentity,
    PassTimes,
    TokenBatch,
    WarmPass,
)

__all__ = ["FakeBackend", "FaultPlan", "FaultyBackend", "fake_identity", "fake_vector"]


def fake_identity(
    dimension: int = 16,
    max_input_length: int = 128,
    *,
    prompts: tuple[tuple[str, str], ...] = (("query", "query: "),),
) -> ModelIdentity:
    """The identity of a fake model."""
    return ModelIdentity(
        name="fake/model",
        revision="1",
        weights_digest="sha256:" + "0" * 64,
        tokenizer_digest="sha256:" + "1" * 64,
        architecture="fake",
        dimension=dimension,
        max_input_length=max_input_length,
        pooling="mean",
        normalize=True,
        dtype="float32",
        device="cpu",
        prompts=prompts,
        default_prompt_name=None,
        vocab_size=1000,
    )


def fake_vector(ids: npt.NDArray[np.int32], dimension: int, *, normalize: bool = True) -> npt.NDArray[np.float32]:
    """The vector of a row: depends on each id and its position, on nothing else."""
    places = np.arange(1, len(ids) + 1, dtype=np.float64)
    weighted = (ids.astype(np.float64) * places).sum()
    vector = np.sin(np.arange(1, dimension + 1) * (1.0 + weighted % 997.0) + float(ids.sum() % 991))
    if normalize:
        vector /= np.linalg.norm(vector)
    single: npt.NDArray[np.float32] = vector.astype(np.float32)
    return single


class FakeBackend:
    """Answers at once with ``fake_vector`` for each row."""

    def __init__(
        self,
        identity: ModelIdentity | None = None,
        *,
        pass_ns: Callable[[TokenBatch], int] = lambda _batch: 0,
    ) -> None:
        """``pass_ns`` says how long a pass takes: slept without the GIL, as a device would."""
        self._identity = identity or fake_identity()
        self._pass_ns = pass_ns
        self.passes: list[tuple[int, int]] = []
        """Rows and tokens of every pass, in order, but for the one by which an engine checks its warm-up."""
        self._checked = True

    @property
    def identity(self) -> ModelIdentity:
        """Who this is."""
        return self._identity

    @property
    def passes_at_once(self) -> int:
        """One."""
        return 1

    def warm_up(self, max_batch_tokens: int) -> tuple[WarmPass, ...]:  # noqa: ARG002
        """Nothing to do. The pass after it is the engine's check of the start: it is not listed and takes no time."""
        self._checked = False
        return ()

    def embed(self, batch: TokenBatch) -> BatchResult:
        """One row a text."""
        start = time.monotonic_ns()
        rows = len(batch.offsets) - 1
        check, self._checked = not self._checked, True
        if not check:
            self.passes.append((rows, len(batch.ids)))
        vectors = np.empty((rows, self._identity.dimension), dtype=np.float32)
        for r in range(rows):
            ids = batch.ids[batch.offsets[r] : batch.offsets[r + 1]]
            vectors[r] = fake_vector(ids, self._identity.dimension, normalize=bool(batch.normalize[r]))
        assembled = time.monotonic_ns()
        if not check and (pause := self._pass_ns(batch)) > 0:
            time.sleep(pause / 1e9)
        end = time.monotonic_ns()
        return BatchResult(vectors, PassTimes(start, assembled, assembled, end, end, end))

    def release_memory(self) -> None:
        """Nothing to give back."""

    def report(self) -> DeviceReport:
        """A device that is always well."""
        return DeviceReport("cpu", 0, 0, compiled=False, packed=True)


@dataclass(slots=True)
class FaultPlan:
    """What goes wrong. Every part may be changed while the backend runs, from any thread."""

    raise_on_id: int | None = None
    """A batch with this token id raises, as a poison text would make a kernel raise."""
    nan_on_id: int | None = None
    """Rows with this token id come back as NaN."""
    nan_once_on_id: int | None = None
    """As ``nan_on_id``, but only in company: alone the row is good."""
    memory_tokens: int | None = None
    """A batch with more tokens does not fit the device."""
    lose_device: bool = False
    wrong_rows: bool = False
    """Return one row too few."""
    die: type[BaseException] | None = None
    """The thread ends with this."""
    fail_every: bool = False
    """Every pass raises, whatever is in it."""
    corrupt: bool = False
    """Every vector is another one: finite, of unit length and wrong."""
    fail_warm_up: str | None = None
    fail_check: bool = False
    """The pass by which an engine checks its warm-up fails as the rest of the plan says; it is spared otherwise."""
    gate: threading.Event = field(default_factory=threading.Event)
    """A pass waits until this is set; it is set at first."""

    def __post_init__(self) -> None:
        self.gate.set()


class FaultyBackend(FakeBackend):
    """A ``FakeBackend`` that fails as its plan says."""

    def __init__(self, plan: FaultPlan, identity: ModelIdentity | None = None) -> None:
        """The plan is read at each pass."""
        super().__init__(identity)
        self.plan = plan
        self.released = 0
        """How often memory was given back."""

    def warm_up(self, max_batch_tokens: int) -> tuple[WarmPass, ...]:
        """Fail, if the plan says so."""
        if self.plan.fail_warm_up is not None:
            raise RuntimeError(self.plan.fail_warm_up)
        return super().warm_up(max_batch_tokens)

    def embed(self, batch: TokenBatch) -> BatchResult:
        """Fail as planned, or answer."""
        plan = self.plan
        if not self._checked and not plan.fail_check:
            return super().embed(batch)
        plan.gate.wait()
        if plan.die is not None:
            raise plan.die("the plan says so")
        if plan.lose_device:
            raise DeviceLost("CUDA error: device-side assert triggered")
        if plan.memory_tokens is not None and len(batch.ids) > plan.memory_tokens:
            raise DeviceOutOfMemory(f"{len(batch.ids)} tokens")
        if plan.fail_every:
            raise RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")
        if plan.raise_on_id is not None and (batch.ids == plan.raise_on_id).any():
            raise ValueError("a kernel does not like this text")
        result = super().embed(batch)
        vectors = result.vectors
        for r in range(len(vectors)):
            ids = batch.ids[batch.offsets[r] : batch.offsets[r + 1]]
            alone = len(vectors) == 1
            if (plan.nan_on_id is not None and (ids == plan.nan_on_id).any()) or (
                plan.nan_once_on_id is not None and not alone and (ids == plan.nan_once_on_id).any()
            ):
                vectors[r] = np.nan
        if plan.corrupt:
            vectors[:] = vectors[:, ::-1]
        if plan.wrong_rows:
            return BatchResult(vectors[:-1], result.times)
        return result

    def release_memory(self) -> None:
        """Count it."""
        self.released += 1
