"""What a gRPC server says in HTTP/2 frames."""

from __future__ import annotations

from hpack import Encoder
from hyperframe.frame import DataFrame, Frame, HeadersFrame

from loadtest.header_block import literal

__all__ = ["answer_frames"]


def answer_frames(
    number: int, message: bytes = b"vector", *, huffman: bool = False, **trailers: str
) -> tuple[Frame, Frame, Frame]:
    """Head, message and trailers of the answer on stream ``number``; without ``trailers`` all is well."""
    encoder = Encoder()
    encoder.header_table_size = 0
    fields = [(name.replace("_", "-"), value) for name, value in trailers.items()] or [("grpc-status", "0")]
    block = encoder.encode(fields, huffman=True) if huffman else b"".join(literal(n, v) for n, v in fields)
    return (
        HeadersFrame(number, encoder.encode([(":status", "200")]), flags=["END_HEADERS"]),
        DataFrame(number, b"\0" + len(message).to_bytes(4, "big") + message),
        HeadersFrame(number, block, flags=["END_HEADERS", "END_STREAM"]),
    )
