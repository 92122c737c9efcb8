"""Two passes at once, passes that fail, and what the hot path must not do; on the host's accelerator."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedserve.errors import StartupError
from embedserve.model.backend import DeviceLost, DeviceOutOfMemory
from embedserve.model.checkpoint import Checkpoint
from embedserve.model.cuda import device as cuda_device
from embedserve.model.torch_backend import TorchBackend
from tests.unit.model.batches import LENGTHS, batch_of, cosines
from tests.unit.model.cuda.packed import WITHOUT, backend_of, graphs_of


class TestOverlap:
    def test_two_passes_at_once(self, warm: TorchBackend, plain: TorchBackend) -> None:
        """Each caller gets its own vectors, whatever the other one does."""
        assert warm.passes_at_once == 2
        batches = [
            batch_of([(turn * 7 + row) % 60 + 1 for row in range(turn % 5 + 1)], seed=turn) for turn in range(40)
        ]
        with ThreadPoolExecutor(2) as callers:
            results = list(callers.map(lambda batch: warm.embed(batch).vectors, batches))

        for batch, vectors in zip(batches, results, strict=True):
            assert cosines(vectors, plain.embed(batch).vectors) > 0.999999

    def test_the_next_batch_is_copied_in_beside_the_pass(self, checkpoint: Checkpoint) -> None:
        """And its pass does not begin, nor its buffer change, before the first one is through."""
        backend = backend_of(checkpoint, WITHOUT)
        passes = backend._passes
        assert passes is not None
        expected = [backend.embed(batch_of(LENGTHS, seed=seed)).vectors for seed in (1, 2)]
        entered, go_on, copied = threading.Event(), threading.Event(), threading.Event()
        real_run, real_copy = passes._program.run, passes._copies_in.run

        def run(*arguments: Any) -> None:
            entered.set()
            assert go_on.wait(30)
            real_run(*arguments)

        def copy(work: Callable[[], None]) -> None:
            real_copy(work)
            if entered.is_set():
                real_copy(copied.set)

        passes._program.run = run  # type: ignore[method-assign]
        passes._copies_in.run = copy  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as callers:
            first = callers.submit(backend.embed, batch_of(LENGTHS, seed=1))
            assert entered.wait(30)
            second = callers.submit(backend.embed, batch_of(LENGTHS, seed=2))
            assert copied.wait(30)
            assert not first.done()
            assert not second.done()
            go_on.set()

            np.testing.assert_array_equal(first.result().vectors, expected[0])
            np.testing.assert_array_equal(second.result().vectors, expected[1])

    def test_a_padded_pass_waits_for_the_packed_ones(self, warm: TorchBackend) -> None:
        """It sets the model's attention, which a packed pass reads in every layer."""
        batches = [batch_of(LENGTHS, seed=seed) for seed in range(8)]
        expected = [warm.embed(batch).vectors for batch in batches]
        mixed = [dataclasses.replace(batch, pad_to=128 if turn % 2 else None) for turn, batch in enumerate(batches)]
        with ThreadPoolExecutor(2) as callers:
            results = list(callers.map(lambda batch: warm.embed(batch).vectors, mixed))

        for vectors, wanted in zip(results, expected, strict=True):
            assert cosines(vectors, wanted) > 0.999999

    def test_a_pass_that_did_not_wait_for_its_copy_would_be_seen(self, checkpoint: Checkpoint) -> None:
        """The host's streams do run beside each other: without the order, the batch before is computed once more."""
        backend = backend_of(checkpoint, WITHOUT)
        expected = backend.embed(batch_of(LENGTHS, seed=1)).vectors
        for _ in range(2):  # in both slots
            stale = backend.embed(batch_of(LENGTHS, seed=2)).vectors
        passes, computed = backend._passes, threading.Event()
        assert passes is not None
        real_run, real_copy = passes._program.run, passes._copies_in.run

        def run(*arguments: Any) -> None:
            real_run(*arguments)
            computed.set()

        passes._program.run = run  # type: ignore[method-assign]
        passes._passes.follow = lambda _mark: None  # type: ignore[method-assign]
        passes._copies_in.run = lambda work: real_copy(lambda: (computed.wait(30), work())[1])  # type: ignore[method-assign]

        vectors = backend.embed(batch_of(LENGTHS, seed=1)).vectors

        assert np.allclose(vectors, stale)
        assert not np.allclose(vectors, expected)


class TestFaults:
    def failing(self, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(backend._model, "forward", fail)

    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), DeviceOutOfMemory),
            (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceLost),
            (RuntimeError("shape mismatch"), RuntimeError),
        ],
    )
    def test_a_failed_pass_is_told_and_the_next_one_runs(
        self,
        checkpoint: Checkpoint,
        plain: TorchBackend,
        monkeypatch: pytest.MonkeyPatch,
        error: Exception,
        told: type[Exception],
    ) -> None:
        backend = backend_of(checkpoint, WITHOUT)
        with monkeypatch.context() as patch:
            self.failing(backend, patch, error)
            for _ in range(3):  # more often than there are slots
                with pytest.raises(told, match=str(error)[:30]):
                    backend.embed(batch_of(LENGTHS))

        assert cosines(backend.embed(batch_of(LENGTHS)).vectors, plain.embed(batch_of(LENGTHS)).vectors) > 0.999999

    def test_one_passes_failure_is_not_told_to_another(
        self, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = backend_of(checkpoint, WITHOUT)
        real, poison = backend._model.forward, batch_of([7])

        def forward(*arguments: Any, **inputs: Any) -> Any:
            if inputs["input_ids"].shape[-1] == 7:
                raise RuntimeError("shape mismatch")
            return real(*arguments, **inputs)

        monkeypatch.setattr(backend._model, "forward", forward)
        with ThreadPoolExecutor(2) as callers:
            bad = [callers.submit(backend.embed, poison if turn % 3 == 0 else batch_of(LENGTHS)) for turn in range(12)]

        for turn, future in enumerate(bad):
            assert (future.exception() is None) == (turn % 3 != 0)

    def test_what_fits_is_found_before_serving(self, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        """And said: the scheduler makes no larger batches."""
        backend = backend_of(checkpoint)
        real = backend._model.forward

        def forward(*arguments: Any, **inputs: Any) -> Any:
            if inputs["input_ids"].numel() > 1_500:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(*arguments, **inputs)

        monkeypatch.setattr(backend._model, "forward", forward)
        backend.warm_up(4_096)

        assert backend.report().batch_tokens_max == 512
        assert graphs_of(backend).failure == ""

    def test_a_device_too_small_for_one_text_ends_the_start(
        self, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = backend_of(checkpoint)
        self.failing(backend, monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))

        with pytest.raises(StartupError, match="failed: CUDA out of memory"):
            backend.warm_up(4_096)


class TestHotPath:
    def test_nothing_of_a_pass_gives_memory_back_or_stops_the_device(self) -> None:
        """``empty_cache`` is called by ``release_memory`` alone; a pass waits for its own mark."""
        folder = Path(cuda_device.__file__).parent
        for path in [*folder.glob("*.py"), folder.parent / "pooling.py", folder.parent / "dense.py"]:
            words = path.read_text()
            assert "empty_cache" not in words, path
            assert "cuda.synchronize(" not in words, path
            assert "cuda.graph(" not in words, path

    def test_memory_is_released_between_passes(self, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = backend_of(checkpoint, WITHOUT)
        held: list[bool] = []
        assert backend._passes is not None
        launching = backend._passes._launching
        monkeypatch.setattr(backend, "_device", torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(launching.locked()))

        backend.release_memory()

        assert held == [True]
