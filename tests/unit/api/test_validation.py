"""What a request may be, and that all that is wrong with it is said at once."""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedserve.api import wire
from embedserve.api.encoding import Encoding
from embedserve.api.validation import RequestLimits, RequestValidator, ValidCall
from embedserve.api.violations import MAX_VIOLATIONS
from embedserve.errors import InvalidRequest, RevisionMismatch, UnknownModel, Violation
from embedserve.model.backend import ModelIdentity
from embedserve.model.tokenizer import Truncation
from embedserve.scheduling.item import Priority
from embedserve.v1 import embedding_pb2 as pb

IDENTITY = ModelIdentity(
    name="acme/model",
    revision="abc123",
    weights_digest="sha256:" + "0" * 64,
    tokenizer_digest="sha256:" + "1" * 64,
    architecture="bert",
    dimension=20,
    max_input_length=8,
    pooling="mean",
    normalize=True,
    dtype="float32",
    device="cpu",
    prompts=(("query", "query: "), ("passage", "passage: ")),
    default_prompt_name="passage",
    vocab_size=100,
)
LIMITS = RequestLimits(max_texts=100, max_text_bytes=64)


def validator(**changes: object) -> RequestValidator:
    limits = {name: changes.pop(name) for name in list(changes) if hasattr(LIMITS, name)}
    return RequestValidator(dataclasses.replace(IDENTITY, **changes), dataclasses.replace(LIMITS, **limits))


def embed(judge: RequestValidator | None = None, metadata: tuple = (), **fields: object) -> ValidCall:
    raw = pb.EmbedRequest(**fields).SerializeToString()
    return (judge or validator()).embed(wire.parse_embed_request(raw), metadata)


def stream(judge: RequestValidator | None = None, metadata: tuple = (), **fields: object) -> ValidCall:
    raw = pb.EmbedStreamRequest(**fields).SerializeToString()
    return (judge or validator()).embed_stream(wire.parse_embed_stream_request(raw), metadata)


def violations(judge: Callable[..., ValidCall] = embed, *args: object, **fields: object) -> tuple[Violation, ...]:
    with pytest.raises(InvalidRequest) as refused:
        judge(*args, **fields)
    return refused.value.violations


def reasons(judge: Callable[..., ValidCall] = embed, *args: object, **fields: object) -> list[tuple[str, str]]:
    return [(violation.field, violation.reason) for violation in violations(judge, *args, **fields)]


def ids(*rows: list[int]) -> list[pb.TokenIds]:
    return [pb.TokenIds(ids=row) for row in rows]


class TestDefaults:
    def test_texts_alone_are_enough(self) -> None:
        """``{"texts": ["hello"]}`` works as it stands, with what the model's own files say."""
        valid = embed(texts=["hello", "you"])

        assert valid == ValidCall(
            texts=["hello", "you"],
            tokens=None,
            indexes=range(2),
            bad_texts=[],
            truncation=Truncation.NONE,
            dimensions=20,
            normalize=True,
            prompt="passage: ",
            prompt_name="passage",
            encoding=Encoding.FLOAT32,
            priority=Priority.DEFAULT,
            tenant="",
        )

    def test_every_option(self) -> None:
        """Each option reaches the call as it was set."""
        valid = embed(
            metadata=(("x-embedserve-priority", "bulk"), ("x-embedserve-tenant", "blue team"), ("other", b"\xff")),
            model="acme/model",
            texts=["hello"],
            truncate=pb.TRUNCATE_START,
            dimensions=16,
            normalize=False,
            prompt_name="query",
            encoding=pb.ENCODING_UBINARY,
            expected_revision="abc123",
        )

        assert (valid.truncation, valid.dimensions, valid.normalize) == (Truncation.START, 16, False)
        assert (valid.prompt, valid.prompt_name, valid.encoding) == ("query: ", "query", Encoding.UBINARY)
        assert (valid.priority, valid.tenant) == (Priority.BULK, "blue team")

    @pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 6, 7])
    def test_encodings_have_the_protos_numbers(self, number: int) -> None:
        """0 is FLOAT32."""
        assert embed(texts=["a"], encoding=number, dimensions=8).encoding == max(1, number)

    def test_truncations_have_the_protos_numbers(self) -> None:
        """0 is NONE."""
        named = ["NONE", "NONE", "END", "START"]

        assert [embed(texts=["a"], truncate=number).truncation.name for number in range(4)] == named


class TestModelAndRevision:
    def test_unknown_model(self) -> None:
        """Names what is served, and not more than the beginning of what was asked for."""
        with pytest.raises(UnknownModel, match="served: acme/model") as refused:
            embed(model="x" * 5000, texts=["a"])

        assert len(str(refused.value)) < 300

    @pytest.mark.parametrize("pin", ["abc123", "sha256:" + "0" * 64])
    def test_a_pin_may_be_revision_or_digest(self, pin: str) -> None:
        """Both are what GetModel shows."""
        assert embed(texts=["a"], expected_revision=pin).texts == ["a"]

    def test_another_revision(self) -> None:
        """Names both."""
        with pytest.raises(RevisionMismatch, match=r"'abc'.*'abc123'"):
            embed(texts=["a"], expected_revision="abc")


class TestCounts:
    @pytest.mark.parametrize("judge", [embed, stream])
    def test_nothing_given(self, judge: Callable[..., ValidCall]) -> None:
        """Neither texts nor token ids."""
        assert reasons(judge) == [("texts", "NO_TEXTS")]

    @pytest.mark.parametrize("judge", [embed, stream])
    def test_both_given(self, judge: Callable[..., ValidCall]) -> None:
        """Exactly one of the two."""
        assert reasons(judge, texts=["a"], token_ids=ids([1])) == [("token_ids", "TEXTS_AND_TOKEN_IDS")]

    @pytest.mark.parametrize("judge", [embed, stream])
    def test_too_many(self, judge: Callable[..., ValidCall]) -> None:
        """The sentence has both numbers and the setting; exactly the limit is allowed."""
        (violation,) = violations(judge, texts=["a"] * 101)

        assert (violation.field, violation.reason) == ("texts", "TOO_MANY_TEXTS")
        assert "101" in violation.description
        assert "100" in violation.description
        assert "limits.max_texts" in violation.description
        assert len(judge(texts=["a"] * 100).indexes) == 100

    def test_too_many_token_ids(self) -> None:
        """The same limit, under their own name."""
        assert reasons(token_ids=ids(*[[1]] * 101)) == [("token_ids", "TOO_MANY_TEXTS")]

    def test_a_hundred_thousand_empty_texts_are_refused_by_their_count(self) -> None:
        """In under 5 ms, parsing included, and with a single violation: no text is looked at."""
        raw = pb.EmbedRequest(texts=[""] * 100_000).SerializeToString()
        judge = RequestValidator(IDENTITY, RequestLimits())
        best = float("inf")
        for _ in range(5):
            begun = time.perf_counter()
            with pytest.raises(InvalidRequest) as refused:
                judge.embed(wire.parse_embed_request(raw))
            best = min(best, time.perf_counter() - begun)

        assert [violation.reason for violation in refused.value.violations] == ["TOO_MANY_TEXTS"]
        assert best < 0.005


class TestTexts:
    def test_every_empty_text_is_named(self) -> None:
        """By its index."""
        assert reasons(texts=["", "a", ""]) == [("texts[0]", "TEXT_EMPTY"), ("texts[2]", "TEXT_EMPTY")]

    def test_white_space_is_text(self) -> None:
        """As for TEI and sentence-transformers: what the tokenizer makes of it is the tokenizer's business."""
        assert embed(texts=[" ", "\n\t"]).texts == [" ", "\n\t"]

    @pytest.mark.parametrize(
        ("text", "allowed"), [("a" * 64, True), ("a" * 65, False), ("€" * 21, True), ("€" * 22, False)]
    )
    def test_length_is_counted_in_utf8_bytes(self, text: str, allowed: bool) -> None:
        """64 bytes are 64 letters or 21 euro signs."""
        if allowed:
            assert embed(texts=[text]).texts == [text]
        else:
            (violation,) = violations(texts=["fine", text])
            assert (violation.field, violation.reason) == ("texts[1]", "TEXT_TOO_LARGE")
            assert str(len(text.encode())) in violation.description

    def test_a_stream_sets_bad_texts_apart(self) -> None:
        """The good ones go on, under their own indexes."""
        valid = stream(texts=["", "good", "x" * 65, "also"])

        assert valid.texts == ["good", "also"]
        assert list(valid.indexes) == [1, 3]
        assert [(bad.index, bad.reason) for bad in valid.bad_texts] == [(0, "TEXT_EMPTY"), (2, "TEXT_TOO_LARGE")]

    def test_a_stream_of_bad_texts_only(self) -> None:
        """Is a valid call with nothing to do."""
        valid = stream(texts=["", ""])

        assert (valid.texts, list(valid.indexes), len(valid.bad_texts)) == ([], [], 2)


class TestTokenIds:
    def test_they_are_used_as_they_are(self) -> None:
        """No prompt, no special token; end to end in one array."""
        valid = embed(token_ids=ids([1, 2, 3], [99]))

        assert valid.texts is None
        assert valid.tokens is not None
        assert valid.tokens.ids.dtype == np.int32
        assert valid.tokens.ids.tolist() == [1, 2, 3, 99]
        assert valid.tokens.lengths.tolist() == [3, 1]
        assert valid.tokens.truncated.tolist() == [False, False]
        assert (valid.prompt, valid.prompt_name) == ("", "")

    def test_what_is_wrong_with_each(self) -> None:
        """Empty, outside the vocabulary (also where an int32 would be negative), too long."""
        found = violations(token_ids=ids([], [1], [5, 100, 200], [2**32 - 1], list(range(9)), [*range(8), 100]))

        assert [(violation.field, violation.reason) for violation in found] == [
            ("token_ids[0]", "TOKEN_IDS_EMPTY"),
            ("token_ids[2]", "TOKEN_ID_OUT_OF_RANGE"),
            ("token_ids[3]", "TOKEN_ID_OUT_OF_RANGE"),
            ("token_ids[4]", "TEXT_TOO_LONG"),
            ("token_ids[5]", "TOKEN_ID_OUT_OF_RANGE"),
        ]
        assert "holds 100;" in found[1].description
        assert "below 100" in found[1].description
        assert "holds 4294967295;" in found[2].description
        assert "9 tokens, the model takes 8" in found[3].description

    @pytest.mark.parametrize(
        ("truncate", "kept"), [(pb.TRUNCATE_END, list(range(8))), (pb.TRUNCATE_START, list(range(3, 11)))]
    )
    def test_truncation_cuts_them_as_they_are(self, truncate: int, kept: list[int]) -> None:
        """END keeps the first, START the last; texts that fit are left alone."""
        valid = embed(token_ids=ids([7, 8], list(range(11)), list(range(8))), truncate=truncate)

        assert valid.tokens is not None
        assert valid.tokens.ids.tolist() == [7, 8, *kept, *range(8)]
        assert valid.tokens.lengths.tolist() == [2, 8, 8]
        assert valid.tokens.truncated.tolist() == [False, True, False]

    def test_truncation_does_not_heal_what_is_wrong(self) -> None:
        """An id outside the vocabulary is named also where it would be cut off."""
        assert reasons(token_ids=ids([*range(8), 100]), truncate=pb.TRUNCATE_END) == [
            ("token_ids[0]", "TOKEN_ID_OUT_OF_RANGE")
        ]

    def test_a_stream_sets_bad_ones_apart(self) -> None:
        """The good ones go on, under their own indexes."""
        valid = stream(token_ids=ids([1, 2], [100], [3], []))

        assert valid.tokens is not None
        assert valid.tokens.ids.tolist() == [1, 2, 3]
        assert valid.tokens.lengths.tolist() == [2, 1]
        assert list(valid.indexes) == [0, 2]
        assert [bad.index for bad in valid.bad_texts] == [1, 3]

    @pytest.mark.parametrize("name", ["", "query"])
    def test_no_prompt_with_them(self, name: str) -> None:
        """Whatever its name."""
        assert reasons(token_ids=ids([1]), prompt_name=name) == [("prompt_name", "PROMPT_WITH_TOKEN_IDS")]

    def test_bytes_that_are_no_ids(self) -> None:
        """Are the caller's fault, not ours."""
        request = wire.parse_embed_request(b"\x1a\x05\x0a\x03abc")

        with pytest.raises(InvalidRequest, match="malformed"):
            validator().embed(request)


class TestOptions:
    @pytest.mark.parametrize("dimensions", [0, 21, 2**32 - 1])
    def test_dimensions_out_of_range(self, dimensions: int) -> None:
        """1 to the model's own."""
        (violation,) = violations(texts=["a"], dimensions=dimensions)

        assert (violation.field, violation.reason) == ("dimensions", "DIMENSIONS_OUT_OF_RANGE")
        assert "1 to 20" in violation.description

    @pytest.mark.parametrize("dimensions", [1, 20])
    def test_dimensions_at_the_ends(self, dimensions: int) -> None:
        """Both ends are allowed."""
        assert embed(texts=["a"], dimensions=dimensions).dimensions == dimensions

    @pytest.mark.parametrize("encoding", [pb.ENCODING_BINARY, pb.ENCODING_UBINARY])
    def test_binary_needs_a_multiple_of_eight(self, encoding: int) -> None:
        """Also where the dimension is the model's own."""
        assert reasons(texts=["a"], encoding=encoding) == [("dimensions", "DIMENSIONS_NOT_MULTIPLE_OF_8")]
        assert embed(texts=["a"], encoding=encoding, dimensions=16).dimensions == 16

    def test_unknown_prompt(self) -> None:
        """Names those that there are; an empty name asks for none."""
        (violation,) = violations(texts=["a"], prompt_name="quarry")

        assert (violation.field, violation.reason) == ("prompt_name", "UNKNOWN_PROMPT")
        assert "'quarry'" in violation.description
        assert "'query', 'passage'" in violation.description
        assert embed(texts=["a"], prompt_name="").prompt == ""

    def test_a_model_without_prompts(self) -> None:
        """Has no default either."""
        judge = validator(prompts=(), default_prompt_name=None)

        assert embed(judge, texts=["a"]).prompt == ""
        assert "it has: none" in violations(embed, judge, texts=["a"], prompt_name="query")[0].description

    @pytest.mark.parametrize(("field", "number"), [("truncate", 4), ("encoding", 8), ("encoding", -1)])
    def test_unknown_enum_values(self, field: str, number: int) -> None:
        """A number that a newer client knows and this server does not is an error, not a default."""
        assert reasons(texts=["a"], **{field: number}) == [(field, f"UNKNOWN_{field.upper()}")]

    @pytest.mark.parametrize(
        ("metadata", "reason"),
        [
            ((("x-embedserve-priority", "urgent"),), "UNKNOWN_PRIORITY"),
            ((("x-embedserve-priority", ""),), "UNKNOWN_PRIORITY"),
            ((("x-embedserve-tenant", "a" * 65),), "BAD_TENANT"),
            ((("x-embedserve-tenant", "a\tb"),), "BAD_TENANT"),
            ((("x-embedserve-tenant", "é"),), "BAD_TENANT"),
        ],
    )
    def test_bad_metadata(self, metadata: tuple, reason: str) -> None:
        """Is a violation of the metadata's own name."""
        assert reasons(embed, None, metadata, texts=["a"]) == [(f"metadata.{metadata[0][0]}", reason)]

    @pytest.mark.parametrize("priority", list(Priority))
    def test_priorities(self, priority: Priority) -> None:
        """Every class of the scheduler has its word."""
        assert embed(None, (("x-embedserve-priority", priority.name.lower()),), texts=["a"]).priority is priority


class TestAnswerSize:
    def test_the_sentence_has_the_arithmetic_and_the_way_out(self) -> None:
        """What was asked, what it needs, what is allowed, how many would fit, EmbedStream, and the setting."""
        judge = validator(max_send_message_bytes=4096, max_texts=1000)
        (violation,) = violations(embed, judge, texts=["a"] * 50)

        assert (violation.field, violation.reason) == ("texts", "ANSWER_TOO_LARGE")
        for word in ("50 vectors of 80 bytes", "20 components", "4096", "EmbedStream", "server.max_send_message_bytes"):
            assert word in violation.description
        assert f"{wire.max_texts_unary(80, 4096)} texts fit" in violation.description

    def test_fewer_bytes_a_vector_fit(self) -> None:
        """Encoding and dimensions count."""
        judge = validator(max_send_message_bytes=4096)

        assert embed(judge, texts=["a"] * 50, encoding=pb.ENCODING_UBINARY, dimensions=8).dimensions == 8
        assert embed(judge, texts=["a"] * wire.max_texts_unary(80, 4096)).dimensions == 20

    def test_a_stream_has_no_such_limit(self) -> None:
        """Its messages are cut to size."""
        assert len(stream(validator(max_send_message_bytes=4096), texts=["a"] * 50).indexes) == 50


class TestAllAtOnce:
    def test_every_violation_is_listed(self) -> None:
        """Options, metadata and texts together."""
        found = reasons(
            embed,
            None,
            (("x-embedserve-priority", "urgent"),),
            texts=["", "a"],
            truncate=9,
            encoding=9,
            dimensions=99,
            prompt_name="nope",
        )

        assert [reason for _, reason in found] == [
            "UNKNOWN_TRUNCATE",
            "UNKNOWN_ENCODING",
            "DIMENSIONS_OUT_OF_RANGE",
            "UNKNOWN_PROMPT",
            "UNKNOWN_PRIORITY",
            "TEXT_EMPTY",
        ]

    def test_the_list_is_bounded_and_says_so(self) -> None:
        """The last place counts what is left out."""
        found = violations(texts=[""] * 100)

        assert len(found) == MAX_VIOLATIONS
        assert found[-1].description == f"{100 - MAX_VIOLATIONS + 1} more violations are not listed"
        assert found[-2].field == f"texts[{MAX_VIOLATIONS - 2}]"

    def test_exactly_the_bound_loses_none(self) -> None:
        """Nothing is left out that would fit."""
        found = violations(texts=[""] * MAX_VIOLATIONS)

        assert [violation.reason for violation in found] == ["TEXT_EMPTY"] * MAX_VIOLATIONS


class TestCountTokens:
    def test_texts_and_prompt(self) -> None:
        """The default prompt counts, as it would in Embed."""
        assert validator().count_tokens(pb.CountTokensRequest(texts=["a"])) == (["a"], "passage: ")
        assert validator().count_tokens(pb.CountTokensRequest(texts=["a"], prompt_name="")) == (["a"], "")

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({}, "NO_TEXTS"),
            ({"texts": ["a"] * 101}, "TOO_MANY_TEXTS"),
            ({"texts": [""]}, "TEXT_EMPTY"),
            ({"texts": ["x" * 65]}, "TEXT_TOO_LARGE"),
            ({"texts": ["a"], "prompt_name": "nope"}, "UNKNOWN_PROMPT"),
        ],
    )
    def test_limits_are_those_of_embed(self, fields: dict, reason: str) -> None:
        """One rule, one word."""
        with pytest.raises(InvalidRequest) as refused:
            validator().count_tokens(pb.CountTokensRequest(**fields))

        assert [violation.reason for violation in refused.value.violations] == [reason]

    def test_unknown_model(self) -> None:
        """As in Embed."""
        with pytest.raises(UnknownModel):
            validator().count_tokens(pb.CountTokensRequest(model="other", texts=["a"]))


REQUESTS = st.builds(
    pb.EmbedRequest,
    model=st.sampled_from(["", "acme/model"]),
    texts=st.lists(st.text(max_size=30), max_size=5),
    token_ids=st.lists(st.builds(pb.TokenIds, ids=st.lists(st.integers(0, 110), max_size=12)), max_size=5),
    truncate=st.integers(-1, 5),
    dimensions=st.none() | st.integers(0, 24),
    normalize=st.none() | st.booleans(),
    prompt_name=st.none() | st.sampled_from(["", "query", "nope"]),
    encoding=st.integers(-1, 9),
)


class TestAnyRequest:
    @given(REQUESTS, st.booleans())
    def test_is_a_whole_call_or_an_error_of_the_caller(self, request: pb.EmbedRequest, as_stream: bool) -> None:
        """Never another exception; and a call that is let through keeps every promise that the engine relies on."""
        judge, parse = validator(), wire.parse_embed_stream_request if as_stream else wire.parse_embed_request
        try:
            valid = (judge.embed_stream if as_stream else judge.embed)(parse(request.SerializeToString()))
        except InvalidRequest as error:
            assert 1 <= len(error.violations) <= MAX_VIOLATIONS  # noqa: PT017  # only some requests are refused
            return
        given = len(request.texts) or len(request.token_ids)

        assert (valid.texts is None) != (valid.tokens is None)
        assert sorted([*valid.indexes, *(bad.index for bad in valid.bad_texts)]) == list(range(given))
        assert as_stream or not valid.bad_texts
        assert 1 <= valid.dimensions <= 20
        if valid.texts is not None:
            assert valid.texts == [request.texts[index] for index in valid.indexes]
            assert all(0 < len(text.encode()) <= 64 for text in valid.texts)
        if valid.tokens is not None:
            assert len(valid.tokens.lengths) == len(valid.tokens.truncated) == len(valid.indexes)
            assert int(valid.tokens.lengths.sum()) == len(valid.tokens.ids)
            assert all(1 <= length <= 8 for length in valid.tokens.lengths.tolist())
            assert all(0 <= token < 100 for token in valid.tokens.ids.tolist())
