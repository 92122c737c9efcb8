"""The line of each call, as standard error and a collector get it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from embedserve.config import load_config
from embedserve.telemetry.logs import flush_lines
from embedserve.telemetry.setup import setup_telemetry
from embedserve.testing import FakeBackend, fake_checkpoint
from embedserve.testing.server import TEST_SETTINGS, serving
from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from embedserve.wiring import telemetry_settings
from tests.integration.server.process import FAKE, QUICK, running
from tests.integration.telemetry.collector import collecting, rotel_agent

AGENT = rotel_agent()
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "a text that nobody may read"
pytestmark = pytest.mark.process


def call(address: str, texts: Sequence[str], *metadata: tuple[str, str]) -> None:
    """One call, whatever becomes of it."""
    with grpc.insecure_channel(address) as channel, contextlib.suppress(grpc.RpcError):
        EmbeddingServiceStub(channel).Embed(pb.EmbedRequest(texts=texts), metadata=metadata, timeout=10)


def access_lines(log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(line["level"], line["status"]) for line in log if line["event"] == "rpc"]


class TestAccessLog:
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            (("all",), [("info", "OK"), ("warning", "INVALID_ARGUMENT")]),
            (("sampled", "--telemetry.log_requests_ratio", "1"), [("info", "OK"), ("warning", "INVALID_ARGUMENT")]),
            (("sampled", "--telemetry.log_requests_ratio", "0"), [("warning", "INVALID_ARGUMENT")]),
            (("errors",), [("warning", "INVALID_ARGUMENT")]),
            (("off",), []),
        ],
        ids=["all", "sampled, all of them", "sampled, none of them", "errors", "off"],
    )
    async def test_which_calls_have_a_line_is_a_setting(
        self, flags: tuple[str, ...], expected: list[tuple[str, str]], capfd: pytest.CaptureFixture[str]
    ) -> None:
        which, *ratio = flags
        settings = {**TEST_SETTINGS, "telemetry.log_requests": which, "telemetry.log_format": "json"}
        settings |= {"telemetry.log_requests_ratio": ratio[-1]} if ratio else {}
        config = load_config(settings, {}, on_this_machine=False).config
        telemetry = setup_telemetry(telemetry_settings(config, fake_checkpoint(FakeBackend().identity)))
        async with serving(telemetry=telemetry) as server:
            await server.stub.Embed(pb.EmbedRequest(texts=["hello"]))
            with pytest.raises(grpc.aio.AioRpcError):
                await server.stub.Embed(pb.EmbedRequest(texts=[]))
        flush_lines()

        lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
        assert [line["event"] for line in lines][-1] == "stopped"
        assert access_lines(lines) == expected

    @pytest.mark.skipif(AGENT is None, reason="rotel is not installed")
    def test_a_line_leads_to_its_trace_and_reaches_a_collector_as_it_is(self, tmp_path: Path) -> None:
        assert AGENT is not None
        flags = (*QUICK, "--telemetry.log_requests", "all")
        with collecting(AGENT, tmp_path) as collector:
            env = {
                "OTEL_EXPORTER_OTLP_ENDPOINT": collector.grpc_endpoint,
                "OTEL_LOGS_EXPORTER": "otlp",
                "OTEL_METRICS_EXPORTER": "none",
            }
            with running(*flags, command=FAKE, **env) as server:
                call(
                    server.address, [SECRET], ("traceparent", f"00-{TRACE}-{PARENT}-01"),
                    ("x-embedserve-tenant", "acme"), ("authorization", "Bearer " + SECRET),
                )  # fmt: skip
                assert server.stop() == 0
            collector.sink.wait_for(lambda: any(log.event_name == "rpc" for log in collector.sink.logs))

        (line,) = [line for line in server.log if line["event"] == "rpc"]
        (record,) = [log for log in collector.sink.logs if log.event_name == "rpc"]
        (span,) = [span for span in collector.sink.spans if span.kind == 2]
        assert line["trace_id"] == record.trace_id.hex() == span.trace_id.hex() == TRACE
        assert line["span_id"] == record.span_id.hex() == span.span_id.hex()
        said = {a.key: a.value.string_value or a.value.int_value or a.value.double_value for a in record.attributes}
        ids = {"timestamp", "level", "event", "trace_id", "span_id", "trace_flags"}
        assert said == {key: value for key, value in line.items() if key not in ids}
        assert (said["tenant"], said["text_count"], said["status"]) == ("acme", 1, "OK")
        assert said["tokens"]
        assert SECRET not in "".join([*server.stderr, *map(str, collector.sink.logs), *map(str, collector.sink.spans)])
