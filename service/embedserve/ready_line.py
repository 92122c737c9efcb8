"""The ready line: one line of JSON on standard output, once calls are taken.

Decides what it says and how it is written. Must never know when a process is ready.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import structlog

from embedserve.model.backend import ModelIdentity

__all__ = ["ready_facts", "write_ready_line"]


def ready_facts(
    identity: ModelIdentity, addresses: tuple[str, ...], operations: str | None, started_ns: int
) -> dict[str, Any]:
    """What whoever has started the process wants to know; ``started_ns`` is monotonic."""
    return {
        "type": "ready",
        "address": addresses[0] if addresses else None,
        "addresses": addresses,
        "operations": operations,
        "model": identity.name,
        "revision": identity.revision,
        "dimension": identity.dimension,
        "max_input_length": identity.max_input_length,
        "dtype": identity.dtype,
        "device": identity.device,
        "startup_ms": round((time.monotonic_ns() - started_ns) / 1e6),
        "pid": os.getpid(),
    }


def write_ready_line(line: bytes, logger: str) -> None:
    """Write ``line``; where that fails the process serves on, and the log of ``logger`` says so."""
    # Not through the interpreter's buffer: what cannot be written would fail its end, and the exit code with it.
    try:
        os.write(sys.stdout.fileno(), line + b"\n")
    except (OSError, AttributeError) as error:  # a full disk, a reader that has gone, a closed standard output
        structlog.get_logger(logger).warning("ready_line_lost", reason=str(error))
