"""Reflection: grpcurl finds and describes everything, and clients of either name are answered."""

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from grpc_reflection.v1alpha import reflection_pb2

from embedserve.api.guard import SERVICE
from embedserve.api.health import HealthService
from embedserve.api.reflection import SERVICE_NAMES, add_reflection
from embedserve.v1 import embedding_pb2 as pb

HEALTH = "grpc.health.v1.Health"
GRPCURL = shutil.which("grpcurl", path=str(Path(sys.executable).parent)) or shutil.which("grpcurl")


@pytest.fixture
async def served(serve: Any) -> Any:
    async def embed(request: pb.EmbedRequest, context: Any) -> bytes:
        return pb.EmbedResponse(
            embeddings=[pb.Embedding(values=[0.5, -1], token_count=len(request.texts))]
        ).SerializeToString()

    def add(server: Any) -> None:
        HealthService((SERVICE,)).add_to(server)
        add_reflection(server, (SERVICE, HEALTH))

    return await serve(embed, add=add)


async def listed(served: Any, service: str) -> set[str]:
    call = served.channel.stream_stream(
        f"/{service}/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    (response,) = [response async for response in call]
    return {entry.name for entry in response.list_services_response.service}


@pytest.mark.parametrize("service", SERVICE_NAMES)
async def test_both_names_are_answered(served: Any, service: str) -> None:
    """A client that speaks v1 only is served as well as one that speaks v1alpha only."""
    assert {SERVICE, HEALTH} < await listed(served, service)


async def test_what_is_listed_can_be_described(served: Any) -> None:
    """No name is given out that reflection cannot explain."""
    names = sorted(await listed(served, SERVICE_NAMES[0]))
    call = served.channel.stream_stream(
        f"/{SERVICE_NAMES[1]}/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )(iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in names]))
    responses = [response async for response in call]

    assert [response.WhichOneof("message_response") for response in responses] == ["file_descriptor_response"] * len(
        names
    )


@pytest.mark.skipif(GRPCURL is None, reason="grpcurl is not installed")
class TestGrpcurl:
    async def run(self, served: Any, *arguments: str, data: str | None = None) -> str:
        options = ["-plaintext", *(["-d", data] if data else []), f"127.0.0.1:{served.port}"]
        process = await asyncio.create_subprocess_exec(
            GRPCURL, *options, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        async with asyncio.timeout(30):
            output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        return output.decode()

    async def test_list(self, served: Any) -> None:
        """Every service."""
        assert set((await self.run(served, "list")).split()) >= {SERVICE, HEALTH}

    async def test_describe(self, served: Any) -> None:
        """Methods and messages."""
        assert "rpc Embed ( .embedserve.v1.EmbedRequest )" in await self.run(served, "describe", SERVICE)
        assert "repeated string texts = 2;" in await self.run(served, "describe", "embedserve.v1.EmbedRequest")

    async def test_call(self, served: Any) -> None:
        """``-d '{"texts": ["hello"]}'`` works as it stands, and vectors are printed as numbers."""
        answer = json.loads(await self.run(served, f"{SERVICE}/Embed", data='{"texts": ["hello"]}'))

        assert [embedding["values"] for embedding in answer["embeddings"]] == [[0.5, -1]]
