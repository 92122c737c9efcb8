"""Three kernels, one function: each token attends to its own row, through a window or not."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from embedserve.model.attention import States
from embedserve.model.cuda import rows_attention
from embedserve.model.cuda.inputs import FILLER, PassInputs
from embedserve.model.cuda.rows_attention import ReferenceRows, SegmentTiles, varlen_missing

PACKINGS = [[1], [12] * 30, [64, 1, 1, 63, 7], [128, 127, 2], [3] * 43, [40] * 9 + [1]]


def inputs_of(lengths: list[int], tokens: int, rows: int) -> PassInputs:
    """As ``InputLayout`` lays them out, in the order given."""
    total, missing = sum(lengths), rows - len(lengths)
    bounds = [*accumulate(lengths, initial=0)] + [total] * missing
    owners = [row for row, length in enumerate(lengths) for _ in range(length)] + [FILLER] * (tokens - total)
    nothing = torch.zeros(rows, dtype=torch.int32)
    return PassInputs(
        ids=torch.zeros(tokens, dtype=torch.int32),
        positions=torch.zeros(tokens, dtype=torch.int32),
        segments=torch.tensor(owners, dtype=torch.int32),
        cumulative=torch.tensor(bounds, dtype=torch.int32),
        starts=nothing,
        lengths=nothing,
        normalize=nothing,
        skip=None,
    )


def states_of(tokens: int, window: int | None = None, scaling: float | None = None) -> States:
    generator = torch.Generator().manual_seed(3)
    return States(*(torch.randn(tokens, 2, 8, generator=generator) for _ in range(3)), scaling, window)


def dense(states: States, lengths: list[int]) -> Tensor:
    """Every token against every token, with one mask: nothing in common with either kernel."""
    owners = torch.tensor([row for row, length in enumerate(lengths) for _ in range(length)])
    places = torch.arange(owners.size(0))
    mask = owners[:, None] == owners[None, :]
    if states.window is not None:
        mask &= (places[:, None] - places[None, :]).abs() <= states.window
    query, key, value = (part[: owners.size(0)].transpose(0, 1) for part in states[:3])
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=states.scaling).transpose(
        0, 1
    )


class TestKernels:
    @pytest.mark.parametrize("kernel", [SegmentTiles, ReferenceRows])
    @pytest.mark.parametrize("window", [None, 1, 5, 64])
    @pytest.mark.parametrize("lengths", PACKINGS)
    def test_each_token_sees_its_own_row(
        self, kernel: type[SegmentTiles | ReferenceRows], window: int | None, lengths: list[int]
    ) -> None:
        tokens = -(-sum(lengths) // 64) * 64 + 64
        states = states_of(tokens, window, 0.3)

        attended = kernel(inputs_of(lengths, tokens, len(lengths) + 3), max(lengths)).attend(states)

        assert attended.shape == states.query.shape
        torch.testing.assert_close(attended[: sum(lengths)], dense(states, lengths), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("kernel", [SegmentTiles, ReferenceRows])
    def test_filler_that_is_not_finite_reaches_no_row(self, kernel: type[SegmentTiles | ReferenceRows]) -> None:
        """A mask alone lets it through: 0 times NaN is NaN."""
        lengths = [12, 5, 30]
        states = states_of(64)
        for part in states[:3]:
            part[47:] = float("nan")

        attended = kernel(inputs_of(lengths, 64, 8), 128).attend(states)

        torch.testing.assert_close(attended[:47], dense(states, lengths), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("kernel", [SegmentTiles, ReferenceRows])
    def test_a_pass_without_rows_runs(self, kernel: type[SegmentTiles | ReferenceRows]) -> None:
        """That is what a graph is captured with."""
        assert kernel(inputs_of([], 64, 8), 128).attend(states_of(64)).shape == (64, 2, 8)

    def test_the_reference_refuses_a_row_that_the_kernel_would_cut(self) -> None:
        with pytest.raises(AssertionError, match="longer than what the pass was captured for"):
            ReferenceRows(inputs_of([20], 64, 8), 19).attend(states_of(64))

    @pytest.mark.parametrize("length", [1, 12, 64, 128])
    def test_rows_of_a_mask_are_aligned(self, length: int) -> None:
        """The kernels that take one copy it otherwise, in every layer."""
        tiles = SegmentTiles(inputs_of([length], 128, 8), length)

        assert tiles._mask(None).shape[-1] % 16 == 0
        assert tiles._mask(3).shape[-1] % 16 == 0


class TestVarlen:
    def test_this_torch_has_the_kernel_with_every_argument(self) -> None:
        assert varlen_missing() is None

    def test_a_torch_without_an_argument_is_told_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """torch 2.10 has ``is_causal`` and neither of these."""

        def older(query: Tensor, *, is_causal: bool = False) -> Tensor:
            return query

        monkeypatch.setattr(rows_attention, "_varlen_attn", lambda: older)

        assert varlen_missing() == "this torch's kernel for packed rows does not take scale and window_size"

    def test_a_torch_without_the_kernel_is_told_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none() -> None:
            raise ImportError("no module named varlen")

        monkeypatch.setattr(rows_attention, "_varlen_attn", none)

        assert varlen_missing() == "this torch has no kernel for packed rows: no module named varlen"

    def test_the_kernel_is_called_as_its_signature_says(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What can be seen of it without a GPU: torch's own checks of the arguments, with shapes alone."""
        given = inputs_of([12, 5], 64, 8)
        with FakeTensorMode(allow_non_fake_inputs=True):
            states = States(*(torch.empty(64, 2, 8, dtype=torch.bfloat16) for _ in range(3)), 0.5, 7)
            attended = rows_attention.VarlenRows(given, 128).attend(states)

        assert attended.shape == (64, 2, 8)
        assert attended.dtype is torch.bfloat16
