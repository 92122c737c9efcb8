"""Vectors into files: JSON lines, one NumPy array, or Parquet.

Decides what each format holds, and that a file appears under its name only when it is whole: until then it is
``NAME.partial``. A device or a named pipe is written to as it is, never replaced. Must never know where vectors come
from.
"""

from __future__ import annotations

import io
import select
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import orjson

from embedserve.bulk.outcome import BulkError, Failure, Vector
from embedserve.errors import InvariantBroken

__all__ = ["OutputFormat", "Row", "Sink", "open_sink"]

OutputFormat = Literal["jsonl", "npy", "parquet"]

ROW_GROUP_ROWS = 8192
"""Rows that Parquet keeps together: 12 MB at 384 components, large enough to compress, small enough to hold."""


@dataclass(frozen=True, slots=True)
class Row:
    """One text's outcome, as it is written."""

    index: int
    id: Any
    outcome: Vector | Failure


class Sink(ABC):
    """Takes rows in order. ``close`` makes the file whole; without it what was written stays as ``NAME.partial``."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Append rows. Raises ``OSError``; ``BrokenPipeError`` when nobody reads any more."""

    @abstractmethod
    def close(self) -> None:
        """Write what is held back and give the file its name."""

    @abstractmethod
    def abandon(self) -> None:
        """Close the file and leave it partial."""


def open_sink(form: OutputFormat, path: Path | None, dimensions: int) -> Sink:
    """A sink for vectors of ``dimensions`` components; ``path`` ``None`` is standard output, for JSONL only."""
    if path is None:
        if form != "jsonl":
            raise InvariantBroken(f"{form} to standard output")
        return JsonLines(_standard_output(), None)
    target = _Target(path)
    if form == "jsonl":
        return JsonLines(target.open(), target)
    if target.is_special:
        raise BulkError(f"{path} is a device or a pipe, and {form} is written back to its beginning at the end")
    if form == "npy":
        return Npy(target.open(), target, dimensions)
    return Parquet(_import_pyarrow(), target.open(), target, dimensions)


class _Unbuffered(io.FileIO):
    """A descriptor whose reader may stop reading, for ever.

    A thread that waits inside a buffered file holds its lock. Closing the file wants that lock, and so does an
    interpreter that ends: it would abort (``_enter_buffered_busy``), where an interrupt is to end the run.
    """

    def write(self, data: Any) -> int:
        """All of ``data``. Raises ``OSError``."""
        rest = memoryview(data)
        while rest:
            written = super().write(rest)
            if written is None:  # the one who gave it to us has made it non-blocking
                room = select.poll()
                room.register(self.fileno(), select.POLLOUT)
                room.poll()
            else:
                rest = rest[written:]
        return len(data)


def _standard_output() -> BinaryIO:
    if sys.stdout is None:
        raise BulkError("standard output is closed: nobody would have the vectors; name a file by --output")
    sys.stdout.flush()
    try:
        return _Unbuffered(sys.stdout.fileno(), "wb", closefd=False)
    except io.UnsupportedOperation:  # one that is no file, in a process that has put its own there
        return sys.stdout.buffer


class _Target:
    """Where a file is while it is written, and where it goes when it is whole."""

    def __init__(self, path: Path) -> None:
        # A link is followed, so that the file it names is replaced and not the link.
        self._path = path.resolve()
        self.is_special = path.exists() and not path.is_file()
        self._written = self._path if self.is_special else self._path.with_name(f"{self._path.name}.partial")

    def open(self) -> BinaryIO:
        try:
            # A special file has no size to read back, and its reader may keep us waiting.
            return _Unbuffered(self._written, "wb") if self.is_special else self._written.open("w+b")
        except OSError as error:
            raise BulkError(f"{self._written} cannot be written: {error.strerror or error}") from error

    def complete(self) -> None:
        if not self.is_special:
            self._written.replace(self._path)


class _File(Sink):
    """What the formats share: the file and its two names."""

    def __init__(self, file: BinaryIO, target: _Target | None) -> None:
        self._file = file
        self._target = target

    def close(self) -> None:
        self._file.flush()
        if self._target is not None:
            self._file.close()
            self._target.complete()

    def abandon(self) -> None:
        if self._target is None:
            return
        # What is in the buffer for a full disk or a broken pipe cannot be written now either; that was told before.
        with suppress(OSError):
            self._file.close()


class JsonLines(_File):
    """``{"index": 0, "id": ..., "embedding": [...], "token_count": 3, "truncated": false}``, one a line.

    A text that failed has ``"embedding": null`` and ``"error": {"reason": ..., "message": ...}``. Floats are written
    with as few digits as give the same float32 back. ``id`` is there when the input gives one.
    """

    def write(self, rows: Sequence[Row]) -> None:
        option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
        self._file.write(b"".join(orjson.dumps(_json(row), option=option) for row in rows))
        self._file.flush()


def _json(row: Row) -> dict[str, Any]:
    head: dict[str, Any] = {"index": row.index} | ({"id": row.id} if row.id is not None else {})
    if isinstance(row.outcome, Failure):
        return head | {"embedding": None, "error": {"reason": row.outcome.reason, "message": row.outcome.message}}
    vector = row.outcome
    return head | {
        "embedding": np.ascontiguousarray(vector.values),
        "token_count": vector.token_count,
        "truncated": vector.truncated,
    }


class Npy(_File):
    """One array, float32, shape ``[rows, dimensions]``; the row of a text that failed is NaN.

    The number of rows stands at the beginning of the file and is known at the end: NumPy's header leaves room for it.
    """

    def __init__(self, file: BinaryIO, target: _Target, dimensions: int) -> None:
        super().__init__(file, target)
        self._dimensions = dimensions
        self._rows = 0
        self._write_header()
        self._header_bytes = file.tell()

    def _write_header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._rows, self._dimensions)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, rows: Sequence[Row]) -> None:
        block = np.full((len(rows), self._dimensions), np.nan, dtype="<f4")
        for position, row in enumerate(rows):
            if isinstance(row.outcome, Vector):
                block[position] = row.outcome.values
        self._file.write(block.tobytes())
        self._rows += len(rows)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        if self._file.tell() != self._header_bytes:
            raise InvariantBroken("the header of the npy file has outgrown its room")
        super().close()


def _import_pyarrow() -> Any:
    """The extra that writes Parquet. Raises ``BulkError`` where it is not installed."""
    try:
        import pyarrow as pa  # noqa: PLC0415 (an extra)
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as error:
        raise BulkError(
            "writing Parquet needs pyarrow, which is not installed: pip install 'embedserve[parquet]', or choose "
            "--format npy or jsonl"
        ) from error
    return pa


class Parquet(_File):
    """Columns ``index``, ``id`` (as JSON), ``embedding`` (fixed size), ``token_count``, ``truncated``, ``error``."""

    def __init__(self, pa: Any, file: BinaryIO, target: _Target, dimensions: int) -> None:
        super().__init__(file, target)
        self._arrow = pa
        columns = [
            ("index", pa.int64()),
            ("id", pa.string()),
            ("embedding", pa.list_(pa.float32(), dimensions)),
            ("token_count", pa.int32()),
            ("truncated", pa.bool_()),
            ("error", pa.string()),
        ]
        self._schema = pa.schema(columns)
        self._writer = pa.parquet.ParquetWriter(file, self._schema)
        self._held: list[Row] = []

    def write(self, rows: Sequence[Row]) -> None:
        self._held += rows
        if len(self._held) >= ROW_GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        outcomes = [row.outcome for row in self._held]
        vectors = [outcome if isinstance(outcome, Vector) else None for outcome in outcomes]
        failures = [outcome if isinstance(outcome, Failure) else None for outcome in outcomes]
        columns = {
            "index": [row.index for row in self._held],
            "id": [None if row.id is None else orjson.dumps(row.id).decode() for row in self._held],
            "embedding": [None if vector is None else vector.values for vector in vectors],
            "token_count": [None if vector is None else vector.token_count for vector in vectors],
            "truncated": [None if vector is None else vector.truncated for vector in vectors],
            "error": [None if failure is None else f"{failure.reason}: {failure.message}" for failure in failures],
        }
        self._writer.write_table(self._arrow.table(columns, schema=self._schema))
        self._held.clear()

    def close(self) -> None:
        if self._held:
            self._write_group()
        self._writer.close()
        super().close()
