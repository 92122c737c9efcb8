"""One request as the engine sees it, and what it gives back.

Decides the border between a front end (gRPC, Ray Serve, a program in the same process) and the engine. Must never know
a transport, a wire format or an encoding of vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from embedserve.engine.stages import Stages
from embedserve.engine.tokenization import Meter
from embedserve.errors import EmbedServeError
from embedserve.model.tokenizer import TokenizedTexts, Truncation
from embedserve.scheduling.item import Priority

__all__ = ["Call", "Embedded", "Portion", "Refused", "TokenSource"]


class TokenSource(Protocol):
    """Token ids that somebody else makes, as they are asked for: a stream's whose texts are in another process."""

    count: int
    """Number of texts."""

    def estimate(self, texts: int) -> int:
        """About how many tokens the first ``texts`` texts have."""

    async def tokenize(self, first: int, stop: int) -> TokenizedTexts:
        """Token ids of the texts from ``first`` to before ``stop``. Raises what the tokenizer pool would."""


@dataclass(slots=True)
class Call:
    """What to embed and how. Exactly one of ``texts``, ``tokens`` and ``source`` is set; a front end has checked it."""

    stages: Stages
    texts: Sequence[str] | None = None
    tokens: TokenizedTexts | None = None
    """Token ids, used as they are."""
    source: TokenSource | None = None
    """Where a stream's token ids come from."""
    truncation: Truncation = Truncation.NONE
    normalize: bool = True
    dimensions: int | None = None
    """Leading components to keep; ``None`` keeps all."""
    prompt: str = ""
    """Text put before each text."""
    deadline_ns: int | None = None
    priority: Priority = Priority.DEFAULT
    tenant: str = ""
    judged_unread: bool = False
    """Whether ``EngineSurface.unread`` has let it through."""
    meter: Meter = field(default_factory=Meter)
    """Tokenizer time that it has used."""
    trace: object | None = None
    """Opaque; batches link to it through the observer."""

    @property
    def count(self) -> int:
        """Number of texts."""
        if self.texts is not None:
            return len(self.texts)
        if self.source is not None:
            return self.source.count
        return 0 if self.tokens is None else len(self.tokens.lengths)


class Embedded(NamedTuple):
    """The answer to a whole request; row ``i`` is text ``i``."""

    vectors: npt.NDArray[np.float32]
    """Shape ``[n, dimensions]``, C-contiguous; may be a view of a batch's buffer."""
    token_counts: Sequence[int]
    truncated: Sequence[bool]
    batch_sizes: Sequence[int]
    """Rows of the batch that each text rode in."""
    tokens: int
    batches: int


@dataclass(frozen=True, slots=True)
class Refused:
    """One text of a stream that has no vector."""

    index: int
    error: EmbedServeError


@dataclass(frozen=True, slots=True)
class Portion:
    """What one batch finished of a stream, or texts that failed."""

    indexes: Sequence[int] = ()
    vectors: npt.NDArray[np.float32] | None = None
    """Shape ``[len(indexes), dimensions]``, owned by the receiver."""
    token_counts: Sequence[int] = ()
    truncated: Sequence[bool] = ()
    batch_size: int = 0
    refused: Sequence[Refused] = field(default_factory=tuple)
