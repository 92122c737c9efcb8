"""Text to token ids, exactly as the checkpoint says.

Decides special tokens, truncation and the cut before tokenising. Must never know threads (``engine/tokenization.py`` gives
each thread its own clone), requests or limits on counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

__all__ = ["TextTokenizer", "TokenizedTexts", "Truncation"]


class Truncation(Enum):
    """What to do with a text that is longer than the model takes."""

    NONE = "none"
    """Keep every token and let the caller refuse it: ``lengths`` may exceed the maximum."""
    END = "end"
    """Keep the beginning."""
    START = "start"
    """Keep the end."""


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """Token ids of ``n`` texts end to end."""

    ids: npt.NDArray[np.int32]
    """Shape ``[sum(lengths)]``."""
    lengths: npt.NDArray[np.int32]
    """Shape ``[n]``, special tokens and prompt included."""
    truncated: npt.NDArray[np.bool_]
    """Shape ``[n]``: tokens were cut off."""
    prompt_tokens: int = 0
    """Leading tokens that belong to the prompt (and the leading special token), for checkpoints that do not pool them."""


class TextTokenizer:
    """One ``tokenizers.Tokenizer`` with padding and truncation off; not thread-safe, ``clone`` it."""

    def __init__(self, tokenizer_json: str, max_input_length: int) -> None:
        """Build from the text of ``tokenizer.json``; its own padding and truncation settings are switched off."""
        raise NotImplementedError  # helper writes this

    def clone(self) -> TextTokenizer:
        """An independent tokenizer for another thread."""
        raise NotImplementedError

    def encode(self, texts: Sequence[str], *, truncation: Truncation, prompt: str = "") -> TokenizedTexts:
        """Token ids with special tokens; ``prompt`` is put before each text."""
        raise NotImplementedError

    def count(self, texts: Sequence[str], *, prompt: str = "") -> npt.NDArray[np.int32]:
        """Full token counts, shape ``[n]``, special tokens and prompt included, never truncated."""
        raise NotImplementedError
