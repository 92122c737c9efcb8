"""Text to token ids, exactly as the checkpoint says.

Decides special tokens, truncation and the cut before tokenising. Must never know threads (``engine/tokenization.py``
gives each thread its own clone), requests or limits on counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from embedserve.errors import ItemFailed
from embedserve.model.squeeze import Squeeze

__all__ = ["TextTokenizer", "TokenizedTexts", "Truncation"]

Ids = npt.NDArray[np.int32]

HELD_CHARS = 256
"""A single text up to here is tokenised without giving Python's lock away: to get it back from a busy thread costs as
much as the text (20 us; 42 with the lock given away and wanted by another thread)."""
CUT_CHARS_PER_TOKEN = 8
"""Characters kept for each token of the maximum: prose has 4 to 5 a token, so the first cut nearly always suffices."""
CUT_GROWTH = 4
"""How much more is tokenised when a cut gave too few tokens; the repeats cost at most a third of the whole text."""
SHORTEN_FROM = 2
"""Tries after which a text is shortened: that costs what some kilobytes of tokenising do; few texts need a third."""
CUT_SLACK_TOKENS = 32
"""Tokens beyond the maximum that a cut text must give: what a cut changes lies at its edge, within the slack."""
CUT_AT = " \n\t\r"
"""Where a text may be cut: every pre-tokenizer in use ends a word there, so that the words beside a cut stay whole."""
PANIC_MODULE = "pyo3_runtime"
"""Where the type of a Rust panic says it lives; it cannot be imported."""
PROMPTS_KEPT_MAX = 256
"""Prompts whose token counts are remembered; a checkpoint has 2 to 20."""


class Truncation(Enum):
    """What to do with a text that is longer than the model takes."""

    NONE = "none"
    """Keep every token and let the caller refuse it: ``lengths`` may exceed the maximum."""
    END = "end"
    """Keep the beginning."""
    START = "start"
    """Keep the end (and the prompt, which is no part of the text)."""


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """Token ids of ``n`` texts end to end."""

    ids: npt.NDArray[np.int32]
    """Shape ``[sum(lengths)]``."""
    lengths: npt.NDArray[np.int32]
    """Shape ``[n]``, special tokens and prompt included."""
    truncated: npt.NDArray[np.bool_]
    """Shape ``[n]``: tokens were cut off. With ``Truncation.NONE``: the text is too long and ``lengths`` is a lower
    bound."""
    prompt_tokens: int = 0
    """Leading tokens that belong to the prompt (and the leading special token), for checkpoints that do not pool
    them."""


_NOT_CUT = np.zeros(1, np.bool_)


class TextTokenizer:
    """One ``tokenizers.Tokenizer`` with padding and truncation off; not thread-safe, ``clone`` it.

    A long text is cut by characters before it is tokenised, at a space, so that a text of a megabyte costs what its
    first kilobytes cost. The cut is kept only when it gives ``CUT_SLACK_TOKENS`` tokens more than are needed; otherwise
    more of the text is taken, up to all of it. The result is that of the whole text. ``model/squeeze.py`` knows more of
    the commonest tokenizer: where else it may be cut, and what it does not look at.
    """

    def __init__(self, tokenizer_json: str, max_input_length: int) -> None:
        """Build from the text of ``tokenizer.json``; its own padding and truncation settings are switched off.

        Raises ``ValueError`` where the text is no tokenizer, or where the special tokens leave no room for a text.
        """
        tokenizer = self._tokenizer = _build(tokenizer_json)
        self._tokenizer_json = tokenizer_json
        self.max_input_length = max_input_length
        try:
            self._prefix, self._suffix = _special_tokens(tokenizer)
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise ValueError(f"tokenizer.json cannot be used: {error}") from error
        self._room = max_input_length - self._prefix - self._suffix
        if self._room < 1:
            raise ValueError(f"max_input_length {max_input_length} leaves no room beside the special tokens")
        self._never_cut = max_input_length * CUT_CHARS_PER_TOKEN
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        # An added token with a space in it may straddle a cut; its characters then become at most that many tokens.
        straddling = max(
            (len(token.content) for token in added.values() if set(CUT_AT) & set(token.content)), default=0
        )
        self._enough = self._room + CUT_SLACK_TOKENS + straddling
        self._prompts: dict[str, Ids] = {}
        self._squeeze = Squeeze.of(tokenizer_json)

    @property
    def special_tokens(self) -> int:
        """Special tokens around every text."""
        return self._prefix + self._suffix

    def clone(self) -> TextTokenizer:
        """An independent tokenizer for another thread."""
        return TextTokenizer(self._tokenizer_json, self.max_input_length)

    def encode(self, texts: Sequence[str], *, truncation: Truncation, prompt: str = "") -> TokenizedTexts:
        """Token ids with special tokens; ``prompt`` is put before each text.

        With ``Truncation.NONE`` a text that is far too long is not tokenised to its end: ``truncated`` then says that
        its length, which exceeds the maximum, is what was found so far (``count`` gives the full length).
        """
        if len(texts) == 1 and len(prompt) + len(texts[0]) <= self._never_cut:  # most calls: no list is worth its while
            ids = np.array(self._encode([prompt + texts[0] if prompt else texts[0]])[0].ids, np.int32)
            if ids.size <= self.max_input_length or truncation is Truncation.NONE:
                return TokenizedTexts(ids, np.array([ids.size], np.int32), _NOT_CUT.copy(), self.prompt_tokens(prompt))
            ids = self._truncate(ids, truncation, prompt)
            return TokenizedTexts(ids, np.array([ids.size], np.int32), ~_NOT_CUT, self.prompt_tokens(prompt))
        rows, cut = self._tokenize([prompt + text for text in texts], from_end=truncation is Truncation.START)
        lengths = np.fromiter((row.size for row in rows), np.int32, count=len(rows))
        truncated = cut
        if truncation is not Truncation.NONE:
            truncated = lengths > self.max_input_length
            for index in np.flatnonzero(truncated):
                rows[index] = self._truncate(rows[index], truncation, prompt)
                lengths[index] = rows[index].size
        ids = np.concatenate(rows) if rows else np.zeros(0, np.int32)
        return TokenizedTexts(ids, lengths, truncated, self.prompt_tokens(prompt))

    def count(self, texts: Sequence[str], *, prompt: str = "") -> npt.NDArray[np.int32]:
        """Full token counts, shape ``[n]``, special tokens and prompt included, never truncated.

        Takes time in proportion to the texts (16 us for 12 tokens, 17 ms for 48 kB).
        """
        encodings = self._encode([prompt + text for text in texts])
        return np.fromiter((len(encoding) for encoding in encodings), np.int32, count=len(texts))

    def pieces(self, text: str, chars: int) -> list[str]:
        """``text`` in pieces of about ``chars`` characters whose content tokens, put end to end, are its own.

        One piece, the whole text, where it is not certain that no token lies across a cut.
        """
        squeeze = self._squeeze
        if squeeze is None or len(text) <= chars:
            return [text]
        rest = squeeze.shorten(text)
        pieces = []
        while len(rest) > chars:
            place = squeeze.place_between(rest, chars // 2, chars)
            if place < 0:
                break
            pieces.append(rest[:place])
            rest = rest[place:]
        return [*pieces, rest]

    def prompt_tokens(self, prompt: str) -> int:
        """Leading tokens of each row that ``prompt`` takes, special tokens included; 0 without a prompt.

        Counted as sentence-transformers counts them for ``include_prompt=False``: the prompt alone, with special
        tokens, less one where the last is special.
        """
        if not prompt:
            return 0
        ids = self._prompt_ids(prompt)
        if ids.size > self.max_input_length:
            ids = self._truncate(ids, Truncation.END, "")
        return ids.size - (int(ids[-1]) in self._special_ids)

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary, or ``None`` where there is no such token."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def _tokenize(self, texts: list[str], *, from_end: bool) -> tuple[list[Ids], npt.NDArray[np.bool_]]:
        """The ids of each text, or of as much of it as decides the truncated row, with which of them were cut."""
        rows: list[Ids] = [np.zeros(0, np.int32)] * len(texts)
        was_cut = np.zeros(len(texts), np.bool_)
        chars = self.max_input_length * CUT_CHARS_PER_TOKEN
        pending = list(range(len(texts)))
        tries = 0
        while pending:
            pieces = [self._cut(texts, index, chars, from_end=from_end) for index in pending]
            encodings = self._encode(pieces)
            short: list[int] = []
            for index, piece, encoding in zip(pending, pieces, encodings, strict=True):
                whole = len(piece) == len(texts[index])
                if whole or len(encoding) - self._prefix - self._suffix >= self._enough:
                    rows[index] = np.array(encoding.ids, np.int32)
                    was_cut[index] = not whole
                else:
                    short.append(index)
            pending = short
            chars *= CUT_GROWTH
            tries += 1
            if self._squeeze is not None and tries >= SHORTEN_FROM:
                for index in pending:
                    texts[index] = self._squeeze.shorten(texts[index])
        return rows, was_cut

    def _cut(self, texts: list[str], index: int, chars: int, *, from_end: bool) -> str:
        """As much of a text as the next try takes; a text that cannot be cut is shortened in its place."""
        text, squeeze = texts[index], self._squeeze
        piece = _cut(text, chars, from_end=from_end)
        if len(piece) <= chars or squeeze is None:
            return piece
        if (piece := squeeze.cut(text, chars, from_end=from_end)) is not text:
            return piece
        text = texts[index] = squeeze.shorten(text)
        piece = _cut(text, chars, from_end=from_end)
        return piece if len(piece) <= chars else squeeze.cut(text, chars, from_end=from_end)

    def _encode(self, texts: list[str]) -> list[Encoding]:
        """Raises ``ItemFailed`` where the library panics, and starts anew: nobody knows in what state that left it."""
        try:
            if len(texts) == 1 and len(texts[0]) <= HELD_CHARS:
                return [self._tokenizer.encode(texts[0])]
            encodings: list[Encoding] = self._tokenizer.encode_batch_fast(texts)
        except BaseException as panic:
            # Here it is a text's doing.
            if not _is_panic(panic):
                raise
            self._tokenizer = _build(self._tokenizer_json)
            raise ItemFailed(f"the tokenizer panicked: {panic}") from None
        return encodings

    def _truncate(self, row: Ids, truncation: Truncation, prompt: str) -> Ids:
        """``row`` at the maximum length, its special tokens kept."""
        content = row[self._prefix : row.size - self._suffix]
        kept = [content[: self._room]]
        if truncation is Truncation.START:
            before = self._prompt_ids(prompt) if prompt else row[:0]
            before = before[self._prefix : before.size - self._suffix]
            if before.size < self._room:
                kept = [before, content[content.size - self._room + before.size :]]
        return np.concatenate([row[: self._prefix], *kept, row[row.size - self._suffix :]])

    def _prompt_ids(self, prompt: str) -> Ids:
        """The prompt alone, with special tokens."""
        ids = self._prompts.get(prompt)
        if ids is None:
            ids = np.array(self._tokenizer.encode(prompt).ids, np.int32)
            if len(self._prompts) < PROMPTS_KEPT_MAX:
                self._prompts[prompt] = ids
        return ids


def _build(tokenizer_json: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the Rust library has no narrower type
        raise ValueError(f"tokenizer.json cannot be read: {error}") from error
    # all-MiniLM ships with both fixed to 128: every text would have 128 tokens.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _is_panic(error: BaseException) -> bool:
    """Whether Rust code panicked, which is no Exception, so that nothing on its way up catches it by mistake."""
    return type(error).__module__ == PANIC_MODULE


def _special_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """How many special tokens stand before and after every text."""
    mask = tokenizer.encode("a").special_tokens_mask
    content = [index for index, special in enumerate(mask) if not special]
    return (content[0], len(mask) - 1 - content[-1]) if content else (len(mask), 0)


def _cut(text: str, chars: int, *, from_end: bool) -> str:
    """At most ``chars`` characters of ``text``, cut at a space in the outer half, or all of it where there is none."""
    if len(text) <= chars:
        return text
    if from_end:
        first = len(text) - chars
        found = [place for place in (text.find(space, first, first + chars // 2) for space in CUT_AT) if place >= 0]
        if not found:
            return text
        # One space stays: byte-level vocabularies write it into the word that follows.
        rest = text[min(found) :].lstrip(CUT_AT)
        tail = text[len(text) - len(rest) - 1 :]
        return tail if len(tail) > chars // 4 else text
    place = max(text.rfind(space, chars // 2, chars) for space in CUT_AT)
    head = text[: max(place, 0)].rstrip(CUT_AT)
    return head if len(head) > chars // 4 else text
