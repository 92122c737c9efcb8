"""Server reflection under both of its names.

Decides which services are listed. Must never know what they do. ``grpcio-reflection`` registers ``v1alpha`` only, and a
client that speaks ``v1`` alone does not find it; the messages of the two are the same on the wire (gRFC A53 renamed the
package and nothing else), so one servicer answers both.
"""

from __future__ import annotations

from typing import Final

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.reflection import aio as reflection_aio

__all__ = ["SERVICE_NAMES", "add_reflection"]

_ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"
_V1: Final = "grpc.reflection.v1.ServerReflection"
SERVICE_NAMES: Final = (_ALPHA, _V1)
"""Names under which reflection itself is served."""


def add_reflection(server: grpc.aio.Server, services: tuple[str, ...]) -> None:
    """Let ``server`` describe ``services``, by full name, and reflection itself."""
    # ``v1`` is not listed: its file is not in the descriptor pool, and a name that cannot be described breaks
    # clients that describe all they see.
    servicer = reflection_aio.ReflectionServicer((*services, _ALPHA))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_V1, {"ServerReflectionInfo": handler}),))
