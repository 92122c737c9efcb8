"""What a client sees: vectors decoded by the proto's own words, and errors with everything that they carry."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from embedserve.model.backend import WarmPass
from embedserve.model.tokenizer import Truncation
from embedserve.testing import FakeBackend, tiny_tokenizer
from embedserve.testing.backends import fake_vector
from embedserve.v1 import embedding_pb2 as pb

SERVICE = "embedserve.v1.EmbeddingService"
DIMENSION = 16
MAX_INPUT = 128
LIMIT_S = 15.0
"""Nothing in these tests takes a second; what takes this long hangs."""
WORDS = ["the", "world", "says", "hello", "to", "a", "text", "that", "nobody", "has", "read", "before", "today"]

TOKENIZER = tiny_tokenizer(MAX_INPUT)


def token_ids(text: str, *, prompt: str = "", truncation: Truncation = Truncation.END) -> np.ndarray:
    """What the server's tokenizer makes of ``text``."""
    return TOKENIZER.encode([text], truncation=truncation, prompt=prompt).ids


def expected(text: str, *, normalize: bool = True, **how: Any) -> np.ndarray:
    """The fake model's vector of ``text``."""
    return fake_vector(token_ids(text, **how), DIMENSION, normalize=normalize)


def poison_id() -> int:
    return int(token_ids("poison")[1])


def values(embedding: pb.Embedding) -> np.ndarray:
    return np.array(embedding.values, dtype=np.float32)


@dataclass
class Failure:
    """A status with its details."""

    code: grpc.StatusCode
    message: str
    reason: str
    violations: dict[str, str]
    """Reason by field."""
    metadata: dict[str, str]
    retry_ms: float | None
    pushback_ms: int | None
    trailers: dict[str, Any] = field(default_factory=dict)


async def failure(call: Awaitable[Any]) -> Failure:
    """The error that ``call`` ends with; fails when it ends well."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(LIMIT_S):
            await call
    return explain(caught.value)


def explain(error: grpc.aio.AioRpcError) -> Failure:
    """Everything that an error carries. Every error of ours has ErrorInfo."""
    status = rpc_status.from_call(_Sync(error))
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    retry_ms = None
    for detail in status.details if status is not None else ():
        if detail.Unpack(retry):
            retry_ms = retry.retry_delay.ToNanoseconds() / 1e6
        detail.Unpack(info)
        detail.Unpack(bad)
    trailers = dict(error.trailing_metadata() or ())
    pushback = trailers.get("grpc-retry-pushback-ms")
    return Failure(
        error.code(),
        error.details() or "",
        info.reason,
        {violation.field: violation.reason for violation in bad.field_violations},
        dict(info.metadata),
        retry_ms,
        None if pushback is None else int(pushback),
        trailers,
    )


class _Sync:
    """``grpc_status`` asks in the synchronous API's words."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code, self.details, self.trailing_metadata = error.code, error.details, error.trailing_metadata


class LoadingBackend(FakeBackend):
    """Warms up until it is told to be warm."""

    def __init__(self) -> None:
        super().__init__()
        self.warm = threading.Event()

    def warm_up(self, max_batch_tokens: int) -> tuple[WarmPass, ...]:
        assert self.warm.wait(LIMIT_S)
        return super().warm_up(max_batch_tokens)


async def until(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Let the loop run until ``condition`` holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        await asyncio.sleep(0.001)


@dataclass
class Streamed:
    """A stream, read to its end."""

    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    embeddings: dict[int, pb.Embedding] = field(default_factory=dict)
    errors: dict[int, pb.ItemError] = field(default_factory=dict)
    summary: pb.EmbedStreamSummary | None = None
    sizes: list[int] = field(default_factory=list)

    def take(self, message: pb.EmbedStreamResponse) -> None:
        """One message: no index twice, and nothing after the summary."""
        assert self.summary is None, "a message came after the summary"
        self.sizes.append(message.ByteSize())
        for embedding in message.embeddings:
            assert embedding.index not in self.embeddings.keys() | self.errors.keys(), "an index came twice"
            self.embeddings[embedding.index] = embedding
            self.vectors[embedding.index] = values(embedding)
        for error in message.errors:
            assert error.index not in self.embeddings.keys() | self.errors.keys(), "an index came twice"
            self.errors[error.index] = error
        if message.HasField("summary"):
            assert not message.embeddings
            assert not message.errors
            self.summary = message.summary


async def read(stream: Any) -> Streamed:
    """Read ``stream`` (on) to its end, which must be a summary."""
    streamed = Streamed()
    async with asyncio.timeout(LIMIT_S):
        while (message := await stream.read()) is not grpc.aio.EOF:
            streamed.take(message)
    assert streamed.summary is not None, "the stream ended without a summary"
    return streamed
