"""What ``wire`` writes and reads by hand is, byte for byte, what the generated classes write and read."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from embedserve.api import wire
from embedserve.api.encoding import Encoding, encode
from embedserve.engine.stages import Stages
from embedserve.model.backend import ModelIdentity
from embedserve.v1 import embedding_pb2 as pb

IDENTITY = ModelIdentity(
    name="acme/model",
    revision="abc123",
    weights_digest="sha256:" + "0" * 64,
    tokenizer_digest="sha256:" + "1" * 64,
    architecture="bert",
    dimension=16,
    max_input_length=128,
    pooling="mean",
    normalize=True,
    dtype="float32",
    device="cpu",
)
MODEL = pb.ModelIdentity(name="acme/model", revision="abc123", weights_digest="sha256:" + "0" * 64)
COUNTS = st.integers(0, 40_000)


def stages(*marks_ms: float) -> Stages:
    """Marks so many milliseconds after an arrival at 1 s."""
    names = ("validated", "admitted", "tokenized", "queued", "dequeued", "assembled", "computed", "responded")
    marks = {f"{name}_ns": 1_000_000_000 + int(mark * 1e6) for name, mark in zip(names, marks_ms, strict=True)}
    return Stages(arrived_ns=1_000_000_000, **marks)


TIMED = stages(1, 2, 4, 5, 10, 11, 31, 32)
TIMINGS = pb.Timings(validate_ms=2, tokenize_ms=2, queue_ms=6, assemble_ms=1, forward_ms=20, respond_ms=1, total_ms=32)


@st.composite
def answers(draw: st.DrawFn) -> tuple[np.ndarray, Encoding, list[int], list[bool], list[int]]:
    """Vectors of odd sizes, one of them perhaps zero, with whatever can be said of each."""
    rows, encoding = draw(st.integers(1, 40)), draw(st.sampled_from(Encoding))
    dimensions = 8 * draw(st.sampled_from([1, 2, 3, 4, 5, 16, 33]))
    vectors = np.random.default_rng(draw(st.integers(0, 99))).standard_normal((rows, dimensions)).astype(np.float32)
    vectors[0] *= draw(st.sampled_from([0, 1, 1000]))
    columns = [draw(st.lists(kind, min_size=rows, max_size=rows)) for kind in (COUNTS, st.booleans(), COUNTS)]
    return vectors, encoding, *columns


def embeddings(
    answer: tuple[np.ndarray, Encoding, list[int], list[bool], list[int]], indexes: list[int]
) -> list[pb.Embedding]:
    """The answer in generated classes, the slow way."""
    vectors, encoding, counts, truncated, sizes = answer
    rows = encode(vectors, encoding)
    messages = []
    for row, index in enumerate(indexes):
        message = pb.Embedding(index=index, token_count=counts[row], truncated=truncated[row], batch_size=sizes[row])
        if encoding is Encoding.FLOAT32:
            message.values.extend(vectors[row].tolist())
        else:
            message.packed = bytes(rows.data[row * rows.row_bytes : (row + 1) * rows.row_bytes])
        if rows.scales is not None:
            message.scale = rows.scales[row]
        messages.append(message)
    return messages


class TestUnary:
    @given(answers())
    @settings(deadline=None)
    def test_bytes_are_those_of_the_generated_class(
        self, answer: tuple[np.ndarray, Encoding, list[int], list[bool], list[int]]
    ) -> None:
        """Every field of every row, of every encoding and size; and never more than was counted for the limit."""
        vectors, encoding, counts, truncated, sizes = answer
        expected = pb.EmbedResponse(
            embeddings=embeddings(answer, list(range(len(vectors)))),
            model=MODEL,
            dimensions=vectors.shape[1],
            encoding=encoding,
            usage=pb.Usage(texts=len(vectors), tokens=sum(counts), batches=3),
            timings=TIMINGS,
        )
        rows = encode(vectors, encoding)
        parts = wire.unary_parts(
            rows,
            counts,
            truncated,
            sizes,
            identity=wire.identity_message(IDENTITY),
            dimensions=vectors.shape[1],
            tokens=sum(counts),
            batches=3,
        )
        raw = wire.finish_unary(parts, wire.stage_timings(TIMED))

        assert raw == expected.SerializeToString()
        assert pb.EmbedResponse.FromString(raw) == expected
        assert len(raw) <= wire.max_response_bytes(len(vectors), rows.row_bytes)

    def test_the_bound_holds_for_the_largest_numbers(self) -> None:
        """Many rows, each with all that can stand around it."""
        n, most = 3000, 2**32 - 1
        rows = encode(np.full((n, 300), 0.5, dtype=np.float32), Encoding.INT8)
        identity = wire.identity_message(IDENTITY)
        parts = wire.unary_parts(
            rows, [most] * n, [True] * n, [most] * n, identity=identity, dimensions=300, tokens=2**60, batches=most
        )

        assert len(wire.finish_unary(parts, wire.stage_timings(TIMED))) <= wire.max_response_bytes(n, rows.row_bytes)

    @pytest.mark.parametrize("dimensions", [8, 384, 1024, 4096])
    @pytest.mark.parametrize("limit", [4 << 20, 1 << 20])
    def test_max_texts_unary_fits(self, dimensions: int, limit: int) -> None:
        """That many fit, one more may not."""
        most = wire.max_texts_unary(4 * dimensions, limit)

        assert wire.max_response_bytes(most, 4 * dimensions) <= limit
        assert wire.max_response_bytes(most + 1, 4 * dimensions) > limit

    def test_a_limit_below_the_overhead_fits_nothing(self) -> None:
        """Not a negative number."""
        assert wire.max_texts_unary(4096, 100) == 0


class TestTimings:
    def test_the_stages_add_up(self) -> None:
        """The six stages are the total."""
        timings = pb.Timings.FromString(wire.stage_timings(stages(0.1, 0.25, 1.7, 1.9, 3.3, 3.4, 9.123, 9.2)))
        total = sum(getattr(timings, f.name) for f in timings.DESCRIPTOR.fields if f.name != "total_ms")

        assert timings.total_ms == pytest.approx(9.2)
        assert total == pytest.approx(timings.total_ms, abs=1e-9)

    def test_marks_that_were_not_reached(self) -> None:
        """Take no time, and never a negative one: token ids are not tokenised."""
        marks = Stages(arrived_ns=5_000_000, validated_ns=6_000_000, responded_ns=9_000_000)

        assert pb.Timings.FromString(wire.stage_timings(marks)) == pb.Timings(validate_ms=1, respond_ms=3, total_ms=4)


class TestStream:
    @given(answers(), st.randoms(use_true_random=False), st.sampled_from([600, 5_000, 1 << 20]))
    @settings(deadline=None)
    def test_messages_together_hold_every_row_and_stay_small(
        self, answer: tuple[np.ndarray, Encoding, list[int], list[bool], list[int]], random: object, limit: int
    ) -> None:
        """In any order of indexes; a message passes the limit only when it is a single row."""
        vectors, encoding, counts, truncated, sizes = answer
        indexes = list(range(0, 1000 * len(vectors), 1000))
        random.shuffle(indexes)  # type: ignore[attr-defined]
        expected = embeddings(answer, indexes)

        raw = wire.stream_messages(
            encode(vectors, encoding), indexes, counts, truncated, sizes, max_message_bytes=limit
        )
        messages = [pb.EmbedStreamResponse.FromString(message) for message in raw]

        assert [embedding for message in messages for embedding in message.embeddings] == expected
        assert raw == [message.SerializeToString() for message in messages]
        assert all(len(r) <= limit or len(m.embeddings) == 1 for r, m in zip(raw, messages, strict=True))

    def test_few_messages(self) -> None:
        """2000 rows of 4 KiB need eight messages of under 1 MiB."""
        n = 2000
        vectors = np.zeros((n, 1024), dtype=np.float32)
        raw = wire.stream_messages(encode(vectors, Encoding.FLOAT32), range(n), [9] * n, [False] * n, [32] * n)

        assert len(raw) == 8
        assert max(map(len, raw)) < 1 << 20

    def test_errors(self) -> None:
        """Item errors, as many to a message as fit."""
        errors = [(i, 3, "TEXT_EMPTY", "empty") for i in range(50_000)]
        raw = wire.stream_errors(errors)
        decoded = [error for message in raw for error in pb.EmbedStreamResponse.FromString(message).errors]

        assert [(e.index, e.code, e.reason, e.message) for e in decoded] == errors
        assert 1 < len(raw) < 10
        assert max(map(len, raw)) < 1 << 20

    def test_no_errors_no_message(self) -> None:
        """A message without anything in it would look like a summary that was lost."""
        assert wire.stream_errors([]) == []

    def test_summary(self) -> None:
        """The last message, byte for byte."""
        expected = pb.EmbedStreamResponse(
            summary=pb.EmbedStreamSummary(
                model=MODEL,
                dimensions=384,
                encoding=pb.ENCODING_INT8,
                usage=pb.Usage(texts=7, tokens=99, batches=2),
                failed=1,
                timings=TIMINGS,
            )
        )
        raw = wire.stream_summary(
            identity=wire.identity_message(IDENTITY),
            dimensions=384,
            encoding=Encoding.INT8,
            texts=7,
            tokens=99,
            batches=2,
            failed=1,
            timings=wire.stage_timings(TIMED),
        )

        assert raw == expected.SerializeToString()

    def test_summary_of_nothing_is_there(self) -> None:
        """A stream in which every text failed still ends with a summary."""
        raw = wire.stream_summary(
            identity=b"", dimensions=0, encoding=Encoding.FLOAT32, texts=0, tokens=0, batches=0, failed=0, timings=b""
        )

        assert pb.EmbedStreamResponse.FromString(raw).HasField("summary")


class TestRequests:
    @pytest.mark.parametrize("name", ["EmbedRequest", "EmbedStreamRequest"])
    def test_every_field_but_token_ids_is_read_alike(self, name: str) -> None:
        """Presence included."""
        public = getattr(pb, name)(
            model="m",
            texts=["a", "", "ü€😀"],
            truncate=pb.TRUNCATE_START,
            dimensions=0,
            normalize=False,
            prompt_name="",
            encoding=99,
            expected_revision="r",
        )
        parse = {"EmbedRequest": wire.parse_embed_request, "EmbedStreamRequest": wire.parse_embed_stream_request}[name]
        twin = parse(public.SerializeToString())

        for field in public.DESCRIPTOR.fields:
            if field.name != "token_ids":
                assert getattr(twin, field.name) == getattr(public, field.name)
            if field.has_presence:
                assert twin.HasField(field.name) == public.HasField(field.name) is True

    def test_absent_options_are_absent(self) -> None:
        """An option that was not sent is told from one that is zero."""
        twin = wire.parse_embed_request(b"")

        assert not any(twin.HasField(name) for name in ("dimensions", "normalize", "prompt_name"))

    @given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=40), max_size=12))
    def test_token_ids_are_read_as_the_public_class_reads_them(self, ids: list[list[int]]) -> None:
        """Any number of texts, empty ones included."""
        request = pb.EmbedRequest(token_ids=[pb.TokenIds(ids=row) for row in ids])
        flat, lengths = wire.token_id_rows(wire.parse_embed_request(request.SerializeToString()))

        assert flat.tolist() == [token for row in ids for token in row]
        assert lengths.tolist() == [len(row) for row in ids]

    def test_token_ids_in_several_runs(self) -> None:
        """A packed field may come in pieces, which belong together."""
        run = pb.TokenIds(ids=[1, 2]).SerializeToString() + pb.TokenIds(ids=[3]).SerializeToString()
        request = pb.EmbedRequest(token_ids=[pb.TokenIds()]).SerializeToString()[:1] + bytes([len(run)]) + run

        assert wire.token_id_rows(wire.parse_embed_request(request))[0].tolist() == [1, 2, 3]

    def test_token_ids_one_by_one(self) -> None:
        """Parsers must take the unpacked form as well (protobuf encoding guide)."""
        run = b"\x0d\x05\x00\x00\x00\x0d\x07\x00\x00\x00"
        request = bytes([0x1A, len(run)]) + run
        assert list(pb.EmbedRequest.FromString(request).token_ids[0].ids) == [5, 7]

        flat, lengths = wire.token_id_rows(wire.parse_embed_request(request))

        assert (flat.tolist(), lengths.tolist()) == ([5, 7], [2])

    @pytest.mark.parametrize("run", [b"\x0a\x03abc", b"\x0a\x04\x05\x00\x00\x00\x0d\x07\x00\x00\x00"])
    def test_what_cannot_be_read_for_sure_is_refused(self, run: bytes) -> None:
        """A run that is not a multiple of four bytes, and the two forms mixed, whose order is lost."""
        request = wire.parse_embed_request(bytes([0x1A, len(run)]) + run)

        with pytest.raises(DecodeError):
            wire.token_id_rows(request)

    @pytest.mark.parametrize("raw", [b"\x12\x02\xff\xfe", b"\x12\x05ab", b"\xff\xff\xff", b"\x00"])
    def test_garbage_is_refused(self, raw: bytes) -> None:
        """Bad UTF-8, a cut field, a cut tag, field 0."""
        with pytest.raises(DecodeError):
            wire.parse_embed_request(raw)
