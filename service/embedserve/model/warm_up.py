"""Passes before the first text: whether a model gives sane vectors, the same in each shape, and what a pass costs.

Decides which passes those are, and what they must stand up to. Must never know how a pass is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from embedserve.errors import StartupError
from embedserve.model.backend import BatchResult, DeviceLost, DeviceOutOfMemory, ModelIdentity, TokenBatch, WarmPass
from embedserve.model.compiled import Reference, least_cosine

__all__ = ["WarmUp", "known_batch"]

LENGTHS: Final = (3, 16, 64, 256, 512)
"""Row lengths; the model's maximum is added."""
SEED: Final = 0
DAMAGE: Final = (DeviceOutOfMemory, DeviceLost, LookupError, RuntimeError)
"""What a pass raises that does not work."""


def known_batch(lengths: Sequence[int], vocab_size: int, pad_to: int | None = None) -> TokenBatch:
    """Rows of these lengths whose ids are the same each time: what passes are compared by."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.random.default_rng(SEED).integers(vocab_size, size=int(offsets[-1]))
    return TokenBatch(ids.astype(np.int32), offsets, np.ones(len(lengths), np.bool_), pad_to)


class WarmUp:
    """The passes of one backend."""

    def __init__(
        self,
        embed: Callable[[TokenBatch], BatchResult],
        identity: ModelIdentity,
        *,
        packs: bool,
        cosine_min: float,
    ) -> None:
        """``packs`` says that ``pad_to=None`` runs without padding; ``cosine_min`` is how alike both shapes must be."""
        self._embed = embed
        self._identity = identity
        self._packs = packs
        self._cosine_min = cosine_min

    def rows(self, tokens_max: int) -> list[list[int]]:
        """Row lengths of each pass: each length alone, then as many mixed rows as ``tokens_max`` holds."""
        limit = self._identity.max_input_length
        ladder = sorted({min(length, limit) for length in (*LENGTHS, limit)})
        ladder = [length for length in ladder if length <= tokens_max] or [ladder[0]]
        passes = [[length] for length in ladder]
        mixed: list[int] = []
        while sum(mixed) + ladder[len(mixed) % len(ladder)] <= tokens_max:
            mixed.append(ladder[len(mixed) % len(ladder)])
        return [*passes, mixed] if len(mixed) > 1 else passes

    def fitting(self, tokens_max: int, release_memory: Callable[[], None]) -> int:
        """How many tokens fit the device in a pass of either shape: ``tokens_max``, or a half, a quarter of it.

        Raises ``StartupError`` where not even the model's longest text does.
        """
        while True:
            lengths = self.rows(tokens_max)[-1]
            try:
                for pad_to in (None, max(lengths)):
                    self._embed(known_batch(lengths, self._identity.vocab_size, pad_to))
            except DeviceOutOfMemory as error:
                if tokens_max // 2 < self._identity.max_input_length:
                    raise self._failed(lengths, error) from error
            except (DeviceLost, LookupError, RuntimeError) as error:
                raise self._failed(lengths, error) from error
            else:
                return tokens_max
            # Outside the except block: the error's traceback keeps the pass's tensors.
            release_memory()
            tokens_max //= 2

    def agree(self, tokens_max: int) -> list[Reference]:
        """Run each pass in both shapes; batches and what the padded shape gave. Raises ``StartupError``."""
        known: list[Reference] = []
        for lengths in self.rows(tokens_max):
            packed_vectors = self._pass(lengths, None)
            padded_vectors = self._pass(lengths, max(lengths))
            cosine = least_cosine(packed_vectors, padded_vectors)
            if cosine < self._cosine_min:
                raise StartupError(
                    f"{self._identity.name}: packed and padded passes of rows of {lengths} tokens differ "
                    f"(cosine {cosine:.6f}); set attention to padded"
                )
            known.append((known_batch(lengths, self._identity.vocab_size), padded_vectors))
        return known

    def still_agree(self, known: list[Reference], what: str) -> None:
        """Run the packed passes once more, now that ``what`` computes them. Raises ``StartupError``."""
        for batch, vectors in known:
            lengths = np.diff(batch.offsets).tolist()
            cosine = least_cosine(self._pass(lengths, None), vectors)
            if not cosine >= self._cosine_min:
                raise StartupError(
                    f"{self._identity.name}: {what} give other vectors for rows of {lengths} tokens "
                    f"(cosine {cosine:.6f}); switch them off"
                )

    def costs(self, tokens_max: int) -> tuple[WarmPass, ...]:
        """What the smallest and the largest pass cost, in the shape that serving will use."""
        rows = self.rows(tokens_max)
        return tuple(self._timed(lengths) for lengths in (rows[0], rows[-1]))

    def _timed(self, lengths: list[int]) -> WarmPass:
        pad_to = None if self._packs else max(lengths)
        padded = sum(lengths) if self._packs else len(lengths) * max(lengths)
        begun = time.monotonic_ns()
        self._pass(lengths, pad_to)
        return WarmPass(sum(lengths), padded, time.monotonic_ns() - begun)

    def _pass(self, lengths: list[int], pad_to: int | None) -> npt.NDArray[np.float32]:
        try:
            vectors = self._embed(known_batch(lengths, self._identity.vocab_size, pad_to)).vectors
        except DAMAGE as error:
            raise self._failed(lengths, error) from error
        what = self._what(lengths)
        if vectors.shape != (len(lengths), self._identity.dimension):
            raise StartupError(f"{what} gave the shape {vectors.shape}, not {(len(lengths), self._identity.dimension)}")
        if not np.isfinite(vectors).all():
            raise StartupError(f"{what} gave values that are not finite; the weights or the dtype are wrong")
        return vectors

    def _what(self, lengths: list[int]) -> str:
        return f"{self._identity.name}: a warm-up pass of rows of {lengths} tokens"

    def _failed(self, lengths: list[int], error: Exception) -> StartupError:
        return StartupError(f"{self._what(lengths)} failed: {error}")
