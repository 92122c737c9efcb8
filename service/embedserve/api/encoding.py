"""How vectors become bytes: the seven encodings that the proto's ``Encoding`` defines.

Decides rounding, scales and bit order, for all rows of an answer at once. Must never know messages, calls or models: it
takes an array and gives a buffer. Rows must be finite; the engine never hands over others.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

__all__ = ["EncodedRows", "Encoding", "encode", "row_bytes"]

INT8_LEVELS = 127
"""Steps on each side of zero: symmetric, so that a vector and its negation have the same error."""
UINT8_OFFSET = 128
"""What UINT8 adds to INT8."""


class Encoding(IntEnum):
    """The proto's ``Encoding``, with ``UNSPECIFIED`` already read as ``FLOAT32``; numbers are the wire's."""

    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    INT8 = 4
    UINT8 = 5
    BINARY = 6
    UBINARY = 7


_BITS_PER_COMPONENT = {
    Encoding.FLOAT32: 32,
    Encoding.FLOAT16: 16,
    Encoding.BFLOAT16: 16,
    Encoding.INT8: 8,
    Encoding.UINT8: 8,
    Encoding.BINARY: 1,
    Encoding.UBINARY: 1,
}


class EncodedRows:
    """The bytes of ``rows`` vectors, end to end, ``row_bytes`` each."""

    __slots__ = ("data", "encoding", "row_bytes", "rows", "scales")

    def __init__(
        self,
        data: npt.NDArray[np.generic],
        encoding: Encoding,
        scales: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Take ``data`` of shape ``[rows, ...]``, C-contiguous, and ``scales`` of shape ``[rows]`` or none."""
        self.data = memoryview(data.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # has the buffer protocol
        """All rows; keeps the array alive."""
        self.encoding = encoding
        self.rows = len(data)
        self.row_bytes = data.nbytes // len(data) if len(data) else 0
        self.scales = scales
        """What one step is worth in each row; ``None`` for encodings without a scale."""


def row_bytes(encoding: Encoding, dimensions: int) -> int:
    """Bytes of one vector of ``dimensions`` components; binary encodings need a multiple of 8."""
    return _BITS_PER_COMPONENT[encoding] * dimensions // 8


def encode(vectors: npt.NDArray[np.float32], encoding: Encoding) -> EncodedRows:
    """Encode ``vectors`` of shape ``[n, d]``, all finite. FLOAT32 copies nothing when they are C-contiguous."""
    vectors = np.ascontiguousarray(vectors, dtype="<f4")
    if encoding is Encoding.FLOAT32:
        return EncodedRows(vectors, encoding)
    if encoding is Encoding.FLOAT16:
        with np.errstate(over="ignore"):  # over 65504 becomes infinite, as the proto says
            return EncodedRows(vectors.astype("<f2"), encoding)
    if encoding is Encoding.BFLOAT16:
        return EncodedRows(_bfloat16(vectors), encoding)
    if encoding in (Encoding.INT8, Encoding.UINT8):
        return _eight_bit(vectors, encoding)
    return _one_bit(vectors, encoding)


def _bfloat16(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest even by adding just under half of the last kept bit, and that bit itself on a tie."""
    bits = vectors.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    return rounded.astype("<u2")


def _eight_bit(vectors: npt.NDArray[np.float32], encoding: Encoding) -> EncodedRows:
    """Scale each row so that its largest magnitude becomes 127."""
    scales = np.abs(vectors).max(axis=1) / np.float32(INT8_LEVELS)
    # A row of zeros, or one so small that its scale underflows, has scale 0 and decodes to zeros.
    divisors = np.where(scales > 0, scales, np.float32(1))
    levels = vectors / divisors[:, np.newaxis]
    np.rint(levels, out=levels)
    # A scale that is subnormal has lost bits, and then the quotient may pass 127.
    np.clip(levels, -INT8_LEVELS, INT8_LEVELS, out=levels)
    if encoding is Encoding.INT8:
        return EncodedRows(levels.astype(np.int8), encoding, scales)
    levels += UINT8_OFFSET
    return EncodedRows(levels.astype(np.uint8), encoding, scales)


def _one_bit(vectors: npt.NDArray[np.float32], encoding: Encoding) -> EncodedRows:
    """Pack signs, first component in the highest bit; BINARY reads each byte as signed with 128 subtracted."""
    packed = np.packbits(vectors > 0, axis=1)
    if encoding is Encoding.BINARY:
        packed ^= np.uint8(0x80)  # subtracting 128 from a byte flips its highest bit
    return EncodedRows(packed, encoding)
