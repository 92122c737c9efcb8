"""Text to token ids, exactly as the checkpoint says.

Decides special tokens, truncation and the cut before tokenising. Must never know threads (``engine/tokenization.py`` gives
each thread its own clone), requests or limits on counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

__all__ = ["TextTokenizer", "TokenizedTexts", "Truncation"]

CUT_CHARS_PER_TOKEN = 8
"""Characters kept for each token of the maximum: prose has 4 to 5 a token, so the first cut nearly always suffices."""
CUT_GROWTH = 4
"""How much more is tokenised when a cut gave too few tokens; the repeats cost at most a third of the whole text."""
CUT_SLACK_TOKENS = 32
"""Tokens beyond the maximum that a cut text must give: what a cut changes lies at its end, within the slack."""


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
        """Build from the text of ``tokenizer.json``; its own padding and truncation settings are switched off.

        Raises ``ValueError`` where the text is no tokenizer, or where the special tokens leave no room for a text.
        """
        try:
            tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the Rust library raises a bare Exception for everything
            raise ValueError(f"tokenizer.json cannot be read: {error}") from error
        self._set_up(tokenizer, tokenizer_json, max_input_length)

    def _set_up(self, tokenizer: Tokenizer, tokenizer_json: str, max_input_length: int) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._tokenizer_json = tokenizer_json
        self.max_input_length = max_input_length
        mask = tokenizer.encode("a").special_tokens_mask
        content = [index for index, special in enumerate(mask) if not special]
        self._prefix = content[0] if content else len(mask)
        self._suffix = len(mask) - 1 - content[-1] if content else 0
        if max_input_length <= self._prefix + self._suffix:
            raise ValueError(
                f"max_input_length {max_input_length} leaves no room beside "
                f"{self._prefix + self._suffix} special tokens"
            )
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        # An added token with a space in it may straddle a cut; its characters then become at most that many tokens.
        longest = max((len(token.content) for token in added.values() if " " in token.content), default=0)
        self._slack = CUT_SLACK_TOKENS + longest
        self._prompt_tokens: dict[str, int] = {"": 0}

    def clone(self) -> TextTokenizer:
        """An independent tokenizer for another thread."""
        return TextTokenizer(self._tokenizer_json, self.max_input_length)

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary, or ``None``."""
        return self._tokenizer.token_to_id(token)

    def encode(self, texts: Sequence[str], *, truncation: Truncation, prompt: str = "") -> TokenizedTexts:
        """Token ids with special tokens; ``prompt`` is put before each text."""
        encodings = self._tokenizer.encode_batch_fast([prompt + text for text in texts])
        rows = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        truncated = np.zeros(len(rows), dtype=np.bool_)
        if truncation is not Truncation.NONE:
            for index, row in enumerate(rows):
                if row.size > self.max_input_length:
                    rows[index] = self._cut(row, truncation)
                    truncated[index] = True
        lengths = np.array([row.size for row in rows], dtype=np.int32)
        ids = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
        return TokenizedTexts(ids, lengths, truncated)

    def _cut(self, row: npt.NDArray[np.int32], truncation: Truncation) -> npt.NDArray[np.int32]:
        room = self.max_input_length - self._prefix - self._suffix
        content = row[self._prefix : row.size - self._suffix]
        kept = content[:room] if truncation is Truncation.END else content[content.size - room :]
        return np.concatenate([row[: self._prefix], kept, row[row.size - self._suffix :]])

    def count(self, texts: Sequence[str], *, prompt: str = "") -> npt.NDArray[np.int32]:
        """Full token counts, shape ``[n]``, special tokens and prompt included, never truncated."""
        encodings = self._tokenizer.encode_batch_fast([prompt + text for text in texts])
        return np.array([len(encoding) for encoding in encodings], dtype=np.int32)
