"""The packed path of a GPU on the CPU: everything but the kernel and the capture itself.

The host's accelerator runs each stream in a thread of its own and replays on buffers that stay, so that a wrong order,
a buffer that is used too early and a pass that is not filled up show as wrong vectors.
"""

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from embedserve.errors import StartupError
from embedserve.model.backend import GraphReport
from embedserve.model.checkpoint import Checkpoint, load_checkpoint
from embedserve.model.cuda import passes as passes_module
from embedserve.model.cuda import program as program_module
from embedserve.model.cuda.accelerator import CannotCapture
from embedserve.model.cuda.host import HostAccelerator, HostRecording
from embedserve.model.cuda.inputs import PassInputs
from embedserve.model.cuda.program import Program
from embedserve.model.cuda.rows_attention import SegmentTiles
from embedserve.model.cuda.settings import GraphSettings
from embedserve.model.torch_backend import TorchBackend
from tests.unit.model.batches import LENGTHS, batch_of, cosines
from tests.unit.model.checkpoints import PACKED, save_checkpoint, save_encoder
from tests.unit.model.cuda.packed import GRAPHS, SKIP, TOKENS_MAX, WITHOUT, backend_of, graphs_of


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


class TestTiles:
    @pytest.mark.parametrize("tiles", [16, 64])
    def test_short_passes_have_graphs_of_their_own_with_tiles(
        self, checkpoint: Checkpoint, plain: TorchBackend, monkeypatch: pytest.MonkeyPatch, tiles: int
    ) -> None:
        """Those of longer rows have none, though their class would begin below: the setting is a class of lengths."""
        made: list[int] = []

        class Counted(SegmentTiles):
            def __init__(self, inputs: PassInputs, length_max: int) -> None:
                made.append(length_max)
                super().__init__(inputs, length_max)

        monkeypatch.setattr(program_module, "SegmentTiles", Counted)
        backend = backend_of(checkpoint, tiles=tiles)
        assert backend._passes is not None
        backend._passes.prepare(TOKENS_MAX)
        for lengths, tiled in (([tiles, 3, 1], [tiles]), ([5] * 9, [tiles]), ([tiles + 1, 3], []), ([100], [])):
            made.clear()
            batch = batch_of(lengths)
            assert cosines(backend.embed(batch).vectors, plain.embed(batch).vectors) > 0.999999
            assert made == tiled
        assert (graphs_of(backend).hits, graphs_of(backend).misses) == (4, 0)


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

    def test_what_is_captured_beside_a_server_serves_only_once_it_has_given_the_passes_vectors(
        self, checkpoint: Checkpoint, plain: TorchBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The third replays nothing: it is told, no text gets its vectors, and what was proven before stays in use."""
        monkeypatch.setattr(passes_module, "CAPTURE_PAUSE_S", 0.001)

        class Stale(HostAccelerator):
            left = 3

            def capture(self, work: Callable[[], None]) -> HostRecording:
                recording = super().capture(work)
                self.left -= 1
                return recording if self.left else HostRecording(lambda: None)

        backend = backend_of(checkpoint, dataclasses.replace(GRAPHS, before_ready=False), accelerator=Stale())
        backend.warm_up(TOKENS_MAX)
        for thread in threading.enumerate():
            if thread.name == "embedserve-capture":
                thread.join(30)

        report = graphs_of(backend)
        assert report.captured == 2
        assert "other vectors" in report.failure
        assert f"nor for the {report.planned - 3} shapes after it" in report.failure
        for lengths in ([128] * 4, LENGTHS, [3], [7] * 9):
            assert cosines(backend.embed(batch_of(lengths)).vectors, plain.embed(batch_of(lengths)).vectors) > 0.999999
        assert graphs_of(backend).hits == report.hits + 1

    def test_graphs_that_give_other_vectors_end_the_start(self, checkpoint: Checkpoint) -> None:
        class Stale(HostAccelerator):
            """Replays nothing: the vectors of the capture stay in the buffer."""

            def capture(self, work: Callable[[], None]) -> HostRecording:
                super().capture(work)
                return HostRecording(lambda: None)

        with pytest.raises(StartupError, match=r"CUDA graphs give other vectors|not finite"):
            backend_of(checkpoint, accelerator=Stale()).warm_up(TOKENS_MAX)
