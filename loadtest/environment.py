"""What a process that is started for a measurement gets of the caller's environment.

Decides which variables are left out: those that would change what is measured, which the measurement itself may give.
Must never know what is started.
"""

from __future__ import annotations

import os
from typing import Final

__all__ = ["FOREIGN", "without_foreign"]

FOREIGN: Final = ("OTEL_", "EMBEDSERVE_", "GRPC_")
"""How variables begin that change what embedserve, its telemetry and gRPC do, in servers and in clients."""


def without_foreign(*more: str) -> dict[str, str]:
    """The caller's environment without ``FOREIGN`` and without what begins as one of ``more``."""
    return {name: value for name, value in os.environ.items() if not name.startswith((*FOREIGN, *more))}
