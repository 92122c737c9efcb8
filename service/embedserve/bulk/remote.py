"""Texts to a server and vectors back, with patience.

Decides which failures of a call are worth another try, when, and with what. Must never know files or the order of a
run. Texts of one call are independent and embedding them twice is harmless, so that a call that breaks halfway is
repeated for the texts that are missing only.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from embedserve.bulk.outcome import BulkError, Failure, Options, Vector
from embedserve.bulk.request import request_of
from embedserve.v1 import embedding_pb2, embedding_pb2_grpc

__all__ = ["Remote", "Retry", "pause_before_retry"]

MESSAGE_BYTES_MAX: Final = 16 * 1024 * 1024
"""Largest answer taken: far over the 1 MiB that a stream's message may have."""
PUSHBACK: Final = "grpc-retry-pushback-ms"
"""Trailer with the server's word on when to come back; negative: never (gRFC A6)."""
BACKOFF_FIRST_MS: Final = 100
BACKOFF_MAX_MS: Final = 5000
"""Waits where the server gives no hint: 100 ms, doubling, to 5 s, as a restart with a large model takes a minute."""
JITTER: Final = 0.2
"""Waits are stretched by up to a fifth, so that calls that were refused together do not come back together."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How long to go on without any progress."""

    patience_ms: int = 120_000
    """A server that restarts with a large model is back within two minutes."""
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: Callable[[], float] = random.random
    """Uniform in [0, 1)."""


class Remote:
    """An ``Embedder`` that calls ``embedserve.v1.EmbeddingService`` at ``target``; close it after use."""

    def __init__(
        self,
        target: str,
        *,
        model: str = "",
        options: Options,
        revision: str = "",
        priority: Literal["interactive", "default", "bulk"] = "bulk",
        timeout_ms: int = 300_000,
        retry: Retry | None = None,
    ) -> None:
        """``target`` is any gRPC target; ``timeout_ms`` is the deadline of one call."""
        self._target = target
        self._model = model
        self._options = options
        self._revision = revision
        self._metadata = (("x-embedserve-priority", priority),)
        self._timeout_s = timeout_ms / 1000
        self._retry = retry or Retry()
        # Our own retries know about progress; gRPC's would repeat whole calls.
        channel_options = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX), ("grpc.enable_retries", 0)]
        self._channel = grpc.aio.insecure_channel(target, options=channel_options)
        self._stub = embedding_pb2_grpc.EmbeddingServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def dimensions(self) -> int:
        """Ask the server for its model. Raises ``BulkError`` where it has no such model, or never answers."""
        request = embedding_pb2.GetModelRequest(model=self._model)
        patience = _Patience(self._retry)
        while True:
            try:
                answer = await self._stub.GetModel(request, timeout=self._timeout_s, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                await self._pause(error, patience)
            else:
                return self._options.dimensions or int(answer.model.dimension)

    async def embed(self, texts: Sequence[str]) -> Sequence[Vector | Failure]:
        """One outcome a text, in order. Raises ``BulkError`` where the whole call is refused for good."""
        outcomes: dict[int, Vector | Failure] = {}
        patience = _Patience(self._retry)
        parts = [list(range(len(texts)))]
        while parts:
            part = parts.pop()
            try:
                await self._stream(texts, part, outcomes)
            except grpc.aio.AioRpcError as error:
                left = [index for index in part if index not in outcomes]
                if len(left) < len(part):
                    patience.renew()
                if _is_too_large(error):
                    parts += _halves(left, outcomes, error)
                    continue
                await self._pause(error, patience)
                parts.append(left)
        return [outcomes[index] for index in range(len(texts))]

    async def _stream(self, texts: Sequence[str], part: Sequence[int], outcomes: dict[int, Vector | Failure]) -> None:
        """One call for the texts that ``part`` names; what arrives goes to ``outcomes`` at once."""
        if not part:
            return
        chosen = [texts[index] for index in part]
        request = request_of(chosen, self._options, model=self._model, revision=self._revision)
        call = self._stub.EmbedStream(request, timeout=self._timeout_s, metadata=self._metadata)
        try:
            async for message in call:
                for embedding in message.embeddings:
                    values = np.array(embedding.values, dtype=np.float32)
                    outcomes[part[embedding.index]] = Vector(values, embedding.token_count, embedding.truncated)
                for error in message.errors:
                    # Its place in this call means nothing to whoever reads FILE:LINE.
                    said = error.message.removeprefix(f"texts[{error.index}]: ")
                    outcomes[part[error.index]] = Failure(error.reason, said)
        finally:
            call.cancel()
        missing = sum(index not in outcomes for index in part)
        if missing:
            raise BulkError(f"{self._target} ended a stream well, but without {missing} of its {len(part)} texts")

    async def _pause(self, error: grpc.aio.AioRpcError, patience: _Patience) -> None:
        pause_s = pause_before_retry(error, patience.attempt)
        why = f"{self._target}: {error.code().name}: {_details(error)}"
        if pause_s is None:
            raise BulkError(why) from error
        if patience.is_over():
            raise BulkError(f"{why} (no progress for {self._retry.patience_ms} ms)") from error
        await patience.pause(pause_s)


class _Patience:
    """Tries since the last progress, and whether they have gone on for too long."""

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self.attempt = 0
        self._waited_ms = 0.0

    def renew(self) -> None:
        """There was progress."""
        self.attempt = 0
        self._waited_ms = 0.0

    def is_over(self) -> bool:
        """Whether the waits have used the patience up. Time in calls is bounded by their deadlines, and not counted."""
        return self._waited_ms >= self._retry.patience_ms

    async def pause(self, seconds: float) -> None:
        """Wait before the next try."""
        stretched = seconds * (1 + JITTER * self._retry.random())
        self.attempt += 1
        self._waited_ms += stretched * 1000
        await self._retry.sleep(stretched)


def pause_before_retry(error: grpc.aio.AioRpcError, attempt: int) -> float | None:
    """Seconds to wait before try number ``attempt`` + 1, jitter not included; ``None`` where a retry is useless.

    UNAVAILABLE and RESOURCE_EXHAUSTED are worth it, unless the pushback trailer forbids it. The trailer comes first,
    then ``google.rpc.RetryInfo``, then exponential backoff.
    """
    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return None
    pushback = _pushback_ms(error)
    if pushback is not None:
        return pushback / 1000 if pushback >= 0 else None
    hint = _retry_info_s(error)
    return hint if hint is not None else min(BACKOFF_FIRST_MS * 2**attempt, BACKOFF_MAX_MS) / 1000


def _pushback_ms(error: grpc.aio.AioRpcError) -> int | None:
    for key, value in error.trailing_metadata() or ():
        if key == PUSHBACK:
            text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
            # gRFC A6: what is no number forbids the retry, as a negative number does.
            return int(text) if text.strip().lstrip("-").isdigit() else -1
    return None


def _status_details(error: grpc.aio.AioRpcError) -> Sequence[Any]:
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type] # has what it asks for, but not its base class
    except ValueError:  # the details disagree with the status: someone between us and the server wrote one of them
        return ()
    known = (error_details_pb2.RetryInfo, error_details_pb2.BadRequest)
    found: list[Any] = []
    for detail in status.details if status is not None else ():
        for kind in known:
            message = kind()
            if detail.Is(kind.DESCRIPTOR) and detail.Unpack(message):
                found.append(message)
    return found


def _retry_info_s(error: grpc.aio.AioRpcError) -> float | None:
    for detail in _status_details(error):
        if isinstance(detail, error_details_pb2.RetryInfo):
            return max(0.0, float(detail.retry_delay.seconds) + float(detail.retry_delay.nanos) / 1e9)
    return None


def _details(error: grpc.aio.AioRpcError) -> str:
    """The status's sentence, with every violation where the request was wrong."""
    violations = [
        f"{violation.field}: {violation.description}"
        for detail in _status_details(error)
        if isinstance(detail, error_details_pb2.BadRequest)
        for violation in detail.field_violations
    ]
    return "; ".join(violations) or error.details() or "no details"


def _is_too_large(error: grpc.aio.AioRpcError) -> bool:
    """Whether gRPC itself refused the message for its size: the same text again is useless, fewer texts are not."""
    return (
        error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        and "larger than max" in (error.details() or "")
        and _pushback_ms(error) is None
    )


def _halves(left: Sequence[int], outcomes: dict[int, Vector | Failure], error: grpc.aio.AioRpcError) -> list[list[int]]:
    if len(left) == 1:
        outcomes[left[0]] = Failure("MESSAGE_TOO_LARGE", error.details() or "the text alone is too large for a message")
        return []
    middle = len(left) // 2
    return [list(left[middle:]), list(left[:middle])]
