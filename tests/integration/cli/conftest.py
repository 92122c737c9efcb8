"""A tiny server that misbehaves on demand, for the commands that talk to one."""

import asyncio
import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from embedserve.v1 import embedding_pb2, embedding_pb2_grpc

DIMENSIONS = 8
SERVICE_ROOT = Path(__file__).parents[3] / "service"


def vector_of(text):
    """What the server below answers for ``text``."""
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest()[:DIMENSIONS], dtype=np.int8)
    return (digest / 127).astype(np.float32)


@dataclass
class Refuse:
    """Refuse a call, after answering the first ``after`` texts of it."""

    code: grpc.StatusCode
    message: str = "shed"
    after: int = 0
    pushback: str | None = None
    retry_info_ms: int | None = None


@dataclass
class Service(embedding_pb2_grpc.EmbeddingServiceServicer):
    """Answers with ``vector_of``; a text that contains ``bad`` is an item error. ``plan`` loses an entry a call."""

    plan: list = field(default_factory=list)
    requests: list = field(default_factory=list)
    metadata: list = field(default_factory=list)
    hold: object = None
    """Called with the request before it is answered; may wait."""
    running: int = 0
    running_max: int = 0
    model_plan: list = field(default_factory=list)

    async def GetModel(self, request, context):
        if self.model_plan:
            await refuse(context, self.model_plan.pop(0))
        return embedding_pb2.GetModelResponse(model=embedding_pb2.Model(name="fake", dimension=DIMENSIONS))

    async def EmbedStream(self, request, context):
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.running += 1
        self.running_max = max(self.running_max, self.running)
        try:
            refusal = self.plan.pop(0) if self.plan else None
            if self.hold is not None:
                await self.hold(request)
            answered = len(request.texts) if refusal is None else refusal.after
            # Backwards and in pieces: a client must go by the indexes.
            order = list(range(answered))[::-1]
            for start in range(0, answered, 3):
                yield self._message(request, order[start : start + 3])
            if refusal is not None:
                await refuse(context, refusal)
            yield embedding_pb2.EmbedStreamResponse(summary=embedding_pb2.EmbedStreamSummary(dimensions=DIMENSIONS))
        finally:
            self.running -= 1

    def _message(self, request, indexes):
        message = embedding_pb2.EmbedStreamResponse()
        for index in indexes:
            text = request.texts[index]
            if "bad" in text:
                message.errors.add(
                    index=index, code=3, reason="TEXT_TOO_LONG", message=f"texts[{index}]: {text} is too long"
                )
            else:
                values = vector_of(text)[: request.dimensions or None]
                message.embeddings.add(
                    index=index, values=values.tolist(), token_count=len(text), truncated="cut" in text
                )
        return message


async def refuse(context, refusal):
    """End a call as ``refusal`` says."""
    trailers = []
    if refusal.pushback is not None:
        trailers.append(("grpc-retry-pushback-ms", refusal.pushback))
    if refusal.retry_info_ms is not None:
        hint = error_details_pb2.RetryInfo()
        hint.retry_delay.FromMilliseconds(refusal.retry_info_ms)
        status = status_pb2.Status(code=code_pb2.Code.Value(refusal.code.name), message=refusal.message)
        status.details.add().Pack(hint)
        trailers += rpc_status.to_status(status).trailing_metadata
    await context.abort(refusal.code, refusal.message, tuple(trailers))


@pytest.fixture
async def service():
    """The servicer, with its address as ``service.address``."""
    server = grpc.aio.server()
    servicer = Service()
    embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield servicer
    await server.stop(0)


@pytest.fixture
def command():
    """Run ``embedserve`` as a process; gives exit code, standard output and standard error."""

    async def run(*arguments, stdin=b"", env=None):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "embedserve",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SERVICE_ROOT), **(env or {})},
        )
        output, errors = await process.communicate(stdin)
        return process.returncode, output, errors.decode()

    return run
