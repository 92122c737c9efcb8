"""Texts out of files: one a line, or one a JSON object.

Decides what a text is, where it is said to come from, and how many are taken together. Must never know what is done
with them. A line that cannot be read is a text with a problem, for the run's own rule on errors to judge.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson

__all__ = ["STDIN", "InputFormat", "Text", "chunked", "read_texts"]

InputFormat = Literal["lines", "jsonl"]

STDIN = "-"
LINE_BYTES_MAX = 16 * 1024 * 1024
"""A line with its end beyond this is not held in memory. No server takes a larger message by default."""
TOO_LONG = f"the line is longer than {LINE_BYTES_MAX} bytes"
CHUNK_BYTES_MAX = 4 * 1024 * 1024
"""Text in one call: far under a server's 16 MiB, and what gRPC itself takes by default."""


@dataclass(frozen=True, slots=True)
class Text:
    """One text of the input."""

    index: int
    """Its place in the whole input, from 0."""
    place: str
    """``FILE:LINE``, for messages."""
    text: str
    id: Any = None
    """What the id field of its JSON object holds."""
    problem: str | None = None
    """Why it could not be read; ``text`` is empty then."""


def read_texts(files: Sequence[str], form: InputFormat, *, field: str, id_field: str | None) -> Iterator[Text]:
    """Every text of ``files`` in order; ``-`` is standard input. A blank line is a text of ``lines``, none of JSONL."""
    index = 0
    for name in files:
        with _standard_input() if name == STDIN else Path(name).open("rb") as stream:
            for number, line in enumerate(_lines(stream), start=1):
                place = f"{'<stdin>' if name == STDIN else name}:{number}"
                if form == "lines":
                    yield _plain(line, index, place)
                elif line is None or line.strip():
                    yield _json(line, index, place, field=field, id_field=id_field)
                else:
                    continue
                index += 1


def _standard_input() -> AbstractContextManager[BinaryIO]:
    """Standard input through a buffer of our own.

    A thread that waits in ``sys.stdin`` holds its lock, and an interpreter that ends after an interrupt wants it: it
    aborts ("could not acquire lock at interpreter shutdown").
    """
    if sys.stdin is None:
        from embedserve.bulk.outcome import BulkError  # noqa: PLC0415 (brings numpy, and the command line knows us)

        raise BulkError("standard input is closed; name a file to read texts from")
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except (OSError, ValueError):  # no descriptor behind it
        return nullcontext(sys.stdin.buffer)


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Lines without their ends; ``None`` for one that is too long to hold."""
    while line := stream.readline(LINE_BYTES_MAX + 1):
        if len(line) <= LINE_BYTES_MAX:
            yield line.rstrip(b"\r\n")
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(LINE_BYTES_MAX)
        yield None


def _plain(line: bytes | None, index: int, place: str) -> Text:
    if line is None:
        return Text(index, place, "", problem=TOO_LONG)
    try:
        return Text(index, place, line.decode())
    except UnicodeDecodeError as error:
        return Text(index, place, "", problem=f"not UTF-8: {error.reason} at byte {error.start}")


def _json(line: bytes | None, index: int, place: str, *, field: str, id_field: str | None) -> Text:
    if line is None:
        return Text(index, place, "", problem=TOO_LONG)
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Text(index, place, "", problem=f"not JSON: {error}")
    if not isinstance(entry, dict):
        return Text(index, place, "", problem="not a JSON object")
    own_id = entry.get(id_field) if id_field is not None else None
    text = entry.get(field)
    if not isinstance(text, str):
        known = ", ".join(map(repr, entry)) or "none"
        return Text(index, place, "", own_id, problem=f"its field {field!r} is no text; fields: {known}")
    return Text(index, place, text, own_id)


def chunked(texts: Iterable[Text], items_max: int) -> Iterator[list[Text]]:
    """Texts in groups of ``items_max``, fewer where they are long."""
    chunk: list[Text] = []
    size = 0
    for text in texts:
        # UTF-8 takes 4 bytes a character at most: a bound that costs nothing, not a count.
        weight = len(text.text) if text.text.isascii() else 4 * len(text.text)
        if chunk and (len(chunk) == items_max or size + weight > CHUNK_BYTES_MAX):
            yield chunk
            chunk, size = [], 0
        chunk.append(text)
        size += weight
    if chunk:
        yield chunk
