"""Server reflection under both of its names.

Decides which services are listed. Must never know what they do. ``grpcio-reflection`` registers ``v1alpha`` only, and a
client that speaks ``v1`` alone does not find it; the messages of the two are the same on the wire (gRFC A53 renamed the
package and nothing else), so one servicer answers both.
"""

from __future__ import annotations

from typing import Final

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.reflection import aio as reflection_aio

__all__ = ["SERVICE_NAMES", "add_reflection"]

_ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"
_V1: Final = "grpc.reflection.v1.ServerReflection"
_V1_FILE: Final = "grpc/reflection/v1/reflection.proto"
SERVICE_NAMES: Final = (_ALPHA, _V1)
"""Names under which reflection itself is served."""


def add_reflection(server: grpc.aio.Server, services: tuple[str, ...]) -> None:
    """Let ``server`` describe ``services``, by full name, and reflection itself."""
    _describe_v1()
    servicer = reflection_aio.ReflectionServicer((*services, *SERVICE_NAMES))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_V1, {"ServerReflectionInfo": handler}),))


def _describe_v1() -> None:
    """Put v1's file into the pool, so that what is listed can be described: v1alpha's with the package renamed."""
    pool = descriptor_pool.Default()
    try:
        pool.FindFileByName(_V1_FILE)
    except KeyError:
        file = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(file)
        file.name, file.package = _V1_FILE, "grpc.reflection.v1"
        old, new = ".grpc.reflection.v1alpha.", ".grpc.reflection.v1."
        for message in file.message_type:
            for field in filter(lambda field: field.HasField("type_name"), message.field):
                field.type_name = field.type_name.replace(old, new)
        for service in file.service:
            for method in service.method:
                method.input_type = method.input_type.replace(old, new)
                method.output_type = method.output_type.replace(old, new)
        pool.AddSerializedFile(file.SerializeToString())
