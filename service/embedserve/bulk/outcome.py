"""What became of one text, and who can tell.

Decides the border between the pipeline and whatever embeds for it. Must never know files, formats or a transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from embedserve.errors import EmbedServeError

__all__ = ["BulkError", "Embedder", "Failure", "Options", "Vector"]


class BulkError(EmbedServeError):
    """The run cannot go on: what was asked is wrong for every text, or nobody answers."""


@dataclass(frozen=True, slots=True)
class Options:
    """How every text of a run is embedded; ``None`` leaves it to the model."""

    truncate: Literal["none", "end", "start"] = "none"
    dimensions: int | None = None
    normalize: bool | None = None
    prompt_name: str | None = None


@dataclass(frozen=True, slots=True)
class Vector:
    """A text's vector."""

    values: npt.NDArray[np.float32]
    """Shape ``[dimensions]``."""
    token_count: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a text has none."""

    reason: str
    """A stable SCREAMING_SNAKE word."""
    message: str


class Embedder(Protocol):
    """Turns texts into vectors, several calls at once."""

    async def dimensions(self) -> int:
        """Components of every vector to come. The first call; raises ``BulkError`` where nothing can be embedded."""

    async def embed(self, texts: Sequence[str]) -> Sequence[Vector | Failure]:
        """One outcome a text, in order. Raises ``BulkError`` when none can be had."""
