"""The seven encodings, against their definitions in the proto and against other people's code."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from embedserve.api.encoding import EncodedRows, Encoding, encode, row_bytes
from embedserve.v1 import embedding_pb2 as pb

VECTORS = np.random.default_rng(7).standard_normal((5, 48)).astype(np.float32)
FINITE = arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.sampled_from([8, 16, 24])),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def decoded(rows: EncodedRows, dtype: str) -> np.ndarray:
    return np.frombuffer(rows.data, dtype=dtype).reshape(rows.rows, -1)


class TestEveryEncoding:
    def test_numbers_are_the_protos(self) -> None:
        """Each encoding has the number that the proto gives it, and none is missing."""
        named = {f"ENCODING_{encoding.name}": int(encoding) for encoding in Encoding}

        assert {**named, "ENCODING_UNSPECIFIED": 0} == dict(pb.Encoding.items())

    @pytest.mark.parametrize("encoding", list(Encoding))
    def test_row_bytes_is_what_encode_writes(self, encoding: Encoding) -> None:
        """The size that validation counts with is the size that is sent."""
        rows = encode(VECTORS, encoding)

        assert rows.row_bytes == row_bytes(encoding, 48)
        assert len(rows.data) == rows.rows * rows.row_bytes
        assert rows.encoding is encoding

    @pytest.mark.parametrize("encoding", list(Encoding))
    def test_rows_do_not_depend_on_their_neighbours(self, encoding: Encoding) -> None:
        """A row that is encoded alone gives the same bytes."""
        rows = encode(VECTORS, encoding)
        alone = [bytes(encode(VECTORS[i : i + 1], encoding).data) for i in range(len(VECTORS))]

        assert b"".join(alone) == bytes(rows.data)

    @pytest.mark.parametrize("encoding", list(Encoding))
    def test_rows_that_are_not_contiguous(self, encoding: Encoding) -> None:
        """A view with strides is encoded as its copy would be."""
        view = VECTORS[::2, :40]

        assert bytes(encode(view, encoding).data) == bytes(encode(view.copy(), encoding).data)

    def test_no_rows(self) -> None:
        """No rows are no bytes."""
        assert encode(VECTORS[:0], Encoding.FLOAT32).row_bytes == 0


class TestFloats:
    def test_float32_is_not_copied(self) -> None:
        """The buffer is the array's own memory."""
        rows = encode(VECTORS, Encoding.FLOAT32)

        assert np.shares_memory(np.frombuffer(rows.data, dtype=np.uint8), VECTORS)

    @given(FINITE)
    def test_float16_is_ieee_round_to_nearest_even(self, vectors: np.ndarray) -> None:
        """Bit for bit what torch makes of it."""
        expected = torch.from_numpy(vectors).to(torch.float16).view(torch.int16).numpy()

        assert np.array_equal(decoded(encode(vectors, Encoding.FLOAT16), "<i2"), expected)

    def test_float16_over_its_range_is_infinite(self) -> None:
        """65504 is the largest; 65520 and more round to infinity, without a warning."""
        rows = encode(np.array([[65504, -65504, 65520, -1e30]], dtype=np.float32), Encoding.FLOAT16)

        assert decoded(rows, "<f2").tolist() == [[65504, -65504, np.inf, -np.inf]]

    @given(FINITE)
    def test_bfloat16_rounds_to_nearest_even(self, vectors: np.ndarray) -> None:
        """Bit for bit what torch makes of it, infinities of overflow included."""
        expected = torch.from_numpy(vectors).to(torch.bfloat16).view(torch.int16).numpy()

        assert np.array_equal(decoded(encode(vectors, Encoding.BFLOAT16), "<i2"), expected)

    def test_bfloat16_ties_go_to_even(self) -> None:
        """1 + 2^-8 lies between 1 and 1 + 2^-7: 1 is even. 1 + 3 * 2^-8 goes up."""
        rows = encode(np.array([[1 + 2**-8, 1 + 3 * 2**-8]], dtype=np.float32), Encoding.BFLOAT16)

        assert decoded(rows, "<u2").tolist() == [[0x3F80, 0x3F82]]


class TestEightBit:
    @given(FINITE)
    def test_int8_is_within_half_a_step(self, vectors: np.ndarray) -> None:
        """Multiplying by the scale gives x back to half a step, and the largest magnitude is 127."""
        rows = encode(vectors, Encoding.INT8)
        assert rows.scales is not None
        scales = rows.scales.astype(np.float64)[:, np.newaxis]
        levels = decoded(rows, "i1").astype(np.float64)
        normal = (rows.scales > np.finfo(np.float32).tiny)[:, np.newaxis]

        assert np.abs(levels).max() <= 127
        assert np.all(np.where(normal, np.abs(levels * scales - vectors) <= scales * 0.50001, True))
        assert np.all(np.where(normal[:, 0], np.abs(levels).max(axis=1) == 127, True))

    @given(FINITE)
    def test_uint8_is_int8_and_128(self, vectors: np.ndarray) -> None:
        """The same levels and scales, moved by 128."""
        signed, unsigned = encode(vectors, Encoding.INT8), encode(vectors, Encoding.UINT8)

        assert np.array_equal(decoded(signed, "i1").astype(np.int16) + 128, decoded(unsigned, "u1").astype(np.int16))
        assert np.array_equal(signed.scales, unsigned.scales)

    def test_each_row_has_its_own_scale(self) -> None:
        """A small vector loses nothing to a large one beside it."""
        rows = encode(np.array([[127, -127, 0, 1], [0.127, -0.127, 0, 0.001]], dtype=np.float32), Encoding.INT8)

        assert decoded(rows, "i1").tolist() == [[127, -127, 0, 1]] * 2
        assert rows.scales == pytest.approx([1, 0.001])

    def test_zeros(self) -> None:
        """A vector of zeros has scale 0 and decodes to zeros; in UINT8 its bytes are 128."""
        zeros = np.zeros((1, 8), dtype=np.float32)

        assert decoded(encode(zeros, Encoding.INT8), "i1").tolist() == [[0] * 8]
        assert decoded(encode(zeros, Encoding.UINT8), "u1").tolist() == [[128] * 8]
        assert encode(zeros, Encoding.INT8).scales == [0]

    def test_the_smallest_numbers_do_not_overflow(self) -> None:
        """Subnormal vectors, whose scale has lost its bits, stay within -127 to 127."""
        tiny = np.array([[1e-45, -1e-45, 3e-44, 2e-43, 0, 0, 0, 0]], dtype=np.float32)

        assert np.abs(decoded(encode(tiny, Encoding.INT8), "i1").astype(int)).max() <= 127


class TestOneBit:
    @pytest.mark.parametrize(
        ("encoding", "precision", "dtype"), [(Encoding.BINARY, "binary", "i1"), (Encoding.UBINARY, "ubinary", "u1")]
    )
    def test_as_sentence_transformers(self, encoding: Encoding, precision: str, dtype: str) -> None:
        """Byte for byte what ``quantize_embeddings`` gives, zeros included."""
        from sentence_transformers.util.quantization import quantize_embeddings  # noqa: PLC0415  # 5 s, only here

        vectors = VECTORS.copy()
        vectors[:, ::5] = 0

        assert np.array_equal(decoded(encode(vectors, encoding), dtype), quantize_embeddings(vectors, precision))

    def test_bit_order(self) -> None:
        """The first component is the highest bit, and 0 is not positive."""
        row = np.array([[1, -1, 0, 1, -0.0, -5, 2, 1e-45]], dtype=np.float32)

        assert decoded(encode(row, Encoding.UBINARY), "u1").tolist() == [[0b10010011]]
        assert decoded(encode(row, Encoding.BINARY), "i1").tolist() == [[0b10010011 - 128]]
