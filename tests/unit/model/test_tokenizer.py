"""Token ids are those of the whole text by transformers' own tokenizer, cut where and only where it was asked."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from embedserve.errors import ItemFailed
from embedserve.model.squeeze import Squeeze
from embedserve.model.tokenizer import TextTokenizer, TokenizedTexts, Truncation
from tests.corpus import real_texts
from tests.unit.model.checkpoints import BERT_SPECIAL, ROBERTA_SPECIAL, byte_level_bpe, unigram, word_piece
from tests.unit.model.metadata import tokenizer_json

KINDS: dict[str, tuple[Callable[[], Tokenizer], dict[str, str]]] = {
    "word_piece": (word_piece, BERT_SPECIAL),
    "byte_level_bpe": (byte_level_bpe, ROBERTA_SPECIAL),
    "unigram": (unigram, ROBERTA_SPECIAL),
}
ODD_TEXTS = [
    "",
    " ",
    "\n\n\t  \r\n",
    "hello world",
    "Ünïcödé, naïve café, STRASSE straße",
    "日本語のテキストと漢字、한국어, עברית, العربية, हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 e\u0301 \u200d\ufeff",
    "\x00\x01\x02 control \x1c\x7f\x85 characters \u2028 and \u2029 separators",
    "x" * 3_000,
    "[CLS] [SEP] [MASK] <s> </s> <pad> <mask> ##s ▁ Ġ",
    "a" * 99 + " " + "b" * 101,
    "1234567890" * 40,
    "https://example.org/" + "path/" * 200 + "?q=" + "%20" * 100,
]


def tokenizer_of(kind: str, max_input_length: int = 64) -> TextTokenizer:
    return TextTokenizer(KINDS[kind][0]().to_str(), max_input_length)


def reference_of(kind: str) -> Any:
    build, special = KINDS[kind]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=build(), **special)


def rows_of(encoded: TokenizedTexts) -> list[list[int]]:
    return [row.tolist() for row in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])]


# Words, runs of spaces, and stretches without any: all that a cut can meet.
words = st.text(alphabet=st.characters(codec="utf-8"), max_size=40)
spaces = st.text(alphabet=" \n\t", min_size=1, max_size=30)
pieces = st.one_of(words, spaces, st.text(alphabet="abcdefgh. ", max_size=200), st.text("あいう漢字", max_size=60))
long_texts = st.builds(lambda parts, times: "".join(parts) * times, st.lists(pieces, max_size=12), st.integers(1, 12))

# Runs of what BERT's tokenizer drops, strips or cannot tell apart, beside what looks like a special token.
runs = st.builds(
    lambda chars, times: chars * times,
    st.sampled_from(
        (
            *("a", "Z9", "é", "e\u0301", "\u0301", "\u0300\u0345", "\x00", "\u200d", "\x01 ", "\ufffd", " ", "\n", "."),
            *(
                "a.",
                "漢",
                "ß",
                "한",
                "ひ",
                "👩\u200d💻",
                "[",
                "[MASK]",
                "[MA\x01SK]",
                "MASK]",
                "\x85",
                "\u3000",
                "_",
                "İ",
            ),
        )
    ),
    st.integers(1, 400),
)
odd_texts = st.builds("".join, st.lists(st.one_of(runs, words, runs), min_size=1, max_size=10))


@pytest.mark.parametrize("kind", KINDS)
class TestAgreement:
    def test_ids_are_those_of_transformers(self, kind: str) -> None:
        """On Unicode, emoji, control characters, very long words, spelled-out special tokens and real text."""
        texts = ODD_TEXTS + real_texts(60, 1)
        reference = reference_of(kind)

        encoded = tokenizer_of(kind).encode(texts, truncation=Truncation.END)

        assert rows_of(encoded) == reference(texts, truncation=True, max_length=64)["input_ids"]
        full = [len(row) for row in reference(texts)["input_ids"]]
        assert encoded.truncated.tolist() == [length > 64 for length in full]

    def test_count_is_the_full_length(self, kind: str) -> None:
        texts = ODD_TEXTS + real_texts(20, 2)

        counts = tokenizer_of(kind).count(texts, prompt="query: ")

        expected = [len(row) for row in reference_of(kind)(["query: " + text for text in texts])["input_ids"]]
        assert counts.tolist() == expected

    @settings(max_examples=150, deadline=None)
    @given(texts=st.lists(long_texts, min_size=1, max_size=3), prompt=st.sampled_from(["", "query: "]))
    def test_cut_before_tokenising_changes_nothing(self, kind: str, texts: list[str], prompt: str) -> None:
        """An end-truncated row is the beginning of the whole text's tokens, between its special tokens."""
        tokenizer = tokenizer_of(kind, 16)
        whole = KINDS[kind][0]()

        encoded = tokenizer.encode(texts, truncation=Truncation.END, prompt=prompt)

        for text, row, truncated in zip(texts, rows_of(encoded), encoded.truncated, strict=True):
            ids = whole.encode(prompt + text).ids
            assert row == (ids if len(ids) <= 16 else [*ids[:15], ids[-1]])
            assert truncated == (len(ids) > 16)

    @settings(max_examples=150, deadline=None)
    @given(text=long_texts)
    def test_start_truncation_keeps_the_end_of_the_whole_text(self, kind: str, text: str) -> None:
        ids = KINDS[kind][0]().encode(text).ids

        encoded = tokenizer_of(kind, 16).encode([text], truncation=Truncation.START)

        assert encoded.ids.tolist() == (ids if len(ids) <= 16 else [ids[0], *ids[-15:]])

    @settings(max_examples=100, deadline=None)
    @given(text=long_texts)
    def test_without_truncation_over_length_is_always_seen(self, kind: str, text: str) -> None:
        """A short text is whole; a long one is longer than the maximum, by its true length or a lower bound of it."""
        full = len(KINDS[kind][0]().encode(text).ids)

        encoded = tokenizer_of(kind, 16).encode([text], truncation=Truncation.NONE)

        length = int(encoded.lengths[0])
        assert encoded.ids.size == length
        if encoded.truncated[0]:
            assert 16 < length <= full
        else:
            assert length == full


class TestSqueeze:
    """What BERT's tokenizer does not look at may be left out of a long text: the same tokens come out."""

    @settings(max_examples=400, deadline=None)
    @given(text=odd_texts)
    def test_a_shortened_text_has_the_same_tokens(self, text: str) -> None:
        whole = word_piece()
        squeeze = Squeeze.of(whole.to_str())
        assert squeeze is not None

        assert whole.encode(squeeze.shorten(text)).ids == whole.encode(text).ids

    @settings(max_examples=300, deadline=None)
    @given(text=odd_texts, truncation=st.sampled_from([Truncation.END, Truncation.START]))
    def test_a_truncated_row_is_that_of_the_whole_text(self, text: str, truncation: Truncation) -> None:
        ids = word_piece().encode(text).ids

        row = tokenizer_of("word_piece", 16).encode([text], truncation=truncation).ids.tolist()

        cut = [*ids[:15], ids[-1]] if truncation is Truncation.END else [ids[0], *ids[-15:]]
        assert row == (ids if len(ids) <= 16 else cut)

    @settings(max_examples=300, deadline=None)
    @given(text=odd_texts)
    def test_the_pieces_of_a_text_have_its_tokens(self, text: str) -> None:
        tokenizer = tokenizer_of("word_piece")
        rows = [word_piece().encode(piece).ids for piece in tokenizer.pieces(text, 64)]

        assert [token for row in rows for token in row[1:-1]] == word_piece().encode(text).ids[1:-1]

    @pytest.mark.parametrize("kind", ["byte_level_bpe", "unigram"])
    def test_other_tokenizers_are_left_alone(self, kind: str) -> None:
        assert Squeeze.of(KINDS[kind][0]().to_str()) is None
        assert tokenizer_of(kind).pieces("a b " * 1000, 64) == ["a b " * 1000]

    @pytest.mark.parametrize(
        "text",
        [
            "a" * 2**20,
            "." * 10**6,
            "e" + "\u0301" * 2**19,
            "e\u0301" * 2**18,
            "\u200d" * 2**18,
            " " * 2**20,
            "漢" * 2**18,
        ],
        ids=["one word", "dots", "marks", "accents", "joiners", "spaces", "ideographs"],
    )
    def test_a_megabyte_of_anything_hands_the_tokenizer_a_few_kilobytes(self, text: str) -> None:
        tokenizer = tokenizer_of("word_piece")
        handed = 0
        inner = tokenizer._tokenizer

        class Counting:
            def encode_batch_fast(self, texts: list[str]) -> Any:
                nonlocal handed
                handed += sum(map(len, texts))
                return inner.encode_batch_fast(texts)

            def encode(self, text: str) -> Any:
                return self.encode_batch_fast([text])[0]

        tokenizer._tokenizer = Counting()
        for truncation in (Truncation.END, Truncation.START):
            handed = 0
            tokenizer.encode([text], truncation=truncation)

            assert handed < 8_000


class TestPanic:
    """A panic of the Rust library is one text's failure."""

    def test_it_is_told_as_that_texts_and_the_next_text_is_well(self) -> None:
        panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

        class Panicking:
            def encode_batch_fast(self, _texts: list[str]) -> Any:
                raise panic("index out of bounds")

            encode = encode_batch_fast

        tokenizer = tokenizer_of("word_piece")
        for texts in (["hello"], ["hello", "world"]):
            before = tokenizer.encode(texts, truncation=Truncation.END).ids.tolist()
            tokenizer._tokenizer = Panicking()
            with pytest.raises(ItemFailed, match="panicked"):
                tokenizer.encode(texts, truncation=Truncation.END)

            assert tokenizer.encode(texts, truncation=Truncation.END).ids.tolist() == before


class TestShortTexts:
    """A short text alone is tokenised another way, without giving the lock away, to the same ids."""

    @pytest.mark.parametrize(
        "text", ["", "hello", "Hello, WORLD! caf\u00e9 \u6f22\u5b57 [SEP]", "a" * 256, "b c " * 64, "d" * 257]
    )
    def test_it_has_the_ids_that_it_has_among_others(self, text: str) -> None:
        tokenizer = tokenizer_of("word_piece")
        alone = tokenizer.encode([text], truncation=Truncation.END)
        among = tokenizer.encode([text, "another"], truncation=Truncation.END)

        assert alone.ids.tolist() == among.ids[: among.lengths[0]].tolist()
        assert alone.truncated.tolist() == [bool(among.truncated[0])]


class TestLongTexts:
    def test_cost_does_not_grow_with_the_text(self) -> None:
        """A megabyte of prose hands the tokenizer a few kilobytes, whichever end is kept."""
        text = "all work and no play makes jack a dull boy. " * 25_000
        tokenizer = tokenizer_of("word_piece")
        handed = 0

        class Counting:
            def __init__(self, inner: Tokenizer) -> None:
                self.inner = inner

            def encode_batch_fast(self, texts: list[str]) -> Any:
                nonlocal handed
                handed += sum(map(len, texts))
                return self.inner.encode_batch_fast(texts)

            def encode(self, text: str) -> Any:
                return self.encode_batch_fast([text])[0]

        tokenizer._tokenizer = Counting(tokenizer._tokenizer)
        for truncation in Truncation:
            handed = 0
            encoded = tokenizer.encode([text], truncation=truncation)

            assert encoded.truncated.tolist() == [True]
            assert 0 < handed < 4_000

    def test_text_without_spaces_is_taken_whole(self) -> None:
        """One word of 20,000 characters is one unknown token for WordPiece; cut in two it would be something else."""
        tokenizer = tokenizer_of("word_piece")

        encoded = tokenizer.encode(["a" * 20_000], truncation=Truncation.END)

        assert encoded.ids.tolist() == word_piece().encode("a" * 20_000).ids
        assert encoded.truncated.tolist() == [False]


class TestPrompt:
    def test_tokens_are_counted_as_sentence_transformers_counts_them(self) -> None:
        """The prompt alone, its leading special token included and its trailing one not."""
        tokenizer = tokenizer_of("word_piece")
        prompt = "represent the text: "

        encoded = tokenizer.encode(["hello"], truncation=Truncation.END, prompt=prompt)

        assert encoded.prompt_tokens == len(word_piece().encode(prompt).ids) - 1
        assert encoded.ids.tolist() == word_piece().encode(prompt + "hello").ids
        assert tokenizer.encode(["hello"], truncation=Truncation.END).prompt_tokens == 0

    def test_start_truncation_keeps_the_prompt(self) -> None:
        """The prompt is no part of the text whose beginning goes."""
        tokenizer = tokenizer_of("word_piece", 24)
        prompt = "query: "
        text = " ".join(real_texts(30, 5))

        encoded = tokenizer.encode([text], truncation=Truncation.START, prompt=prompt)

        content = word_piece().encode(prompt).ids[1:-1]
        tail = word_piece().encode(text).ids[-(24 - 1 - len(content)) :]
        assert encoded.ids.tolist() == [word_piece().token_to_id("[CLS]"), *content, *tail]

    def test_prompt_that_fills_the_model_is_cut_like_a_text(self) -> None:
        tokenizer = tokenizer_of("word_piece", 8)

        encoded = tokenizer.encode(["hello"], truncation=Truncation.START, prompt="a b c d e f g h i j k ")

        assert encoded.lengths.tolist() == [8]
        assert encoded.prompt_tokens == 7


class TestSettings:
    def test_padding_and_truncation_of_the_file_are_off(self) -> None:
        """all-MiniLM's file pads and truncates everything to 128."""
        padding = {
            "strategy": {"Fixed": 128},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        }
        truncation = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        tokenizer = TextTokenizer(tokenizer_json(padding=padding, truncation=truncation), 64)

        assert tokenizer.count(["a b c a b c"]).tolist() == [8]
        assert tokenizer.encode(["a"], truncation=Truncation.NONE).ids.tolist() == [2, 8, 3]

    def test_clone_is_independent_and_equal(self) -> None:
        tokenizer = tokenizer_of("byte_level_bpe")
        clone = tokenizer.clone()
        texts = real_texts(10, 3)

        assert clone._tokenizer is not tokenizer._tokenizer
        ids = clone.encode(texts, truncation=Truncation.END).ids
        assert ids.tolist() == tokenizer.encode(texts, truncation=Truncation.END).ids.tolist()

    def test_no_texts_give_no_tokens(self) -> None:
        tokenizer = tokenizer_of("unigram")

        encoded = tokenizer.encode([], truncation=Truncation.END)

        assert (encoded.ids.size, encoded.lengths.size, encoded.truncated.size) == (0, 0, 0)
        assert encoded.ids.dtype == np.int32
        assert tokenizer.count([]).size == 0

    def test_tokenizer_without_special_tokens(self) -> None:
        tokenizer = TextTokenizer(tokenizer_json(post_processor=None), 4)

        assert tokenizer.encode(["a b c a b c"], truncation=Truncation.END).ids.tolist() == [8, 9, 10, 8]
        assert tokenizer.encode(["a b c a b c"], truncation=Truncation.START).ids.tolist() == [10, 8, 9, 10]

    def test_length_without_room_is_refused(self) -> None:
        with pytest.raises(ValueError, match="max_input_length 2 leaves no room beside the special tokens"):
            TextTokenizer(tokenizer_json(), 2)

    def test_what_is_no_tokenizer_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"tokenizer.json cannot be read"):
            TextTokenizer("{}", 16)
