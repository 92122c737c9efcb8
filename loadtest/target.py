"""What a load generator drives: a server that takes texts and gives vectors, whatever protocol it speaks.

Decides what every target must tell about one call. It must never know a schedule, a statistic or how the server came to
run: ``loadtest.peers`` starts servers, ``python -m loadtest run`` drives what already listens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

__all__ = ["NO_CONNECTION", "Reply", "Target"]


@dataclass(frozen=True, slots=True)
class Reply:
    """How one call ended, as its caller saw it."""

    status: str
    """``OK``, a gRPC status by its name, or the nearest gRPC status of an HTTP one."""
    reason: str = ""
    """Why it was refused, in the server's own word (``google.rpc.ErrorInfo``), or empty."""
    retry_after_ms: float | None = None
    """When the server says to come back, or ``None``."""
    items: int = 0
    """Vectors received."""
    batch_items: int = 0
    """Items in the batch that this call rode in; 0 where the server does not say."""
    tokens: int = 0
    """Tokens of this call's texts; 0 where the server does not say."""
    padding_efficiency: float = 0.0
    """Useful over computed tokens of that batch; 0 where the server does not say."""
    server_ms: float = 0.0
    """From arrival to the finished answer, by the server's own clock; 0 where it does not say."""
    first_ms: float = 0.0
    """From sending to the first vector of a stream; 0 of a call that is answered at once."""


NO_CONNECTION: Final = Reply("UNAVAILABLE", "NO_CONNECTION")
"""Nobody took the connection that the call needed: the server was not there. Not told of a connection that was cut."""


class Target(Protocol):
    """One connection, or pool of them, to the server under test. Used by one event loop."""

    async def open(self) -> None:
        """Connect, and wait until the server answers. Raises ``ConnectionError`` with a sentence after 10 s."""
        ...

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Reply:
        """Send one call and wait for its end. What the server answers is a ``Reply``; nothing is raised for it."""
        ...

    async def close(self) -> None:
        """Give up the connection."""
        ...
