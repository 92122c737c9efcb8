"""The backend's promises on a CPU: shapes, stages, neighbours, padding, faults, and the checks before serving."""

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embedserve.errors import StartupError
from embedserve.model.backend import DeviceLost, DeviceOutOfMemory, TokenBatch
from embedserve.model.checkpoint import Checkpoint, load_checkpoint
from embedserve.model.torch_backend import TorchBackend
from embedserve.model.warm_up import WarmUp
from tests.unit.model.batches import LENGTHS, batch_of, cosines
from tests.unit.model.checkpoints import HIDDEN, PACKED, VOCAB_SIZE, save_checkpoint, save_encoder

SHAPES = [None, 128]


def rows(batch: TokenBatch, chosen: list[int], pad_to: int | None) -> TokenBatch:
    """Some rows of ``batch`` as a batch of their own."""
    parts = [batch.ids[batch.offsets[row] : batch.offsets[row + 1]] for row in chosen]
    offsets = np.concatenate([[0], np.cumsum([part.size for part in parts])]).astype(np.int32)
    skip = None if batch.skip is None else batch.skip[chosen]
    return TokenBatch(np.concatenate(parts), offsets, batch.normalize[chosen], pad_to, skip)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(str(save_checkpoint(tmp_path_factory.mktemp("bert"))))


@pytest.fixture(scope="module")
def backend(checkpoint: Checkpoint) -> TorchBackend:
    return TorchBackend(checkpoint, dtype="float32", threads=2)


class TestEmbed:
    @pytest.mark.parametrize("pad_to", SHAPES)
    def test_gives_one_owned_row_each(self, backend: TorchBackend, pad_to: int | None) -> None:
        result = backend.embed(batch_of(LENGTHS, pad_to))

        assert result.vectors.shape == (len(LENGTHS), HIDDEN)
        assert result.vectors.dtype == np.float32
        assert result.vectors.flags.c_contiguous
        assert result.vectors.flags.owndata
        np.testing.assert_allclose(np.linalg.norm(result.vectors, axis=1), 1, rtol=1e-6)

    @pytest.mark.parametrize("pad_to", SHAPES)
    def test_stages_follow_each_other(self, backend: TorchBackend, pad_to: int | None) -> None:
        times = dataclasses.astuple(backend.embed(batch_of(LENGTHS, pad_to)).times)

        assert list(times) == sorted(times)
        assert times[3] > times[2]

    @pytest.mark.parametrize("pad_to", SHAPES)
    def test_normalises_the_rows_that_ask_for_it(self, backend: TorchBackend, pad_to: int | None) -> None:
        batch = batch_of(LENGTHS, pad_to)
        chosen = np.array([row % 2 == 0 for row in range(len(LENGTHS))])

        mixed = backend.embed(dataclasses.replace(batch, normalize=chosen)).vectors

        norms = np.linalg.norm(mixed, axis=1)
        np.testing.assert_allclose(norms[chosen], 1, rtol=1e-6)
        assert (np.abs(norms[~chosen] - 1) > 1e-3).all()
        np.testing.assert_allclose(mixed / norms[:, None], backend.embed(batch).vectors, atol=1e-6)

    @pytest.mark.parametrize("pad_to", SHAPES)
    def test_neighbours_do_not_change_a_vector(self, backend: TorchBackend, pad_to: int | None) -> None:
        """Alone, among any others, in any order: the same vector."""
        batch = batch_of(LENGTHS, pad_to)
        together = backend.embed(batch).vectors
        rng = np.random.default_rng(1)

        for row in range(len(LENGTHS)):
            assert cosines(backend.embed(rows(batch, [row], pad_to)).vectors, together[row : row + 1]) > 0.999999
        for _ in range(5):
            chosen = rng.permutation(len(LENGTHS))[: int(rng.integers(2, len(LENGTHS) + 1))].tolist()
            assert cosines(backend.embed(rows(batch, chosen, pad_to)).vectors, together[chosen]) > 0.999999

    @pytest.mark.parametrize("lengths", [LENGTHS, [5] * 9, [128], [9, 8, 7, 6, 5, 4, 3, 2, 1], list(range(1, 60))])
    def test_shapes_agree(self, backend: TorchBackend, lengths: list[int]) -> None:
        """Packed, padded to the longest and padded to the edge are one function."""
        batch = batch_of(lengths)
        packed = backend.embed(batch).vectors

        for pad_to in (max(lengths), 128):
            assert cosines(packed, backend.embed(dataclasses.replace(batch, pad_to=pad_to)).vectors) > 0.999999

    def test_next_pass_leaves_an_earlier_result_alone(self, backend: TorchBackend) -> None:
        first = backend.embed(batch_of(LENGTHS)).vectors
        kept = first.copy()

        backend.embed(batch_of(LENGTHS, seed=9))

        assert np.array_equal(first, kept)

    @pytest.mark.parametrize("pad_to", SHAPES)
    def test_id_outside_the_vocabulary_is_refused_by_row(self, backend: TorchBackend, pad_to: int | None) -> None:
        """On CUDA it would end the context, and with it the process."""
        batch = batch_of(LENGTHS, pad_to)
        batch.ids[50] = VOCAB_SIZE

        with pytest.raises(ValueError, match=f"row 3 has the token id {VOCAB_SIZE}, outside the vocabulary"):
            backend.embed(batch)


class TestPadding:
    def test_nan_in_pads_reaches_no_result(self, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """A multiplication by a mask would spread it: 0 times NaN is NaN."""
        batch = batch_of(LENGTHS, 128)
        expected = backend.embed(batch).vectors
        real_pass = backend._model.forward
        poisoned = 0

        def poison(*args: Any, **inputs: Any) -> Any:
            nonlocal poisoned
            result = real_pass(*args, **inputs)
            pads = ~inputs["attention_mask"].bool()
            poisoned += int(pads.sum())
            result.last_hidden_state = result.last_hidden_state.masked_fill(pads[..., None], float("nan"))
            return result

        monkeypatch.setattr(backend._model, "forward", poison)

        assert np.array_equal(backend.embed(batch).vectors, expected)
        assert poisoned == len(LENGTHS) * 128 - sum(LENGTHS)

    def test_text_that_spells_the_padding_token_is_attended_to(self, backend: TorchBackend) -> None:
        batch = batch_of([6, 6])
        batch.ids[6:] = batch.ids[:6]
        batch.ids[8] = 0

        vectors = backend.embed(batch).vectors

        assert cosines(vectors[:1], vectors[1:]) < 0.9999
        padded = backend.embed(dataclasses.replace(batch, pad_to=16)).vectors
        assert cosines(vectors, padded) > 0.999999


class TestSkipAndControl:
    @pytest.mark.parametrize("pad_to", SHAPES)
    def test_skip_leaves_leading_tokens_out(self, backend: TorchBackend, pad_to: int | None) -> None:
        """Both shapes leave out the same tokens, row by row."""
        skip = np.array([2, 5, 0, 1, 100, 0, 3, 2], np.int32)
        batch = batch_of(LENGTHS, pad_to, skip=skip)

        vectors = backend.embed(batch).vectors

        plain = backend.embed(dataclasses.replace(batch, skip=None)).vectors
        same = cosines(vectors[[2, 5, 6]], plain[[2, 5, 6]])
        assert same > 0.999999  # nothing skipped, or nothing would be left
        assert (np.sum(vectors * plain, axis=1)[[0, 1, 3, 4, 7]] < 0.9999).all()
        assert cosines(vectors, backend.embed(dataclasses.replace(batch, pad_to=None)).vectors) > 0.999999

    def test_control_tokens_are_left_out_in_both_shapes(self, checkpoint: Checkpoint, backend: TorchBackend) -> None:
        without = TorchBackend(checkpoint, dtype="float32", control_tokens=("[CLS]", "[SEP]"))
        batch = batch_of([6, 9])
        batch.ids[0] = batch.ids[6] = checkpoint.token_ids(["[CLS]"])[0]

        packed = without.embed(batch).vectors

        padded = without.embed(dataclasses.replace(batch, pad_to=128)).vectors
        assert cosines(packed, padded) > 0.999999
        skipped = backend.embed(dataclasses.replace(batch, skip=np.array([1, 1], np.int32))).vectors
        assert cosines(packed, skipped) > 0.999999

    def test_unknown_control_token_is_refused(self, checkpoint: Checkpoint) -> None:
        with pytest.raises(StartupError, match="has no token 'nope' in its vocabulary"):
            TorchBackend(checkpoint, control_tokens=("nope",))


class TestFaults:
    def failing(self, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(backend._model, "forward", fail)

    def test_out_of_memory_is_told_and_the_backend_stays_good(
        self, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            self.failing(backend, patch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
            with pytest.raises(DeviceOutOfMemory, match="Tried to allocate 2 GiB"):
                backend.embed(batch_of(LENGTHS))

        assert backend.embed(batch_of(LENGTHS)).vectors.shape == (len(LENGTHS), HIDDEN)

    def test_tensors_of_the_failed_pass_are_free_when_it_is_told(
        self, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first error's traceback would keep them, and a smaller pass would not fit either."""
        kept: list[weakref.ref[Tensor]] = []

        def fail(*_: Any, **inputs: Any) -> Any:
            kept.append(weakref.ref(inputs["input_ids"]))
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(backend._model, "forward", fail)
        gc.collect()
        gc.disable()
        try:
            with pytest.raises(DeviceOutOfMemory) as told:
                backend.embed(batch_of(LENGTHS, 128))
            assert kept[0]() is None
        finally:
            gc.enable()
        assert told.value.__context__ is None

    def test_lost_device_is_told(self, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing(backend, monkeypatch, RuntimeError("CUDA error: device-side assert triggered"))

        with pytest.raises(DeviceLost, match="device-side assert"):
            backend.embed(batch_of(LENGTHS))

    def test_other_errors_pass_unchanged(self, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """An item may have caused them: the engine looks for it."""
        self.failing(backend, monkeypatch, RuntimeError("shape mismatch"))

        with pytest.raises(RuntimeError, match=r"^shape mismatch$"):
            backend.embed(batch_of(LENGTHS))


class TestWarmUp:
    def test_healthy_model_passes(self, backend: TorchBackend) -> None:
        backend.warm_up(4_096)

    def test_smallest_budget_still_runs_a_pass(self, backend: TorchBackend) -> None:
        warm_up = WarmUp(backend.embed, backend.identity, packs=True, cosine_min=0.999)

        assert warm_up.rows(1) == [[3]]
        assert warm_up.rows(200) == [[3], [16], [64], [128], [3, 16, 64]]

    @pytest.mark.parametrize(
        ("poison", "sentence"),
        [
            (lambda hidden: hidden * float("nan"), "gave values that are not finite"),
            (lambda hidden: hidden[..., :-1], "gave the shape"),
            (
                lambda hidden: hidden + torch.arange(hidden.shape[0])[:, None, None] * 9,
                "packed and padded passes .* differ",
            ),
        ],
    )
    def test_wrong_passes_end_the_start(
        self, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch, poison: Any, sentence: str
    ) -> None:
        """The third poison shifts a padded batch's rows apart, as a mistaken attention mask would."""
        real_pass = backend._model.forward

        def poisoned(*args: Any, **inputs: Any) -> Any:
            result = real_pass(*args, **inputs)
            if result.last_hidden_state.shape[-1] == HIDDEN:
                result.last_hidden_state = poison(result.last_hidden_state)
            return result

        monkeypatch.setattr(backend._model, "forward", poisoned)

        with pytest.raises(StartupError, match=sentence):
            backend.warm_up(2_048)

    def test_pass_that_raises_ends_the_start(self, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(backend._model, "forward", fail)

        with pytest.raises(StartupError, match=r"a warm-up pass of rows of \[3\] tokens failed: CUDA out of memory"):
            backend.warm_up(2_048)


class TestEnd:
    def test_it_goes_with_its_last_reference(self, checkpoint: Checkpoint) -> None:
        """Weights and threads; nothing waits for the collector of cycles, which comes rarely in a server."""
        gc.disable()
        try:
            backend = TorchBackend(checkpoint, dtype="float32")
            backend.warm_up(64)
            gone = weakref.ref(backend)
            del backend
            assert gone() is None
        finally:
            gc.enable()


class TestAttention:
    @pytest.mark.parametrize("architecture", PACKED)
    def test_packed_is_padded_without_the_padding(self, tmp_path: Path, architecture: str) -> None:
        loaded = load_checkpoint(str(save_encoder(tmp_path, architecture)))
        backend = TorchBackend(loaded, dtype="float32")
        batch = batch_of([128, 127, 120, 100, 33, 32, 31, 9, 3, 3, 1])

        packed = backend.embed(batch).vectors

        assert backend.report().packed
        for pad_to in (None, 128):
            padded = TorchBackend(loaded, dtype="float32", attention="padded")
            assert not padded.report().packed
            assert cosines(packed, padded.embed(dataclasses.replace(batch, pad_to=pad_to)).vectors) > 0.999999

    def test_architecture_that_cannot_pack_says_so(self, tmp_path: Path) -> None:
        """MPNet's attention adds a bias made from a padded batch's positions."""
        loaded = load_checkpoint(str(save_encoder(tmp_path, "mpnet")))
        backend = TorchBackend(loaded, dtype="float32")

        assert not backend.report().packed
        batch = batch_of(LENGTHS)
        assert (
            cosines(backend.embed(batch).vectors, backend.embed(dataclasses.replace(batch, pad_to=128)).vectors)
            > 0.999999
        )
        with pytest.raises(StartupError, match="attention is set to packed, but mpnet has no packed form"):
            TorchBackend(loaded, attention="packed")

    def test_roberta_positions_skip_a_spelled_out_padding_token(self, tmp_path: Path) -> None:
        """As transformers counts them in the padded shape."""
        backend = TorchBackend(load_checkpoint(str(save_encoder(tmp_path, "roberta"))), dtype="float32")
        batch = batch_of([20, 9])
        batch.ids[[4, 5, 22]] = 1

        packed = backend.embed(batch).vectors

        assert cosines(packed, backend.embed(dataclasses.replace(batch, pad_to=128)).vectors) > 0.999999
