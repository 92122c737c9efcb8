"""The packed path of a GPU on the CPU: everything but the kernel and the capture itself.

The host's accelerator runs each stream in a thread of its own and replays on buffers that stay, so that a wrong order,
a buffer that is used too early and a pass that is not filled up show as wrong vectors.
"""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from embedserve.errors import StartupError
from embedserve.model.backend import DeviceLost, DeviceOutOfMemory, GraphReport, TokenBatch
from embedserve.model.checkpoint import Checkpoint, load_checkpoint
from embedserve.model.cuda import device as cuda_device
from embedserve.model.cuda import passes as passes_module
from embedserve.model.cuda.accelerator import CannotCapture
from embedserve.model.cuda.host import HostAccelerator, HostRecording
from embedserve.model.cuda.inputs import PassInputs
from embedserve.model.cuda.program import Program
from embedserve.model.cuda.settings import CudaSettings, GraphSettings
from embedserve.model.torch_backend import TorchBackend
from tests.unit.model.checkpoints import PACKED, VOCAB_SIZE, save_checkpoint, save_encoder

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


class TestParity:
    @pytest.mark.parametrize("tiles", [0, 128])
    @pytest.mark.parametrize("architecture", PACKED)
    def test_every_architecture_gives_the_models_own_vectors(
        self, tmp_path: Path, architecture: str, tiles: int
    ) -> None:
        """In any packing, replayed or not, by either kernel; sliding layers and positions with an offset among them."""
        loaded = load_checkpoint(str(save_encoder(tmp_path, architecture)))
        backend = backend_of(loaded, GraphSettings(growth=2, rows_max=16), tiles=tiles)
        model = TorchBackend(loaded, dtype="float32", threads=1)
        assert backend._passes is not None
        backend._passes.prepare(256)

        for lengths in (LENGTHS, [5] * 9, [128], [64, 64], [300 - 200, 1]):
            batch = batch_of(lengths, seed=len(lengths))
            assert cosines(backend.embed(batch).vectors, model.embed(batch).vectors) > 0.999999
        report = graphs_of(backend)
        assert report.failure == ""
        assert report.captured == report.planned > 0
        assert report.hits == 5
        assert report.misses == 0

    def test_any_packing_gives_the_same_vectors(self, warm: TorchBackend) -> None:
        together = warm.embed(batch_of(LENGTHS)).vectors
        batch = batch_of(LENGTHS)
        rng = np.random.default_rng(1)

        for _ in range(12):
            chosen = rng.permutation(len(LENGTHS))[: int(rng.integers(1, len(LENGTHS) + 1))]
            assert cosines(warm.embed(batch.rows(chosen)).vectors, together[chosen]) > 0.999999

    @pytest.mark.parametrize("modes", [["cls"], ["lasttoken"], ["max"], ["weightedmean"], ["mean", "cls"]])
    def test_every_pooling_ignores_what_fills_a_pass_up(self, tmp_path: Path, modes: list[str]) -> None:
        loaded = load_checkpoint(str(save_checkpoint(tmp_path, pooling=modes)))
        backend, model = backend_of(loaded), TorchBackend(loaded, dtype="float32", threads=1)
        backend.warm_up(TOKENS_MAX)

        vectors = backend.embed(batch_of(LENGTHS)).vectors

        assert graphs_of(backend).misses == graphs_of(backend_of(loaded)).misses
        assert cosines(vectors, model.embed(batch_of(LENGTHS)).vectors) > 0.999999

    def test_rows_that_are_not_normalised_stay_so(self, warm: TorchBackend, plain: TorchBackend) -> None:
        chosen = np.array([row % 2 == 0 for row in range(len(LENGTHS))])
        batch = dataclasses.replace(batch_of(LENGTHS), normalize=chosen)

        np.testing.assert_allclose(warm.embed(batch).vectors, plain.embed(batch).vectors, atol=1e-5)

    def test_control_tokens_are_left_out_within_the_graph(self, checkpoint: Checkpoint) -> None:
        backend = backend_of(checkpoint, control_tokens=("[SEP]",))
        model = TorchBackend(checkpoint, dtype="float32", threads=1, control_tokens=("[SEP]",))
        backend.warm_up(TOKENS_MAX)
        batch = batch_of(LENGTHS)
        batch.ids[::3] = checkpoint.token_ids(("[SEP]",))[0]
        before = graphs_of(backend).hits

        assert cosines(backend.embed(batch).vectors, model.embed(batch).vectors) > 0.999999
        assert graphs_of(backend).hits == before + 1

    def test_a_batch_that_skips_runs_without_a_graph_that_does_not_look(
        self, warm: TorchBackend, plain: TorchBackend
    ) -> None:
        batch = batch_of(LENGTHS, skip=SKIP)
        before = graphs_of(warm)

        assert cosines(warm.embed(batch).vectors, plain.embed(batch).vectors) > 0.999999
        assert (graphs_of(warm).hits, graphs_of(warm).misses) == (before.hits, before.misses + 1)

    def test_a_checkpoint_that_skips_prompts_has_graphs_that_look(self, tmp_path: Path) -> None:
        loaded = load_checkpoint(str(save_checkpoint(tmp_path, include_prompt=False)))
        backend, model = backend_of(loaded), TorchBackend(loaded, dtype="float32", threads=1)
        backend.warm_up(TOKENS_MAX)
        before = graphs_of(backend)

        for batch in (batch_of(LENGTHS, skip=SKIP), batch_of(LENGTHS)):
            assert cosines(backend.embed(batch).vectors, model.embed(batch).vectors) > 0.999999
        assert (graphs_of(backend).hits, graphs_of(backend).misses) == (before.hits + 2, before.misses)

    def test_stages_follow_each_other(self, warm: TorchBackend) -> None:
        times = dataclasses.astuple(warm.embed(batch_of(LENGTHS)).times)

        assert list(times) == sorted(times)
        assert times[-1] > times[0]

    def test_next_pass_leaves_an_earlier_result_alone(self, warm: TorchBackend) -> None:
        first = warm.embed(batch_of(LENGTHS)).vectors
        kept = first.copy()

        warm.embed(batch_of(LENGTHS, seed=9))

        assert first.flags.owndata
        assert np.array_equal(first, kept)


class TestFiller:
    def test_nothing_that_fills_a_pass_up_reaches_a_result(
        self, checkpoint: Checkpoint, plain: TorchBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tokens of no row and rows without tokens are NaN from the embedding to the vectors."""
        real_forward = torch.nn.Embedding.forward
        poisoned: list[int] = []
        owners: list[Tensor] = []
        real_run = Program.run

        def run(self: Program, inputs: PassInputs, length_max: int, out: Tensor) -> None:
            owners.append(inputs.segments)
            real_run(self, inputs, length_max, out)
            out[int((inputs.lengths > 0).sum()) :] = float("nan")

        def poison(self: torch.nn.Embedding, ids: Tensor) -> Tensor:
            result = real_forward(self, ids)
            if owners and ids.shape[-1] == owners[-1].shape[0]:
                filler = owners[-1] < 0
                poisoned.append(int(filler.sum()))
                result[0, filler] = float("nan")
            return result

        monkeypatch.setattr(Program, "run", run)
        monkeypatch.setattr(torch.nn.Embedding, "forward", poison)
        for tiles in (0, 128):
            backend = backend_of(checkpoint, tiles=tiles)
            assert backend._passes is not None
            backend._passes.prepare(TOKENS_MAX)
            poisoned.clear()
            vectors = backend.embed(batch_of(LENGTHS)).vectors
            owners.clear()

            assert max(poisoned) > 0
            assert np.isfinite(vectors).all()
            assert cosines(vectors, plain.embed(batch_of(LENGTHS)).vectors) > 0.999999


class TestGraphs:
    def test_hits_and_misses_are_counted(self, checkpoint: Checkpoint) -> None:
        backend = backend_of(checkpoint, GraphSettings(growth=1.5, rows_max=4, tokens_max=128))
        assert backend._passes is not None
        backend._passes.prepare(TOKENS_MAX)

        backend.embed(batch_of([100, 20]))
        backend.embed(batch_of([100, 100]))
        backend.embed(batch_of([1] * 5))

        assert (graphs_of(backend).hits, graphs_of(backend).misses) == (1, 2)

    def test_without_graphs_every_pass_runs_and_none_is_counted(
        self, checkpoint: Checkpoint, plain: TorchBackend
    ) -> None:
        backend = backend_of(checkpoint, WITHOUT)
        backend.warm_up(TOKENS_MAX)

        assert cosines(backend.embed(batch_of(LENGTHS)).vectors, plain.embed(batch_of(LENGTHS)).vectors) > 0.999999
        assert graphs_of(backend) == GraphReport()

    def test_a_key_is_captured_with_the_longest_length_of_its_class(
        self, warm: TorchBackend, plain: TorchBackend
    ) -> None:
        """One graph, a short batch first: the longest length of the batch that came first is not in it."""
        for lengths in ([70, 70, 70], [100, 100, 10], [3, 127, 80], [128, 64, 18]):
            assert cosines(warm.embed(batch_of(lengths)).vectors, plain.embed(batch_of(lengths)).vectors) > 0.999999

    def test_largest_first_into_one_memory(self, checkpoint: Checkpoint) -> None:
        order: list[int] = []

        class Watching(HostAccelerator):
            def capture(self, work: Callable[[], None]) -> HostRecording:
                recording = super().capture(work)
                order.append(sizes[-1])
                return recording

        sizes: list[int] = []
        backend = backend_of(checkpoint, accelerator=Watching())
        assert backend._passes is not None
        real = backend._passes._program.run

        def run(inputs: PassInputs, length_max: int, out: Tensor) -> None:
            sizes.append(inputs.ids.shape[0])
            real(inputs, length_max, out)

        backend._passes._program.run = run  # type: ignore[method-assign]
        backend._passes.prepare(TOKENS_MAX)

        assert order[0] == TOKENS_MAX
        assert order == sorted(order, reverse=True)

    @pytest.mark.parametrize("error", [CannotCapture("not permitted"), torch.OutOfMemoryError("CUDA out of memory")])
    def test_what_cannot_be_captured_runs_without(
        self, checkpoint: Checkpoint, plain: TorchBackend, error: Exception
    ) -> None:
        """The graphs that there are stay in use; the reason is told."""

        class Limited(HostAccelerator):
            left = 3

            def capture(self, work: Callable[[], None]) -> HostRecording:
                self.left -= 1
                if self.left < 0:
                    raise error
                return super().capture(work)

        backend = backend_of(checkpoint, accelerator=Limited())
        backend.warm_up(TOKENS_MAX)
        before = graphs_of(backend)

        small, large = batch_of([3]), batch_of([128] * 4)
        for batch in (small, large):
            assert cosines(backend.embed(batch).vectors, plain.embed(batch).vectors) > 0.999999

        after = graphs_of(backend)
        assert (after.hits - before.hits, after.misses - before.misses) == (1, 1)
        assert after.captured == 3
        assert str(error) in after.failure
        assert f"nor for the {after.planned - 4} shapes after it" in after.failure

    def test_captured_beside_a_server_that_serves(
        self, checkpoint: Checkpoint, plain: TorchBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Passes run without until then, and what they left in the buffers harms no capture."""
        monkeypatch.setattr(passes_module, "CAPTURE_PAUSE_S", 0.001)
        gate, made = threading.Semaphore(2), threading.Semaphore(0)

        class Slow(HostAccelerator):
            def capture(self, work: Callable[[], None]) -> HostRecording:
                gate.acquire()
                recording = super().capture(work)
                made.release()
                return recording

        backend = backend_of(checkpoint, dataclasses.replace(GRAPHS, before_ready=False), accelerator=Slow())
        assert backend._passes is not None
        backend._passes.prepare(TOKENS_MAX)
        planned = graphs_of(backend).planned
        expected = plain.embed(batch_of([128] * 4)).vectors
        for _ in range(2):
            made.acquire()
        gate.release(planned)
        for turn in range(planned - 2):
            made.acquire()
            batch = batch_of([128] * 4, seed=turn % 2)
            vectors = backend.embed(batch).vectors
            if turn % 2 == 0:
                assert cosines(vectors, expected) > 0.999999

        assert graphs_of(backend).failure == ""
        assert graphs_of(backend).captured >= planned - 1
        assert graphs_of(backend).capture_s > 0

    def test_graphs_that_give_other_vectors_end_the_start(self, checkpoint: Checkpoint) -> None:
        class Stale(HostAccelerator):
            """Replays nothing: the vectors of the capture stay in the buffer."""

            def capture(self, work: Callable[[], None]) -> HostRecording:
                super().capture(work)
                return HostRecording(lambda: None)

        with pytest.raises(StartupError, match=r"CUDA graphs give other vectors|not finite"):
            backend_of(checkpoint, accelerator=Stale()).warm_up(TOKENS_MAX)


class TestOverlap:
    def test_two_passes_at_once(self, warm: TorchBackend, plain: TorchBackend) -> None:
        """Each caller gets its own vectors, whatever the other one does."""
        assert warm.passes_at_once == 2
        batches = [batch_of([(turn * 7 + row) % 60 + 1 for row in range(turn % 5 + 1)], turn) for turn in range(40)]
        with ThreadPoolExecutor(2) as callers:
            results = list(callers.map(lambda batch: warm.embed(batch).vectors, batches))

        for batch, vectors in zip(batches, results, strict=True):
            assert cosines(vectors, plain.embed(batch).vectors) > 0.999999

    def test_the_next_batch_is_copied_in_beside_the_pass(self, checkpoint: Checkpoint) -> None:
        """And its pass does not begin, nor its buffer change, before the first one is through."""
        backend = backend_of(checkpoint, WITHOUT)
        passes = backend._passes
        assert passes is not None
        expected = [backend.embed(batch_of(LENGTHS, seed)).vectors for seed in (1, 2)]
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
            first = callers.submit(backend.embed, batch_of(LENGTHS, 1))
            assert entered.wait(30)
            second = callers.submit(backend.embed, batch_of(LENGTHS, 2))
            assert copied.wait(30)
            assert not first.done()
            assert not second.done()
            go_on.set()

            np.testing.assert_array_equal(first.result().vectors, expected[0])
            np.testing.assert_array_equal(second.result().vectors, expected[1])

    def test_a_padded_pass_waits_for_the_packed_ones(self, warm: TorchBackend) -> None:
        """It sets the model's attention, which a packed pass reads in every layer."""
        batches = [batch_of(LENGTHS, seed) for seed in range(8)]
        expected = [warm.embed(batch).vectors for batch in batches]
        mixed = [dataclasses.replace(batch, pad_to=128 if turn % 2 else None) for turn, batch in enumerate(batches)]
        with ThreadPoolExecutor(2) as callers:
            results = list(callers.map(lambda batch: warm.embed(batch).vectors, mixed))

        for vectors, wanted in zip(results, expected, strict=True):
            assert cosines(vectors, wanted) > 0.999999

    def test_a_pass_that_did_not_wait_for_its_copy_would_be_seen(self, checkpoint: Checkpoint) -> None:
        """The host's streams do run beside each other: without the order, the batch before is computed once more."""
        backend = backend_of(checkpoint, WITHOUT)
        expected = backend.embed(batch_of(LENGTHS, 1)).vectors
        for _ in range(2):  # in both slots
            stale = backend.embed(batch_of(LENGTHS, 2)).vectors
        passes, computed = backend._passes, threading.Event()
        assert passes is not None
        real_run, real_copy = passes._program.run, passes._copies_in.run

        def run(*arguments: Any) -> None:
            real_run(*arguments)
            computed.set()

        passes._program.run = run  # type: ignore[method-assign]
        passes._passes.follow = lambda _mark: None  # type: ignore[method-assign]
        passes._copies_in.run = lambda work: real_copy(lambda: (computed.wait(30), work())[1])  # type: ignore[method-assign]

        vectors = backend.embed(batch_of(LENGTHS, 1)).vectors

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
