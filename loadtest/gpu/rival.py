"""sentence-transformers on the same device and texts, at its best.

Decides what is compared: texts to vectors on the host, tokenising included on both sides, and of the rival the batch
size and the attention that win (bfloat16, sorted by length, as it does itself).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from random import Random
from typing import Any

import numpy as np

from embedserve.model.backend import TokenBatch
from embedserve.model.checkpoint import load_checkpoint
from embedserve.model.cores import core_count
from embedserve.model.tokenizer import TextTokenizer, Truncation
from embedserve.model.torch_backend import TorchBackend
from loadtest.gpu.checkpoint import WORDS
from loadtest.gpu.engine import Device

__all__ = ["compare", "texts_of"]

ATTENTIONS = ("sdpa", "flash_attention_2")
"""That are tried; the second only where its package is installed."""
BATCH_SIZES = (64, 256, 1024)
CHUNK = 256
"""Texts that one thread tokenises at a time."""


def texts_of(words: tuple[int, int], count: int) -> list[str]:
    """Words of ``words.txt``, a token each."""
    rng = Random(17)
    return [" ".join(rng.choices(WORDS, k=rng.randint(*words))) for _ in range(count)]


def compare(backend: TorchBackend, folder: Path, texts: Sequence[str], device: Device) -> dict[str, Any]:
    """Texts a second of both, in turns, and their ratio."""
    ours = _Ours(backend, folder, device)
    theirs, chosen = _best(folder, texts, device)
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(device.repetitions):
        for name, embed in (("ours", ours.embed), ("theirs", theirs)):
            rates[name].append(_rate(embed, texts, device.seconds))
    median = {name: float(np.median(found)) for name, found in rates.items()}
    return {
        "texts_per_s": median["ours"],
        "sentence_transformers_texts_per_s": median["theirs"],
        "sentence_transformers": chosen,
        "ratio": median["ours"] / median["theirs"],
        "all": {name: [round(rate) for rate in found] for name, found in rates.items()},
    }


class _Ours:
    """Tokenising in threads, batches by length, as many passes at once as the backend takes."""

    def __init__(self, backend: TorchBackend, folder: Path, device: Device) -> None:
        self._backend = backend
        self._batch_tokens = device.batch_tokens
        workers = max(1, min(12, core_count() - backend.passes_at_once))
        tokenizer = load_checkpoint(str(folder), max_input_length=512).tokenizer()
        self._tokenizers: SimpleQueue[TextTokenizer] = SimpleQueue()
        for _ in range(workers):
            self._tokenizers.put(tokenizer.clone())
        self._tokenizing = ThreadPoolExecutor(workers)
        self._passes = ThreadPoolExecutor(backend.passes_at_once)

    def embed(self, texts: Sequence[str]) -> None:
        chunks = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
        waiting: list[Any] = []
        done = []
        tokens = 0
        for ids in self._tokenizing.map(self._tokenize, chunks):
            for row in ids:
                if tokens + row.size > self._batch_tokens or len(waiting) == 512:
                    done.append(self._passes.submit(self._backend.embed, _batch(waiting)))
                    waiting, tokens = [], 0
                waiting.append(row)
                tokens += row.size
        done.append(self._passes.submit(self._backend.embed, _batch(waiting)))
        for future in done:
            future.result()

    def _tokenize(self, texts: Sequence[str]) -> list[Any]:
        tokenizer = self._tokenizers.get()
        try:
            found = tokenizer.encode(list(texts), truncation=Truncation.END)
        finally:
            self._tokenizers.put(tokenizer)
        return np.split(found.ids, np.cumsum(found.lengths)[:-1])


def _batch(rows: list[Any]) -> TokenBatch:
    offsets = np.concatenate([[0], np.cumsum([row.size for row in rows])]).astype(np.int32)
    return TokenBatch(np.concatenate(rows).astype(np.int32), offsets, np.ones(len(rows), np.bool_), None)


def _best(folder: Path, texts: Sequence[str], device: Device) -> tuple[Any, dict[str, Any]]:
    import torch  # noqa: PLC0415 - loaded by the backend anyway
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - takes seconds, and may not be there

    found: list[tuple[float, Any, dict[str, Any]]] = []
    for attention in ATTENTIONS:
        options = {"dtype": getattr(torch, device.dtype), "attn_implementation": attention}
        try:
            model = SentenceTransformer(str(folder), device=device.name, model_kwargs=options)
        except (ImportError, ValueError) as error:
            print(f"  sentence-transformers without {attention}: {str(error).splitlines()[0]}")
            continue
        model.max_seq_length = 512
        for size in BATCH_SIZES:
            embed = _Theirs(model, size)
            embed(texts[: 2 * size])
            rate = _rate(embed, texts, min(device.seconds, 1.5))
            found.append((rate, embed, {"attention": attention, "batch_size": size}))
    _, embed, chosen = max(found, key=lambda one: one[0])
    return embed, chosen


class _Theirs:
    def __init__(self, model: Any, batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size

    def __call__(self, texts: Sequence[str]) -> None:
        self._model.encode(list(texts), batch_size=self._batch_size, show_progress_bar=False)


def _rate(embed: Any, texts: Sequence[str], seconds: float) -> float:
    """Texts a second, in whole rounds over ``texts``."""
    begun, rounds = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begun) < seconds or rounds == 0:
        embed(texts)
        rounds += 1
        elapsed = time.perf_counter() - begun
    return rounds * len(texts) / elapsed
