"""Servers that are not there: targets whose behaviour is known to the millisecond."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from loadtest.target import Reply


class Prompt:
    """Answers at once, and remembers what it was sent."""

    def __init__(self) -> None:
        self.sent: list[Sequence[str]] = []

    async def open(self) -> None:
        pass

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Reply:
        self.sent.append(texts)
        await asyncio.sleep(0)
        return Reply("OK", items=len(texts), tokens=3 * len(texts), batch_items=2, server_ms=0.5)

    async def close(self) -> None:
        pass


class Stalling(Prompt):
    """Holds the whole client up once, for 0.4 s in the 20th call."""

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Reply:
        self.sent.append(texts)
        if len(self.sent) == 20:
            time.sleep(0.4)  # noqa: ASYNC251 - the client itself is held up, which is the point
        return Reply("OK", items=len(texts))


class Slow(Prompt):
    """Takes 5 ms of the client's own time for each call: more than 200 calls a second it cannot send."""

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Reply:
        time.sleep(0.005)  # noqa: ASYNC251 - as above
        return Reply("OK", items=len(texts))


class Refusing(Prompt):
    """Answers every second call."""

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Reply:
        self.sent.append(texts)
        await asyncio.sleep(0)
        if len(self.sent) % 2:
            return Reply("RESOURCE_EXHAUSTED", "QUEUE_FULL", retry_after_ms=25.0)
        return Reply("OK", items=len(texts))


class Hanging(Prompt):
    """Never answers, whatever the deadline."""

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError


class Absent(Prompt):
    """Nobody listens."""

    async def open(self) -> None:
        raise ConnectionError("nobody:1 cannot be reached")


class Broken(Prompt):
    """Raises, which no target may."""

    async def embed(self, texts: Sequence[str], *, timeout_s: float) -> Reply:
        raise RuntimeError("a fault of the target")
