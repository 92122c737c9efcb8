"""One RPC of the guarded service, as whoever handles it sees it.

Decides nothing. Must never know what a call asks for. What a handler needs to know of its call is in ``current_rpc()``:
a context variable does that in 40 ns, where a context of our own around grpc's would cost a Python call for each of its
methods.
"""

from __future__ import annotations

import contextvars

from embedserve.api.observer import CallTrace, Metadata, SilentCallTrace
from embedserve.engine.stages import Stages

__all__ = ["CALL", "Rpc", "current_rpc"]

_NO_TRACE = SilentCallTrace()


class Rpc:
    """One RPC of the guarded service. Times are ``time.monotonic_ns``."""

    __slots__ = (
        "arrived_ns",
        "attributes",
        "deadline_ns",
        "ended",
        "judged_unread",
        "metadata",
        "method",
        "received_ns",
        "refused",
        "stages",
        "trace",
    )

    def __init__(self, method: str, metadata: Metadata, arrived_ns: int) -> None:
        """The headers are here; the message may not be."""
        self.method = method
        """Full name without a leading slash."""
        self.metadata = metadata
        self.arrived_ns = arrived_ns
        """The guard saw the headers."""
        self.received_ns = arrived_ns
        """The whole message was here and parsed: a slow upload lies between ``arrived_ns`` and this."""
        self.deadline_ns: int | None = None
        """When the caller stops waiting; ``None`` when it set no deadline."""
        self.trace: CallTrace = _NO_TRACE
        self.attributes: dict[str, str | int | float | bool] = {}
        """What the handler wants traced and measured."""
        self.stages: Stages | None = None
        """Set by the handler once there is one."""
        self.refused: BaseException | None = None
        """What the headers alone forbid, or what went wrong at the door; raised where the client can be answered."""
        self.judged_unread = False
        """Whether a door has let it through."""
        self.ended = False


CALL: contextvars.ContextVar[Rpc] = contextvars.ContextVar("embedserve_call")
"""Set by the guard, in the task that grpc.aio runs interceptors and handler in."""


def current_rpc() -> Rpc:
    """The call that this task handles. Raises ``LookupError`` outside a guarded handler."""
    return CALL.get()
