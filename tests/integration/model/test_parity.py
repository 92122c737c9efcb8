"""Vectors are those of sentence-transformers, for every architecture, pooling, dense layer and prompt, in any batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from torch import nn

from embedserve.model.backend import TokenBatch
from embedserve.model.checkpoint import Checkpoint, load_checkpoint
from embedserve.model.tokenizer import Truncation
from embedserve.model.torch_backend import TorchBackend
from tests.corpus import real_texts
from tests.unit.model.checkpoints import ARCHITECTURES, HIDDEN, save_checkpoint, save_encoder

Vectors = npt.NDArray[np.float32]

COSINE_MIN = {"float32": 0.99999, "bfloat16": 0.999}
POOLINGS: list[str | tuple[str, ...]] = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
POOLINGS += [("mean", "cls"), ("lasttoken", "max", "weightedmean")]
TEXTS = [*real_texts(24, 3), "", "a", "naïve café", "日本語のテキスト", "<pad> [PAD] </s> [SEP]", "hello " * 300]


def embed(
    backend: TorchBackend,
    checkpoint: Checkpoint,
    texts: Sequence[str],
    *,
    pad_to: int | None,
    prompt: str = "",
    normalize: bool | None = None,
) -> Vectors:
    """What the engine does with one batch of texts."""
    encoded = checkpoint.tokenizer().encode(texts, truncation=Truncation.END, prompt=prompt)
    offsets = np.concatenate([[0], np.cumsum(encoded.lengths)]).astype(np.int32)
    scaled = checkpoint.pipeline.normalize if normalize is None else normalize
    skip = None if checkpoint.include_prompt else np.full(len(texts), encoded.prompt_tokens, np.int32)
    return backend.embed(TokenBatch(encoded.ids, offsets, np.full(len(texts), scaled), pad_to, skip)).vectors


def cosine_min(left: Vectors, right: Vectors) -> float:
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float((np.sum(left * right, axis=1) / norms).min())


def reference(folder: Path, texts: Sequence[str], prompt: str | None = None) -> Vectors:
    model = SentenceTransformer(str(folder), device="cpu")
    vectors: Vectors = model.encode(list(texts), prompt=prompt, batch_size=7)
    return vectors


class TestArchitectures:
    @pytest.mark.parametrize("dtype", COSINE_MIN)
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_agree(self, tmp_path: Path, architecture: str, dtype: str) -> None:
        """Packed and bucketed, with the tokenizer that the checkpoint was saved with."""
        folder = save_checkpoint(tmp_path, architecture)
        checkpoint = load_checkpoint(str(folder))
        backend = TorchBackend(checkpoint, dtype=dtype)
        expected = reference(folder, TEXTS)

        for pad_to in (None, 128):
            vectors = embed(backend, checkpoint, TEXTS, pad_to=pad_to)
            assert cosine_min(vectors, expected) >= COSINE_MIN[dtype]
            if dtype == "float32":
                np.testing.assert_allclose(vectors, expected, atol=2e-6)

    def test_rows_of_these_models_differ(self, tmp_path: Path) -> None:
        """Otherwise parity would prove nothing: distinct texts are far below the bound."""
        vectors = reference(save_checkpoint(tmp_path, "bert"), real_texts(24, 3))

        off_diagonal = (vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)]
        assert np.median(off_diagonal) < 0.95

    def test_plain_transformers_checkpoint(self, tmp_path: Path) -> None:
        """Without ``modules.json``: mean pooling, no normalisation."""
        folder = save_encoder(tmp_path, "roberta")
        checkpoint = load_checkpoint(str(folder))

        vectors = embed(TorchBackend(checkpoint, dtype="float32"), checkpoint, TEXTS, pad_to=None)

        np.testing.assert_allclose(vectors, reference(folder, TEXTS), atol=2e-6)


class TestModules:
    @pytest.mark.parametrize("dtype", COSINE_MIN)
    @pytest.mark.parametrize("pooling", POOLINGS, ids=str)
    def test_pooling(self, tmp_path: Path, pooling: str | tuple[str, ...], dtype: str) -> None:
        folder = save_checkpoint(tmp_path, "bert", pooling=pooling, normalize=False)
        checkpoint = load_checkpoint(str(folder))
        backend = TorchBackend(checkpoint, dtype=dtype)
        expected = reference(folder, TEXTS)

        for pad_to in (None, 128):
            vectors = embed(backend, checkpoint, TEXTS, pad_to=pad_to)
            assert vectors.shape == expected.shape == (len(TEXTS), checkpoint.dimension)
            assert cosine_min(vectors, expected) >= COSINE_MIN[dtype]
            if dtype == "float32":
                np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "layers",
        [
            [Dense(HIDDEN, 16)],
            [
                Dense(HIDDEN, 48, bias=False, activation_function=nn.Identity()),
                Dense(48, 8, activation_function=nn.GELU()),
            ],
            [Dense(HIDDEN, HIDDEN, use_residual=True)],
            [Dense(HIDDEN, 20, activation_function=nn.ReLU(), use_residual=True)],
            [Dense(HIDDEN, 16, activation_function=nn.SiLU()), Dense(16, 8, activation_function=nn.Sigmoid())],
        ],
    )
    @pytest.mark.parametrize("normalize", [True, False])
    def test_dense(self, tmp_path: Path, layers: list[Any], normalize: bool) -> None:
        torch.manual_seed(5)
        folder = save_checkpoint(tmp_path, "bert", dense=layers, normalize=normalize)
        checkpoint = load_checkpoint(str(folder))

        vectors = embed(TorchBackend(checkpoint, dtype="float32"), checkpoint, TEXTS, pad_to=None)

        expected = reference(folder, TEXTS)
        assert vectors.shape == expected.shape
        np.testing.assert_allclose(vectors, expected, atol=2e-6)


class TestPrompts:
    @pytest.mark.parametrize("architecture", ["bert", "roberta", "xlm-roberta"])
    @pytest.mark.parametrize("include_prompt", [True, False])
    @pytest.mark.parametrize("pooling", ["mean", "cls", "weightedmean", ("lasttoken", "max")], ids=str)
    def test_agree(
        self, tmp_path: Path, architecture: str, include_prompt: bool, pooling: str | tuple[str, ...]
    ) -> None:
        """Pooled or left out, in both shapes."""
        prompts = {"query": "represent the question: ", "document": ""}
        folder = save_checkpoint(
            tmp_path,
            architecture,
            pooling=pooling,
            include_prompt=include_prompt,
            prompts=prompts,
            default_prompt_name="query",
        )
        checkpoint = load_checkpoint(str(folder))
        assert dict(checkpoint.prompts) == prompts
        assert checkpoint.default_prompt_name == "query"
        assert checkpoint.include_prompt == include_prompt
        backend = TorchBackend(checkpoint, dtype="float32")
        expected = reference(folder, TEXTS)  # with its default prompt

        for pad_to in (None, 128):
            vectors = embed(backend, checkpoint, TEXTS, pad_to=pad_to, prompt=prompts["query"])
            assert cosine_min(vectors, expected) >= COSINE_MIN["float32"]

    def test_prompt_matters_in_these_models(self, tmp_path: Path) -> None:
        folder = save_checkpoint(tmp_path, "bert", include_prompt=False)
        checkpoint = load_checkpoint(str(folder))
        backend = TorchBackend(checkpoint, dtype="float32")

        bare = embed(backend, checkpoint, TEXTS[:5], pad_to=None)

        assert cosine_min(embed(backend, checkpoint, TEXTS[:5], pad_to=None, prompt="x y z: "), bare) < 0.999


class TestTokenizers:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_ids_are_those_of_the_saved_tokenizer(self, tmp_path: Path, architecture: str) -> None:
        folder = save_checkpoint(tmp_path, architecture)
        model = SentenceTransformer(str(folder), device="cpu")
        texts = [*TEXTS, *real_texts(40, 9)]

        checkpoint = load_checkpoint(str(folder))
        encoded = checkpoint.tokenizer().encode(texts, truncation=Truncation.END)

        assert checkpoint.max_input_length == model.max_seq_length
        expected = model.tokenizer(texts, truncation=True, max_length=model.max_seq_length)["input_ids"]
        assert [row.tolist() for row in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])] == expected
