"""When an answer is late.

Decides from where a call's deadline counts: from the instant at which it was sent, as gRPC counts it, however late the
client was with it. Must never know a status or a load. An answer that is late is none: every client here tells it as
DEADLINE_EXCEEDED, since a caller with that deadline would have gone by then.
"""

from __future__ import annotations

__all__ = ["is_late"]


def is_late(sent: float, ended: float, timeout_s: float | None) -> bool:
    """Whether a call that was sent and ended at these seconds took longer than ``timeout_s``; none is never over."""
    return timeout_s is not None and ended - sent > timeout_s
