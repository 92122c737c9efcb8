"""Coverage-guided fuzzing of what happens to a request's bytes, by hand: ``make fuzz`` (Linux, CPython up to 3.11).

The target takes bytes through parsing and validation of each request. Anything but a caller's error is a finding;
libFuzzer prints the input. ``atheris`` has no wheel for every Python, so it is no dependency: what the suite runs is
``tests/property/test_decoder_fuzz.py``.
"""

from __future__ import annotations

import sys
from contextlib import suppress

import atheris

with atheris.instrument_imports(include=["embedserve"]):
    from google.protobuf.message import DecodeError

    from embedserve.api import wire
    from embedserve.api.validation import RequestLimits, RequestValidator
    from embedserve.errors import CallerError
    from embedserve.testing.backends import fake_identity
    from embedserve.v1 import embedding_pb2 as pb

VALIDATOR = RequestValidator(fake_identity(), RequestLimits())


def one(raw: bytes) -> None:
    """The first byte says which request the others are."""
    kind, raw = raw[:1], raw[1:]
    with suppress(DecodeError, CallerError):
        if kind < b"\x55":
            VALIDATOR.embed(wire.parse_embed_request(raw))
        elif kind < b"\xaa":
            VALIDATOR.embed_stream(wire.parse_embed_stream_request(raw))
        else:
            VALIDATOR.count_tokens(pb.CountTokensRequest.FromString(raw))


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
