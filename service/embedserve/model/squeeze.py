"""What of a long text BERT's tokenizer does not look at.

Decides which characters can be left out, and where a text can be cut, so that the very same tokens come out. Must never
know tokens, requests or limits. It is certain only of the pipeline that most encoders have (``BertNormalizer``,
``BertPreTokenizer``, ``WordPiece``); ``Squeeze.of`` gives ``None`` for any other.

Why: a text may be a megabyte, and that tokenizer needs 0.3 to 3 s for one without spaces, whose end decides nothing.
Each rule below is a line of that pipeline (huggingface/tokenizers: ``normalizers/bert.rs``, ``pre_tokenizers/bert.rs``,
``models/wordpiece/mod.rs``):

* white space only separates: a run of it is one space;
* control characters, formats such as U+200D and U+FFFD are dropped: a run of them is one of them;
* accents are dropped where ``strip_accents`` holds: a run of combining marks is one mark;
* a word of more than ``max_input_chars_per_word`` characters is unknown, however much longer it is;
* punctuation and ideographs stand alone, so that a cut beside one leaves all words whole.

One of a run always stays: an added token such as ``[MASK]`` is looked for before anything is dropped, and must neither
come into being nor disappear.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable
from typing import Any, Final

__all__ = ["Squeeze"]

_MARKS: Final = "\u0300-\u036f"
_DROPPED: Final = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u200b-\u200f\ufffd"
"""Dropped by ``clean_text``. Without U+0085, which is white space to some."""
_BLANK: Final = " \t\n\r"
_LETTERS: Final = "0-9A-Za-zÀ-ÖØ-öø-ɏΑ-ΡΣ-ϵЀ-ҁҊ-ԯぁ-ゖァ-ヺ가-힣"
"""Blocks whose characters are letters in every version of Unicode in use, and leave at least one character each."""
_IDEOGRAPHS: Final = ("\u4e00", "\u9fff")
_PUNCTUATION: Final = frozenset(string.punctuation)
_BLANKS_AND_DROPPED: Final = re.compile(f"[{_BLANK}{_DROPPED}]{{2,}}")
_MARK_RUN: Final = re.compile(f"([{_MARKS}])[{_MARKS}]+")


class Squeeze:
    """Shortens texts for one tokenizer without changing its tokens."""

    def __init__(self, word_max: int, added: Iterable[str], *, strip_accents: bool) -> None:
        """``word_max`` is ``max_input_chars_per_word``, ``added`` the added tokens."""
        self._strip_accents = strip_accents
        self._pairs = frozenset(token[i : i + 2] for token in added for i in range(len(token) - 1))
        letters = _LETTERS + _MARKS if strip_accents else _LETTERS
        # Marks stand alone by then, so that at least every other character is a letter and outlives the normalizer.
        # Only from the beginning of a word: tried at each of its letters, a word just too short costs its square.
        self._word = re.compile(f"(?<![{letters}])([{letters}]{{{2 * word_max + 4}}})[{letters}]+")

    @classmethod
    def of(cls, tokenizer_json: str) -> Squeeze | None:
        """For the tokenizer in ``tokenizer_json``; ``None`` where it is not certain that nothing would change."""
        spec: dict[str, Any] = json.loads(tokenizer_json)
        normalizer, model = spec.get("normalizer") or {}, spec.get("model") or {}
        bert = (
            normalizer.get("type") == "BertNormalizer"
            and (spec.get("pre_tokenizer") or {}).get("type") == "BertPreTokenizer"
            and model.get("type") == "WordPiece"
        )
        if not bert or not normalizer.get("clean_text") or not normalizer.get("handle_chinese_chars"):
            return None
        for token in spec.get("added_tokens") or ():
            # One that a run may hold within itself, or whose own white space counts, could change.
            if token.get("normalized") or not _PUNCTUATION & set(token["content"]) or len(token["content"]) > 64:
                return None
            if any(char.isspace() for char in token["content"]):
                return None
        accents = normalizer.get("strip_accents")
        strip = bool(normalizer.get("lowercase")) if accents is None else bool(accents)
        added = [token["content"] for token in spec.get("added_tokens") or ()]
        return cls(int(model.get("max_input_chars_per_word", 100)), added, strip_accents=strip)

    def shorten(self, text: str) -> str:
        """``text`` without what does not matter, about 10 ms a megabyte."""
        text = _BLANKS_AND_DROPPED.sub(_one, text)
        if self._strip_accents:
            text = _MARK_RUN.sub(r"\1", text)
        return self._word.sub(r"\1", text)

    def cut(self, text: str, chars: int, *, from_end: bool) -> str:
        """At most ``chars`` characters of ``text``, cut where all words stay whole; ``text`` itself if it cannot be.

        An added token may lie across the cut: its characters then become some tokens more, as many at the most.
        """
        if len(text) <= chars:
            return text
        if from_end:
            first = len(text) - chars
            for place in range(first, first + chars // 2):
                if _alone(text[place]):
                    return text[place:]
            return text
        for place in range(chars, chars // 2, -1):
            if _alone(text[place - 1]):
                return text[:place]
        return text

    def place_between(self, text: str, first: int, last: int) -> int:
        """The last place in ``first`` to ``last`` where a cut leaves all tokens whole, added ones too; -1: none.

        An added token holds no white space, and lies across no two characters that are neighbours in none.
        """
        for place in range(last, first, -1):
            before, after = text[place - 1], text[place]
            if (_alone(before) or _alone(after)) and before + after not in self._pairs:
                return place
        return -1


def _alone(char: str) -> bool:
    return char in _PUNCTUATION or char in _BLANK or _IDEOGRAPHS[0] <= char <= _IDEOGRAPHS[1]


def _one(run: re.Match[str]) -> str:
    """A space where there is one in the run, the first character otherwise."""
    found = run.group()
    return " " if any(blank in found for blank in _BLANK) else found[0]
