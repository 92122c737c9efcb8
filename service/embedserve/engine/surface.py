"""What a front end and a process need of an engine, wherever the engine is.

Decides nothing. Must never know whether the device is in this process (``engine/engine.py``) or in another
(``frontends/remote.py``).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from embedserve.engine.call import Call, Embedded, Portion
from embedserve.engine.load import LoadReport
from embedserve.engine.tokenization import TokenizerUse
from embedserve.engine.unread import UnreadAdmission
from embedserve.model.backend import ModelIdentity

__all__ = ["EngineSurface"]


class EngineSurface(Protocol):
    """One model, texts in and vectors out; each method is ``engine.engine.Engine``'s of the same name."""

    @property
    def identity(self) -> ModelIdentity:
        """The model that is served; only after ``start``."""

    @property
    def stalled(self) -> bool:
        """Whether the device is silent for longer than a pass may take."""

    @property
    def tokenizer_use(self) -> TokenizerUse:
        """How busy the tokenizer threads are."""

    @property
    def unread(self) -> UnreadAdmission | None:
        """Who refuses calls before they are read; ``None`` where all are read."""

    async def start(self) -> ModelIdentity:
        """Be ready to embed. Raises ``StartupError``."""

    def drain(self) -> None:
        """Admit nothing more; what was admitted goes on."""

    async def stop(self, timeout_s: float) -> bool:
        """End every thread; whether they ended in time."""

    async def embed(self, call: Call) -> Embedded:
        """All vectors of one request, in its order."""

    def embed_stream(self, call: Call) -> AsyncGenerator[Portion, None]:
        """Portions of one request as their batches finish. Close the generator to cancel."""

    async def count_tokens(self, texts: Sequence[str], *, prompt: str = "") -> npt.NDArray[np.int32]:
        """Full token counts, shape ``[n]``."""

    def load(self) -> LoadReport:
        """The load now."""
