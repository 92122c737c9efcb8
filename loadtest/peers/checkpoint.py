"""A copy of a checkpoint whose tensors have other names and the same bytes.

Decides how a safetensors file is renamed: only its header is written anew, the data is copied as it lies, so that no
library can change a value on the way. Must never know which peer wants it or why. Format: an unsigned 64-bit
little-endian length, a JSON header of that length, padded with spaces to 8 bytes, and the tensors' bytes
(github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["prefixed_copy"]

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
HEADER_BYTES_MAX = 100_000_000
"""The format's own limit."""
ALIGNMENT = 8
METADATA = "__metadata__"


def prefixed_copy(source: Path, folder: Path, prefix: str, *, config: Mapping[str, Any] | None = None) -> Path:
    """Copy the checkpoint ``source`` to ``folder``, each tensor's name with ``prefix`` before it; give ``folder`` back.

    ``config`` is laid over ``config.json``. A folder that is already there is made anew. Raises ``ValueError`` where
    the weights are not one safetensors file.
    """
    if not (source / WEIGHTS).is_file():
        raise ValueError(
            f"{source} has no {WEIGHTS}: only checkpoints whose weights are one safetensors file are copied"
        )
    made = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(source, made, ignore=shutil.ignore_patterns(WEIGHTS, "__pycache__"))
    _rename_tensors(source / WEIGHTS, made / WEIGHTS, prefix)
    if config:
        path = made / CONFIG
        path.write_text(
            json.dumps({**json.loads(path.read_text(encoding="utf-8")), **config}, indent=2), encoding="utf-8"
        )
    shutil.rmtree(folder, ignore_errors=True)
    # Renamed when it is whole: an interrupted copy is never taken for a checkpoint.
    made.rename(folder)
    return folder


def _rename_tensors(source: Path, copy: Path, prefix: str) -> None:
    with source.open("rb") as old, copy.open("wb") as new:
        (length,) = struct.unpack("<Q", old.read(8))
        if length > HEADER_BYTES_MAX:
            raise ValueError(f"{source} is not a safetensors file: its header would have {length} bytes")
        header = json.loads(old.read(length))
        renamed = {name if name == METADATA else prefix + name: entry for name, entry in header.items()}
        text = json.dumps(renamed, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        new.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(old, new, 1 << 20)
