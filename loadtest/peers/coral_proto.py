"""The messages of coral-gpu-inference 0.1.0, as far as a client needs them.

Decides the wire contract that we speak: names, numbers and types of fields, held against the installed package's own
descriptor before a server is started. The package ships generated code and no ``.proto``; importing that code here
would put its file into the process-wide descriptor pool and bind us to its protobuf release, so the same messages are
built in a pool of their own. The legacy rows (``repeated TensorRow``) are left out: the server never reads them.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["INFER", "InferRequest", "InferResponse", "differences", "installed_descriptor"]

INFER = "/gpu_inference.InferenceService/Infer"
PACKAGE = "gpu_inference"

_Field = descriptor_pb2.FieldDescriptorProto
STRING, BYTES, INT32, ENUM = _Field.TYPE_STRING, _Field.TYPE_BYTES, _Field.TYPE_INT32, _Field.TYPE_ENUM
COMPLETED = 0
STATUS = {"COMPLETED": COMPLETED, "ERROR": 1}

MESSAGES: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "InferRequest": {
        "request_id": (1, STRING),
        "bucket_max_len": (4, INT32),
        "max_wait_ms": (5, INT32),
        "input_ids_bytes": (6, BYTES),
        "attention_mask_bytes": (7, BYTES),
        "num_items": (8, INT32),
        "seq_len": (9, INT32),
    },
    "InferResponse": {
        "request_id": (1, STRING),
        "status": (2, ENUM),
        "embeddings_bytes": (7, BYTES),
        "embedding_dim": (8, INT32),
    },
}
"""Name of each field: its number and its type."""


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="loadtest/coral.proto", package=PACKAGE, syntax="proto3")
    status = file.enum_type.add(name="Status")
    for name, number in STATUS.items():
        status.value.add(name=name, number=number)
    for message, fields in MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            field = described.field.add(name=name, number=number, type=kind, label=_Field.LABEL_OPTIONAL)
            if kind == ENUM:
                field.type_name = f".{PACKAGE}.Status"
    return file


def _classes() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in MESSAGES}


_CLASSES = _classes()
InferRequest: Any = _CLASSES["InferRequest"]
InferResponse: Any = _CLASSES["InferResponse"]


def installed_descriptor(generated: Path) -> bytes:
    """The serialised file descriptor inside a generated ``_pb2.py``, which is read and not run.

    Raises ``ValueError`` where there is none.
    """
    for node in ast.walk(ast.parse(generated.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "AddSerializedFile"
        ):
            return bytes(ast.literal_eval(node.args[0]))
    raise ValueError(f"{generated} holds no serialised descriptor")


def differences(descriptor: bytes) -> list[str]:
    """Where a package's own descriptor is not what we speak; empty when it is."""
    file = descriptor_pb2.FileDescriptorProto.FromString(descriptor)
    theirs = {
        (message.name, field.name): (field.number, field.type)
        for message in file.message_type
        for field in message.field
    }
    ours = {(message, name): field for message, fields in MESSAGES.items() for name, field in fields.items()}
    found = [
        f"{'.'.join(key)} is {theirs.get(key)}, not {field}" for key, field in ours.items() if theirs.get(key) != field
    ]
    statuses = {value.name: value.number for enum in file.enum_type if enum.name == "Status" for value in enum.value}
    methods = {f"/{file.package}.{service.name}/{method.name}" for service in file.service for method in service.method}
    found += [] if statuses == STATUS else [f"Status is {statuses}, not {STATUS}"]
    return found + ([] if INFER in methods else [f"there is no {INFER}"])
