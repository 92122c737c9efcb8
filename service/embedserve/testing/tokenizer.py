"""A real tokenizer that needs no file: WordPiece over printable ASCII, one token a character at the least.

Decides a vocabulary. The rest is the ``tokenizers`` library, so that special tokens, offsets and truncation are the
real thing.
"""

from __future__ import annotations

import string

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from embedserve.model.tokenizer import TextTokenizer

__all__ = ["tiny_tokenizer", "tiny_tokenizer_json"]

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
_WORDS = ["hello", "world", "the", "a", "text", "poison"]


def tiny_tokenizer_json() -> str:
    """The text of a ``tokenizer.json``: 2 special tokens a text, whole words for ``hello world the a text poison``."""
    pieces = [*_SPECIAL, *_WORDS]
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces += [c for c in characters if c not in pieces] + [f"##{c}" for c in characters]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))  # noqa: S106 - not a password
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return str(tokenizer.to_str())


def tiny_tokenizer(max_input_length: int = 128) -> TextTokenizer:
    """A ``TextTokenizer`` over that vocabulary."""
    return TextTokenizer(tiny_tokenizer_json(), max_input_length)
