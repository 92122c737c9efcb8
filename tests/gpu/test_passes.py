"""Packed passes on a real device: the kernel, the capture, the device's own order and its memory."""

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedserve.model.backend import DeviceOutOfMemory
from embedserve.model.checkpoint import Checkpoint, load_checkpoint
from embedserve.model.cuda.accelerator import CannotCapture
from embedserve.model.cuda.device import CudaAccelerator
from embedserve.model.cuda.settings import CudaSettings, GraphSettings
from embedserve.model.torch_backend import TorchBackend
from tests.unit.model.batches import LENGTHS, batch_of, cosines
from tests.unit.model.checkpoints import PACKED, save_checkpoint, save_encoder
from tests.unit.model.cuda.packed import GRAPHS, TOKENS_MAX, graphs_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")

FILLER_ID = 4
"""No batch of these tests has it."""
COSINE_MIN = {"float16": 0.9999, "bfloat16": 0.995}
"""A random model of 32 floats is much coarser than a real one; the mark of 0.999 is ``loadtest.gpu``'s."""


def backend_of(
    checkpoint: Checkpoint, graphs: GraphSettings = GRAPHS, dtype: str = "float16", **cuda: Any
) -> TorchBackend:
    return TorchBackend(checkpoint, device="cuda:0", dtype=dtype, cuda=CudaSettings(graphs=graphs, **cuda))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(str(save_checkpoint(tmp_path_factory.mktemp("bert"))))


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> TorchBackend:
    """Float32 on the CPU: what all else is compared with."""
    return TorchBackend(checkpoint, dtype="float32", threads=2)


@pytest.fixture(scope="module")
def warm(checkpoint: Checkpoint) -> TorchBackend:
    backend = backend_of(checkpoint)
    backend.warm_up(TOKENS_MAX)
    return backend


class TestParity:
    @pytest.mark.parametrize("tiles", [0, 128])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("architecture", PACKED)
    def test_every_architecture_in_any_packing(self, tmp_path: Path, architecture: str, dtype: str, tiles: int) -> None:
        loaded = load_checkpoint(str(save_encoder(tmp_path, architecture)))
        model = TorchBackend(loaded, dtype="float32", threads=2)
        backend = backend_of(loaded, dtype=dtype, tiles_length_max=tiles)
        assert backend._passes is not None
        backend._passes.prepare(TOKENS_MAX)

        assert graphs_of(backend).failure == ""
        for lengths in (LENGTHS, [5] * 9, [128], [64, 64], [1] * 16, [100, 1]):
            batch = batch_of(lengths, seed=len(lengths))
            assert cosines(backend.embed(batch).vectors, model.embed(batch).vectors) > COSINE_MIN[dtype]
        assert graphs_of(backend).hits == 6

    @pytest.mark.parametrize("modes", [["mean"], ["cls"], ["lasttoken"], ["max"], ["weightedmean"]])
    def test_every_pooling_is_captured(self, tmp_path: Path, modes: list[str]) -> None:
        loaded = load_checkpoint(str(save_checkpoint(tmp_path, pooling=modes, include_prompt=False)))
        model = TorchBackend(loaded, dtype="float32", threads=2, control_tokens=("[SEP]",))
        backend = TorchBackend(
            loaded, device="cuda:0", dtype="float16", cuda=CudaSettings(graphs=GRAPHS), control_tokens=("[SEP]",)
        )
        backend.warm_up(TOKENS_MAX)
        batch = batch_of(LENGTHS, skip=np.array([1, 2, 0, 9, 5, 0, 1, 0], np.int32))

        assert graphs_of(backend).failure == ""
        assert cosines(backend.embed(batch).vectors, model.embed(batch).vectors) > COSINE_MIN["float16"]

    def test_float32_is_served_padded(self, checkpoint: Checkpoint, plain: TorchBackend) -> None:
        backend = backend_of(checkpoint, dtype="float32")
        backend.warm_up(TOKENS_MAX)

        assert not backend.report().packed
        assert cosines(backend.embed(batch_of(LENGTHS)).vectors, plain.embed(batch_of(LENGTHS)).vectors) > 0.9999

    def test_compiled_gives_the_same(self, checkpoint: Checkpoint, plain: TorchBackend) -> None:
        backend = backend_of(checkpoint, compiled=True)
        backend.warm_up(TOKENS_MAX)

        assert graphs_of(backend).failure == ""
        for lengths in (LENGTHS, [5] * 9, [128]):
            batch = batch_of(lengths)
            assert cosines(backend.embed(batch).vectors, plain.embed(batch).vectors) > COSINE_MIN["float16"]


class TestFiller:
    @pytest.mark.parametrize("tiles", [0, 128])
    @pytest.mark.parametrize("enabled", [True, False])
    def test_filler_that_is_not_a_number_reaches_no_result(
        self, checkpoint: Checkpoint, plain: TorchBackend, tiles: int, enabled: bool
    ) -> None:
        backend = backend_of(checkpoint, dataclasses.replace(GRAPHS, enabled=enabled), tiles_length_max=tiles)
        passes = backend._passes
        assert passes is not None
        passes._places = dataclasses.replace(passes._places, filler_id=FILLER_ID)
        backend._model.get_input_embeddings().weight.data[FILLER_ID] = float("nan")
        passes.prepare(TOKENS_MAX)

        for lengths in (LENGTHS, [7], [128, 128, 1]):
            vectors = backend.embed(batch_of(lengths)).vectors
            assert np.isfinite(vectors).all()
            assert cosines(vectors, plain.embed(batch_of(lengths)).vectors) > COSINE_MIN["float16"]


class TestGraphs:
    def test_all_that_are_planned_are_captured(self, warm: TorchBackend) -> None:
        report = graphs_of(warm)

        assert report.failure == ""
        assert report.captured == report.planned > 0
        assert report.memory_bytes > 0

    def test_hits_and_misses_give_the_same(self, checkpoint: Checkpoint, plain: TorchBackend) -> None:
        backend = backend_of(checkpoint, GraphSettings(growth=1.5, rows_max=4, tokens_max=128))
        backend.warm_up(TOKENS_MAX)
        before = graphs_of(backend)

        for lengths in ([100, 20], [100, 100], [1] * 5):
            batch = batch_of(lengths)
            assert cosines(backend.embed(batch).vectors, plain.embed(batch).vectors) > COSINE_MIN["float16"]

        after = graphs_of(backend)
        assert (after.hits - before.hits, after.misses - before.misses) == (1, 2)

    def test_replayed_by_threads_that_did_not_capture(self, warm: TorchBackend, plain: TorchBackend) -> None:
        batches = [
            batch_of([(turn * 7 + row) % 60 + 1 for row in range(turn % 5 + 1)], seed=turn) for turn in range(200)
        ]
        with ThreadPoolExecutor(2) as callers:
            results = list(callers.map(lambda batch: warm.embed(batch).vectors, batches))

        for batch, vectors in zip(batches, results, strict=True):
            assert cosines(vectors, plain.embed(batch).vectors) > COSINE_MIN["float16"]

    def test_captured_beside_passes(self, checkpoint: Checkpoint, plain: TorchBackend) -> None:
        backend = backend_of(checkpoint, dataclasses.replace(GRAPHS, before_ready=False))
        backend.warm_up(TOKENS_MAX)
        ends = time.monotonic() + 60
        turn = 0
        while graphs_of(backend).captured < graphs_of(backend).planned and time.monotonic() < ends:
            batch = batch_of(LENGTHS, seed=turn)
            assert cosines(backend.embed(batch).vectors, plain.embed(batch).vectors) > COSINE_MIN["float16"]
            turn += 1

        assert graphs_of(backend).failure == ""
        assert graphs_of(backend).captured == graphs_of(backend).planned

    def test_what_cannot_be_captured_leaves_the_stream_usable(self) -> None:
        """Work that asks the device for a value: the capture refuses, and later work and captures go on."""
        accelerator = CudaAccelerator(torch.device("cuda", 0))
        stream = accelerator.stream()
        numbers = torch.arange(8, device="cuda:0")
        with pytest.raises(CannotCapture):
            stream.run(lambda: _discard(accelerator.capture(lambda: _discard(numbers.sum().item()))))
        total = torch.zeros((), dtype=torch.int64, device="cuda:0")

        stream.run(lambda: _discard(total.copy_(numbers.sum())))
        stream.mark().wait()

        assert int(total) == 28


class TestOverlap:
    def test_no_pass_stops_the_host_before_its_end(self, warm: TorchBackend) -> None:
        """Torch's own watch raises where a call waits for the device; a mark's ``wait`` is not among them."""
        batches = [batch_of(LENGTHS), batch_of([100] * 17)]  # replayed, and too many rows for a graph
        for batch in batches:
            warm.embed(batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches:
                warm.embed(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_staging_is_pinned(self, warm: TorchBackend) -> None:
        assert warm._passes is not None
        slot = warm._passes._slots.get()
        warm._passes._slots.put(slot)

        assert slot.host_inputs.is_pinned()
        assert slot.host_vectors.is_pinned()

    def test_marks_of_a_pass_are_in_order(self, warm: TorchBackend) -> None:
        times = dataclasses.astuple(warm.embed(batch_of(LENGTHS)).times)

        assert list(times) == sorted(times)
        assert times[3] > times[2]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one CUDA device")
class TestSecondDevice:
    def test_it_works_on_its_own_gpu_alone(self, checkpoint: Checkpoint, plain: TorchBackend) -> None:
        """From threads whose current device was the first: graphs, staging and timing are the second's."""
        before = torch.cuda.memory_reserved(0)
        backend = TorchBackend(checkpoint, device="cuda:1", dtype="float16", cuda=CudaSettings(graphs=GRAPHS))
        batch = batch_of(LENGTHS)
        with ThreadPoolExecutor(1) as other:
            other.submit(backend.warm_up, TOKENS_MAX).result()
            packed = other.submit(backend.embed, batch).result()
            padded = other.submit(backend.embed, batch_of(LENGTHS, pad_to=max(LENGTHS))).result()
        for result in (packed, padded):
            assert cosines(result.vectors, plain.embed(batch).vectors) > COSINE_MIN["float16"]
        assert backend.identity.device == "cuda:1"
        assert torch.cuda.memory_reserved(0) == before


class TestMemory:
    @pytest.fixture
    def _little(self) -> Iterator[None]:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + (64 << 20)) / total)
        yield
        torch.cuda.set_per_process_memory_fraction(1.0)

    @pytest.mark.usefixtures("_little")
    def test_out_of_memory_is_told_and_the_next_pass_runs(self, checkpoint: Checkpoint, plain: TorchBackend) -> None:
        backend = backend_of(checkpoint, dataclasses.replace(GRAPHS, enabled=False))
        with pytest.raises(DeviceOutOfMemory):
            backend.embed(batch_of([128] * 8192))
        backend.release_memory()

        assert cosines(backend.embed(batch_of(LENGTHS)).vectors, plain.embed(batch_of(LENGTHS)).vectors) > 0.999

    @pytest.mark.usefixtures("_little")
    def test_what_fits_is_found_at_warm_up(self, checkpoint: Checkpoint) -> None:
        backend = backend_of(checkpoint, dataclasses.replace(GRAPHS, enabled=False))
        backend.warm_up(1 << 20)

        assert 128 <= backend.report().batch_tokens_max < 1 << 20


def _discard(_value: Any) -> None:
    """For work that must give nothing."""
