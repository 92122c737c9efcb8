"""A model that costs nothing: a real checkpoint on disk, a real tokenizer, and vectors that are ready at once.

Decides what is left when the forward pass is taken away, so that a measurement sees the service path alone. Must never
be told what is measured. It stands where the torch backend stands; everything else is the product as it is served.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, processors

from embedserve.model.backend import (
    BackendFactory,
    BatchResult,
    DeviceReport,
    ModelIdentity,
    PassTimes,
    TokenBatch,
    WarmPass,
)
from embedserve.model.checkpoint import Checkpoint

__all__ = ["TEXT", "NullBackend", "null_backend", "write_checkpoint"]

TEXT = "asdf" * 126
"""504 characters: the text of the rival's table. bge-m3 makes 255 tokens of it, the tokenizer here 254."""

ROWS_MAX = 512
"""Vectors that are prepared: as many rows as one pass may have by default."""


def write_checkpoint(directory: Path, dimension: int = 1024) -> Path:
    """A checkpoint that the loader takes: metadata, a tokenizer, and weights that nobody reads."""
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters, "as", "df"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "s"), ("d", "f")], unk_token="[UNK]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    config = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_size": dimension,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 512,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(tokenizer.to_str())
    # A safetensors file without tensors: the length of its header, and the header.
    (directory / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return directory


class NullBackend:
    """Gives unit vectors that were drawn before the first call."""

    def __init__(self, identity: ModelIdentity, batch_us: int = 0, token_ns: int = 0) -> None:
        """``identity`` says how long a vector is, the two others how long a pass takes: asleep, as beside a device."""
        self._identity = identity
        self._batch_ns = batch_us * 1000
        self._token_ns = token_ns
        drawn = np.random.default_rng(17).standard_normal((ROWS_MAX, identity.dimension), dtype=np.float32)
        self._vectors = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    @property
    def identity(self) -> ModelIdentity:
        """Who this is."""
        return self._identity

    @property
    def passes_at_once(self) -> int:
        """One."""
        return 1

    def warm_up(self, max_batch_tokens: int) -> tuple[WarmPass, ...]:
        """Nothing to do but to say how fast this is."""
        sizes = (32, max_batch_tokens) if self._batch_ns or self._token_ns else ()
        return tuple(WarmPass(n, n, self._batch_ns + self._token_ns * n) for n in sizes)

    def embed(self, batch: TokenBatch) -> BatchResult:
        """One row a text, in a fresh buffer written by this thread, as a device's copy back would leave it."""
        start = time.monotonic_ns()
        vectors = self._vectors[: len(batch.offsets) - 1].copy()
        takes_ns = self._batch_ns + self._token_ns * len(batch.ids)
        if takes_ns:
            time.sleep(takes_ns / 1e9)
        end = time.monotonic_ns()
        return BatchResult(vectors, PassTimes(start, start, start, end, end, end))

    def release_memory(self) -> None:
        """Nothing to give back."""

    def report(self) -> DeviceReport:
        """A device that is always well."""
        return DeviceReport("cpu", 0, 0, compiled=False, packed=True)


@dataclass(frozen=True)
class _NullModel:
    """Makes backends; picklable, so that a process that is spawned can be given it."""

    batch_us: int
    token_ns: int

    def __call__(self, checkpoint: Checkpoint) -> BackendFactory:
        return partial(NullBackend, checkpoint.identity_for("cpu", "float32"), self.batch_us, self.token_ns)


def null_backend(batch_us: int = 0, token_ns: int = 0) -> Callable[[Checkpoint], BackendFactory]:
    """What ``App`` takes as ``make_backend``; a pass over ``T`` tokens sleeps ``batch_us`` and ``T * token_ns``."""
    return _NullModel(batch_us, token_ns)
