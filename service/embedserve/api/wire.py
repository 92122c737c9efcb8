"""The wire trick: answers are written, and token ids read, as raw bytes.

Decides the byte layout of the messages on the hot path. Must never know calls, limits or the engine: it takes buffers
and gives ``bytes``, or takes ``bytes`` and gives arrays.

A packed ``repeated float`` and a ``bytes`` field are the same on the wire (protobuf encoding guide, "packed"): a tag, a
length, and the little-endian components. protobuf's Python runtime has no way to hand it an array (protobuf#8047 was
closed), and takes 8.2 us to write 384 floats one by one where the bytes take 0.6 us. So rows are put together here by
hand, and everything that is not a row is written by the generated classes: the fields of one message may be serialised
apart and joined. A private twin of the descriptor with ``bytes`` fields gives the same bytes, but copies each row three
times: 139 us for 32 rows of 1024 against 16 us, so a twin is kept for requests only. It and the tags are derived from
the public descriptor at import, so that they cannot drift from it; the tests compare every byte with what the generated
classes write.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, unknown_fields
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from embedserve.api.encoding import EncodedRows, Encoding
from embedserve.engine.stages import Stages
from embedserve.model.backend import ModelIdentity
from embedserve.v1 import embedding_pb2 as pb
from embedserve.varint import varint

__all__ = [
    "DEFAULT_STREAM_MESSAGE_BYTES",
    "finish_unary",
    "identity_message",
    "max_response_bytes",
    "max_texts_unary",
    "parse_embed_request",
    "parse_embed_stream_request",
    "stage_timings",
    "stream_errors",
    "stream_messages",
    "stream_summary",
    "token_id_rows",
    "unary_parts",
]

DEFAULT_STREAM_MESSAGE_BYTES: Final = 1 << 20
"""One message of a stream stays under 1 MiB: a quarter of what clients accept, small enough to share a connection."""
_ROW_OVERHEAD_BYTES: Final = 36
"""The most that is written around one row: tag and length of the Embedding and of the row 5 each (rows are under
256 MB), index, token count and batch size 6 each, flag 2, scale 5; and one to spare."""
_MESSAGE_OVERHEAD_BYTES: Final = 1024
"""Identity, usage and timings: about 250 bytes, with room for a long model name."""

_VARINT: Final = 0
_FIXED32: Final = 5
_LENGTH_DELIMITED: Final = 2


def _tag(message: Any, field: str, wire_type: int) -> bytes:
    """The tag of ``field``, from the public descriptor."""
    return varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | wire_type)


_INDEX = _tag(pb.Embedding, "index", _VARINT)
_VALUES = _tag(pb.Embedding, "values", _LENGTH_DELIMITED)
_PACKED = _tag(pb.Embedding, "packed", _LENGTH_DELIMITED)
_TOKEN_COUNT = _tag(pb.Embedding, "token_count", _VARINT)
_TRUNCATED = _tag(pb.Embedding, "truncated", _VARINT) + b"\x01"
_BATCH_SIZE = _tag(pb.Embedding, "batch_size", _VARINT)
_SCALE = _tag(pb.Embedding, "scale", _FIXED32)
_EMBEDDINGS = _tag(pb.EmbedResponse, "embeddings", _LENGTH_DELIMITED)
_MODEL = _tag(pb.EmbedResponse, "model", _LENGTH_DELIMITED)
_TIMINGS = _tag(pb.EmbedResponse, "timings", _LENGTH_DELIMITED)
_SUMMARY = _tag(pb.EmbedStreamResponse, "summary", _LENGTH_DELIMITED)
_SUMMARY_MODEL = _tag(pb.EmbedStreamSummary, "model", _LENGTH_DELIMITED)
_SUMMARY_TIMINGS = _tag(pb.EmbedStreamSummary, "timings", _LENGTH_DELIMITED)

Part = bytes | memoryview


# Answers


def max_response_bytes(texts: int, row_bytes: int) -> int:
    """The most bytes that an ``EmbedResponse`` of ``texts`` rows can take."""
    return texts * (row_bytes + _ROW_OVERHEAD_BYTES) + _MESSAGE_OVERHEAD_BYTES


def max_texts_unary(row_bytes: int, max_message_bytes: int) -> int:
    """How many rows of ``row_bytes`` surely fit one ``EmbedResponse`` of ``max_message_bytes``."""
    return max(0, (max_message_bytes - _MESSAGE_OVERHEAD_BYTES) // (row_bytes + _ROW_OVERHEAD_BYTES))


def identity_message(identity: ModelIdentity) -> bytes:
    """Serialise the public ``ModelIdentity`` once, for all answers."""
    message = pb.ModelIdentity(name=identity.name, revision=identity.revision, weights_digest=identity.weights_digest)
    return message.SerializeToString()


@lru_cache(maxsize=1 << 14)
def _before_row(index: int, row_tag: bytes, row_bytes: int, after: int) -> bytes:
    """What stands before a row's bytes: tag and length of the Embedding, its index, tag and length of the row."""
    head = (_INDEX + varint(index) if index else b"") + row_tag + varint(row_bytes)
    return _EMBEDDINGS + varint(len(head) + row_bytes + after) + head


@lru_cache(maxsize=1 << 14)
def _after_row(token_count: int, truncated: bool, batch_size: int) -> bytes:
    """What stands after a row's bytes, but for the scale. Zeros are not written (proto3)."""
    return (
        (_TOKEN_COUNT + varint(token_count) if token_count else b"")
        + (_TRUNCATED if truncated else b"")
        + (_BATCH_SIZE + varint(batch_size) if batch_size else b"")
    )


def _add_rows(
    parts: list[Part],
    rows: EncodedRows,
    indexes: Sequence[int],
    columns: tuple[Sequence[int], Sequence[bool], Sequence[int]],
    first: int = 0,
) -> None:
    """Add row ``first + i`` of ``rows`` as the Embedding of ``indexes[i]``.

    ``columns`` are token counts, truncated flags and batch sizes, one for each row from row 0.
    """
    token_counts, truncated, batch_sizes = columns
    size = rows.row_bytes
    data = rows.data
    row_tag = _VALUES if rows.encoding is Encoding.FLOAT32 else _PACKED
    scales = None if rows.scales is None else rows.scales.tolist()
    start = first * size
    for row, index in enumerate(indexes, first):
        after = _after_row(token_counts[row], truncated[row], batch_sizes[row])
        if scales is not None and scales[row]:
            after += _SCALE + struct.pack("<f", scales[row])
        parts += (_before_row(index, row_tag, size, len(after)), data[start : start + size], after)
        start += size


def unary_parts(
    rows: EncodedRows,
    token_counts: Sequence[int],
    truncated: Sequence[bool],
    batch_sizes: Sequence[int],
    *,
    identity: bytes,
    dimensions: int,
    tokens: int,
    batches: int,
) -> list[Part]:
    """Everything of an ``EmbedResponse`` but its timings: give it to ``finish_unary``.

    The sequences hold one plain ``int`` or ``bool`` a row (``ndarray.tolist`` makes them); ``identity`` comes from
    ``identity_message``. Row i is text i. Nothing is copied yet: ``rows`` must not change until ``finish_unary``.
    """
    parts: list[Part] = []
    _add_rows(parts, rows, range(rows.rows), (token_counts, truncated, batch_sizes))
    rest = pb.EmbedResponse(
        dimensions=dimensions,
        encoding=rows.encoding,  # type: ignore[arg-type]  # an IntEnum with the proto's numbers
        usage=pb.Usage(texts=rows.rows, tokens=tokens, batches=batches),
    )
    parts += (_MODEL, varint(len(identity)), identity, rest.SerializeToString())
    return parts


def finish_unary(parts: list[Part], timings: bytes) -> bytes:
    """The ``EmbedResponse``; ``timings`` from ``stage_timings``. The one copy of the vectors happens here."""
    parts += (_TIMINGS, varint(len(timings)), timings)
    return b"".join(parts)


def stage_timings(stages: Stages) -> bytes:
    """A serialised ``Timings`` whose six stages add up to the total; a mark that was not reached takes no time."""
    arrived = stages.arrived_ns
    admitted = max(arrived, stages.validated_ns, stages.admitted_ns)
    tokenized = max(admitted, stages.tokenized_ns)
    dequeued = max(tokenized, stages.queued_ns, stages.dequeued_ns)
    assembled = max(dequeued, stages.assembled_ns)
    computed = max(assembled, stages.computed_ns)
    responded = max(computed, stages.responded_ns)
    return pb.Timings(
        validate_ms=(admitted - arrived) / 1e6,
        tokenize_ms=(tokenized - admitted) / 1e6,
        queue_ms=(dequeued - tokenized) / 1e6,
        assemble_ms=(assembled - dequeued) / 1e6,
        forward_ms=(computed - assembled) / 1e6,
        respond_ms=(responded - computed) / 1e6,
        total_ms=(responded - arrived) / 1e6,
    ).SerializeToString()


def stream_messages(
    rows: EncodedRows,
    indexes: Sequence[int],
    token_counts: Sequence[int],
    truncated: Sequence[bool],
    batch_sizes: Sequence[int],
    *,
    max_message_bytes: int = DEFAULT_STREAM_MESSAGE_BYTES,
) -> list[bytes]:
    """``EmbedStreamResponse`` messages with row i as the Embedding of ``indexes[i]``, as few as stay within the limit.

    A single row that is larger than the limit still goes, alone.
    """
    per_message = max(1, max_message_bytes // (rows.row_bytes + _ROW_OVERHEAD_BYTES))
    messages = []
    for first in range(0, rows.rows, per_message):
        parts: list[Part] = []
        _add_rows(parts, rows, indexes[first : first + per_message], (token_counts, truncated, batch_sizes), first)
        messages.append(b"".join(parts))
    return messages


def stream_errors(
    errors: Sequence[tuple[int, int, str, str]], *, max_message_bytes: int = DEFAULT_STREAM_MESSAGE_BYTES
) -> list[bytes]:
    """``EmbedStreamResponse`` messages with one ItemError for each ``(index, code, reason, message)``."""
    messages: list[bytes] = []
    response = pb.EmbedStreamResponse()
    size = 0
    for index, code, reason, message in errors:
        error = response.errors.add(index=index, code=code, reason=reason, message=message)
        size += error.ByteSize() + 6
        if size > max_message_bytes - _MESSAGE_OVERHEAD_BYTES:
            messages.append(response.SerializeToString())
            response, size = pb.EmbedStreamResponse(), 0
    if response.errors:
        messages.append(response.SerializeToString())
    return messages


def stream_summary(
    *,
    identity: bytes,
    dimensions: int,
    encoding: Encoding,
    texts: int,
    tokens: int,
    batches: int,
    failed: int,
    timings: bytes,
) -> bytes:
    """The last ``EmbedStreamResponse``; ``texts`` are those that got a vector."""
    rest = pb.EmbedStreamSummary(
        dimensions=dimensions,
        encoding=encoding,  # type: ignore[arg-type]
        usage=pb.Usage(texts=texts, tokens=tokens, batches=batches),
        failed=failed,
    ).SerializeToString()
    model = _SUMMARY_MODEL + varint(len(identity)) + identity
    summary = b"".join((model, rest, _SUMMARY_TIMINGS, varint(len(timings)), timings))
    return _SUMMARY + varint(len(summary)) + summary


# Requests


def _twin_classes() -> dict[str, Any]:
    """Copy the public file under another package, with ``TokenIds.ids`` as ``repeated bytes``: an item a packed run."""
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    package, twin = f".{file.package}.", "embedserve.twin.v1"
    file.name, file.package = f"{twin}/embedding.proto", twin
    del file.service[:]
    for message in file.message_type:
        for field in message.field:
            if field.HasField("type_name"):
                field.type_name = field.type_name.replace(package, f".{twin}.")
            if message.name == "TokenIds":
                field.type = FieldDescriptor.TYPE_BYTES  # type: ignore[assignment]
                field.ClearField("options")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{twin}.{name}"))
        for name in ("EmbedRequest", "EmbedStreamRequest")
    }


_TWINS = _twin_classes()

parse_embed_request = _TWINS["EmbedRequest"].FromString
"""``bytes`` to a message with the fields of ``EmbedRequest``, but for ``token_ids``, which ``token_id_rows`` reads.

Takes what the generated class takes (0.3 us for 8 texts). Raises ``google.protobuf.message.DecodeError``.
"""
parse_embed_stream_request = _TWINS["EmbedStreamRequest"].FromString
"""The same for ``EmbedStreamRequest``."""


def token_id_rows(request: Any) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
    """All token ids of a parsed request end to end, and how many each text has; one copy for all texts together.

    Raises ``DecodeError`` where the generated class would: when a run of ids is not a multiple of four bytes.
    """
    runs: list[bytes] = []
    lengths = []
    for message in request.token_ids:
        ids = message.ids
        run = ids[0] if len(ids) == 1 else b"".join(ids)
        if len(run) & 3:
            raise DecodeError("packed fixed32 whose length is not a multiple of 4")
        if not run or len(unknown_fields.UnknownFieldSet(message)):
            run = _unpacked(message, run)
        runs.append(run)
        lengths.append(len(run) >> 2)
    return np.frombuffer(b"".join(runs), dtype="<u4"), np.array(lengths, dtype=np.int32)


def _unpacked(message: Any, run: bytes) -> bytes:
    """Ids that were sent one by one, which parsers must take as well; the twin sees them as unknown fields."""
    ids = pb.TokenIds.FromString(message.SerializeToString()).ids
    if run and len(ids) != len(run) >> 2:
        # Known fields come before unknown ones when written again: the order between the two forms is lost.
        raise DecodeError("packed and unpacked ids in one message")
    return np.array(ids, dtype="<u4").tobytes()
