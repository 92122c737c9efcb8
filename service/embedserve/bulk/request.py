"""The request that a run's options make, for a server and for this process alike.

Decides how options are spelled in the API. Must never know where the request goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from embedserve.bulk.outcome import Options
from embedserve.v1 import embedding_pb2

__all__ = ["request_of"]

TRUNCATE: Final[Mapping[str, embedding_pb2.Truncate]] = {
    "none": embedding_pb2.TRUNCATE_NONE,
    "end": embedding_pb2.TRUNCATE_END,
    "start": embedding_pb2.TRUNCATE_START,
}


def request_of(
    texts: Sequence[str], options: Options, *, model: str = "", revision: str = ""
) -> embedding_pb2.EmbedStreamRequest:
    """``EmbedStreamRequest`` for ``texts``; what ``options`` leaves open is absent."""
    request = embedding_pb2.EmbedStreamRequest(
        model=model, texts=texts, truncate=TRUNCATE[options.truncate], expected_revision=revision
    )
    if options.dimensions is not None:
        request.dimensions = options.dimensions
    if options.normalize is not None:
        request.normalize = options.normalize
    if options.prompt_name is not None:
        request.prompt_name = options.prompt_name
    return request
