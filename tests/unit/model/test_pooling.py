"""Pooling has sentence-transformers' arithmetic, and nothing but a row's own tokens reaches its vector."""

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling as ReferencePooling
from torch import Tensor

from embedserve.model.pipeline import PoolingSpec
from embedserve.model.pooling import Pooling, Segments

REFERENCE = {
    "cls": "cls",
    "last_token": "lasttoken",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
    "weighted_mean": "weightedmean",
}
MODES = [*((mode,) for mode in REFERENCE), ("mean", "cls"), ("max", "last_token", "weighted_mean"), tuple(REFERENCE)]
LENGTHS = [5, 1, 9, 3, 9, 2]
HIDDEN = 6


def segments_of(lengths: list[int], skip: list[int] | None = None, ids: Tensor | None = None) -> Segments:
    sizes = torch.tensor(lengths)
    return Segments(
        ids=torch.arange(int(sizes.sum())) if ids is None else ids,
        starts=torch.cumsum(sizes, 0) - sizes,
        lengths=sizes,
        rows=torch.repeat_interleave(torch.arange(len(lengths)), sizes),
        skip=None if skip is None else torch.tensor(skip),
    )


def tokens(lengths: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sum(lengths), HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def reference(modes: tuple[str, ...], hidden: Tensor, lengths: list[int], prompt: int | None = None) -> Tensor:
    """sentence-transformers on the same rows, padded with NaN-free zeros."""
    width = max(lengths)
    grid = torch.zeros(len(lengths), width, HIDDEN, dtype=hidden.dtype)
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    grid[mask] = hidden
    module = ReferencePooling(HIDDEN, pooling_mode=[REFERENCE[mode] for mode in modes], include_prompt=prompt is None)
    features = {"token_embeddings": grid, "attention_mask": mask.long()}
    if prompt is not None:
        features["prompt_length"] = prompt
    pooled: Tensor = module(features)["sentence_embedding"]
    return pooled.float()


@pytest.mark.parametrize("modes", MODES, ids="+".join)
class TestArithmetic:
    def test_is_that_of_sentence_transformers(self, modes: tuple[str, ...]) -> None:
        hidden = tokens(LENGTHS)

        pooled = Pooling(PoolingSpec(modes))(hidden, segments_of(LENGTHS))

        torch.testing.assert_close(pooled, reference(modes, hidden, LENGTHS), rtol=1e-6, atol=1e-6)

    def test_half_precision_is_summed_in_float32(self, modes: tuple[str, ...]) -> None:
        hidden = tokens(LENGTHS, torch.bfloat16)

        pooled = Pooling(PoolingSpec(modes))(hidden, segments_of(LENGTHS))

        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled, reference(modes, hidden, LENGTHS), rtol=1e-2, atol=1e-2)

    def test_prompt_is_left_out_as_sentence_transformers_leaves_it_out(self, modes: tuple[str, ...]) -> None:
        lengths = [5, 4, 9, 3, 9, 4]
        hidden = tokens(lengths)

        pooled = Pooling(PoolingSpec(modes))(hidden, segments_of(lengths, skip=[2] * 6))

        torch.testing.assert_close(pooled, reference(modes, hidden, lengths, prompt=2), rtol=1e-6, atol=1e-6)

    def test_neighbours_do_not_change_a_row(self, modes: tuple[str, ...]) -> None:
        """To the last bit, even where a neighbour is NaN."""
        hidden = tokens(LENGTHS)
        pooling = Pooling(PoolingSpec(modes))
        poisoned = hidden.clone()
        poisoned[6:15] = float("nan")

        together = pooling(poisoned, segments_of(LENGTHS))

        alone = pooling(hidden[:5], segments_of(LENGTHS[:1]))
        assert torch.equal(together[0], alone[0])
        assert torch.isnan(together[2]).all()
        assert torch.isfinite(together[[0, 1, 3, 4, 5]]).all()

    def test_row_that_is_all_prompt_is_pooled_whole(self, modes: tuple[str, ...]) -> None:
        """A vector of zeros would have no direction."""
        hidden = tokens([3])
        pooling = Pooling(PoolingSpec(modes))

        assert torch.equal(pooling(hidden, segments_of([3], skip=[3])), pooling(hidden, segments_of([3])))


class TestControlTokens:
    @pytest.mark.parametrize("mode", ["mean", "mean_sqrt_len", "weighted_mean"])
    def test_are_left_out_of_averages(self, mode: str) -> None:
        """The mean of a row with its control tokens masked is the mean without them."""
        hidden = tokens([5, 2])
        ids = torch.tensor([101, 7, 8, 101, 102, 101, 9])

        pooled = Pooling(PoolingSpec((mode,)), (101, 102))(hidden, segments_of([5, 2], ids=ids))

        kept = np.array([1, 2])
        weights = (kept + 1.0) if mode == "weighted_mean" else np.ones(2)
        divisor = {"mean": 2.0, "mean_sqrt_len": 2**0.5, "weighted_mean": weights.sum()}[mode]
        expected = (hidden[kept].numpy() * weights[:, None]).sum(axis=0) / divisor
        np.testing.assert_allclose(pooled[0].numpy(), expected, rtol=1e-6)

    @pytest.mark.parametrize("mode", ["cls", "last_token", "max"])
    def test_stay_where_nothing_is_averaged(self, mode: str) -> None:
        hidden = tokens([5, 2])
        ids = torch.tensor([101, 7, 8, 101, 102, 101, 9])
        segments = segments_of([5, 2], ids=ids)

        assert torch.equal(
            Pooling(PoolingSpec((mode,)), (101,))(hidden, segments), Pooling(PoolingSpec((mode,)))(hidden, segments)
        )

    def test_row_of_control_tokens_only_is_pooled_whole(self) -> None:
        hidden = tokens([2, 3])
        ids = torch.tensor([101, 102, 5, 6, 7])
        segments = segments_of([2, 3], ids=ids)

        pooled = Pooling(PoolingSpec(("mean",)), (101, 102))(hidden, segments)

        torch.testing.assert_close(pooled, Pooling(PoolingSpec(("mean",)))(hidden, segments))

    def test_prompt_and_control_tokens_are_both_left_out(self) -> None:
        hidden = tokens([5])
        ids = torch.tensor([101, 7, 8, 9, 102])

        pooled = Pooling(PoolingSpec(("mean",)), (101, 102))(hidden, segments_of([5], skip=[2], ids=ids))

        torch.testing.assert_close(pooled[0], hidden[2:4].mean(dim=0))
