"""Headers that a caller makes up: ignored where they are wrong, and never a new series of a metric.

Telemetry as in production: a real process, its /metrics page, and the trace id that comes back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from embedserve.v1 import embedding_pb2 as pb
from tests.integration.server.process import FAKE, QUICK, ServerProcess, running
from tests.security.beside import page

pytestmark = pytest.mark.process
HELLO = pb.EmbedRequest(texts=["hello world"])
ID, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TENANTS_MAX = 4


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_METRICS_EXPORTER": "none"}
    flags = ("--limits.max_tenants", str(TENANTS_MAX), "--telemetry.trace_sample_ratio", "1")
    with running(*QUICK, *flags, command=FAKE, **endpoint) as made:
        yield made
        assert made.stop() == 0


def series(server: ServerProcess) -> set[str]:
    """Every name with its labels, exemplars and values left out."""
    return {line.rpartition(" # ")[0].rpartition(" ")[0] if " # " in line else line.rpartition(" ")[0]
            for line in page(server).splitlines() if line and not line.startswith("#")}  # fmt: skip


def trace_of(server: ServerProcess, *metadata: tuple[str, Any]) -> str:
    """The x-trace-id of a call with this metadata, which must be served."""
    with grpc.insecure_channel(server.address) as channel:
        _, call = server.stub(channel).Embed.with_call(HELLO, metadata=metadata, timeout=10)
        return str(dict(call.trailing_metadata())["x-trace-id"])


class TestTraceContext:
    def test_a_good_one_is_followed(self, server: ServerProcess) -> None:
        assert trace_of(server, ("traceparent", f"00-{ID}-{SPAN}-01")) == ID

    @pytest.mark.parametrize(
        "metadata",
        [
            [("traceparent", "")],
            [("traceparent", "x" * 10_000)],
            [("traceparent", f"00-{'0' * 32}-{SPAN}-01")],
            [("traceparent", f"00-{ID}-{'0' * 16}-01")],
            [("traceparent", f"ff-{ID}-{SPAN}-01")],
            [("traceparent", f"00-{ID.upper()}Z-{SPAN}-01")],
            [("traceparent", f"00-{ID}-{SPAN}-01-extra")],
            [("tracestate", "a=b," * 2000)],
            [("baggage", ",".join(f"key{i}=value{i}" for i in range(800)))],
            [("b3", f"{ID}-{SPAN}-1"), ("x-cloud-trace-context", f"{ID}/1;o=1")],
        ],
        ids=["empty", "long", "zero trace", "zero span", "version ff", "not hex", "extra field", "tracestate",
             "baggage", "foreign"],
    )  # fmt: skip
    def test_a_wrong_one_begins_a_trace_of_our_own(self, server: ServerProcess, metadata: list[Any]) -> None:
        trace_id = trace_of(server, *metadata)

        assert re.fullmatch("[0-9a-f]{32}", trace_id)
        assert trace_id not in {ID, "0" * 32}

    def test_of_two_one_is_followed_at_most(self, server: ServerProcess) -> None:
        """Core (1.85) keeps the last and shows nobody that there was another."""
        other = "1" * 32
        sent = [("traceparent", f"00-{trace_id}-{SPAN}-01") for trace_id in (ID, other)]
        assert trace_of(server, *sent) != ID

    def test_a_good_one_with_hostile_company_is_followed(self, server: ServerProcess) -> None:
        company = [("tracestate", "=,=;" * 1000), ("baggage", "%" * 5000)]
        assert trace_of(server, ("traceparent", f"00-{ID}-{SPAN}-01"), *company) == ID


class TestCardinality:
    def test_ten_thousand_ids_add_no_series(self, server: ServerProcess) -> None:
        """Trace ids, baggage, user agents and made-up headers."""
        with grpc.insecure_channel(server.address) as channel:
            stub = server.stub(channel)
            stub.Embed(HELLO)
            before = series(server)
            calls = []
            for i in range(10_000):
                metadata = (
                    ("traceparent", f"00-{i + 1:032x}-{i + 1:016x}-00"),
                    ("baggage", f"user={i}"),
                    (f"x-{i % 97}", str(i)),
                )
                calls.append(stub.Embed.future(HELLO, metadata=metadata, timeout=60))
                if len(calls) == 200:
                    assert all(call.result().embeddings for call in calls)
                    calls.clear()
        assert series(server) - before == set()

    def test_names_of_the_callers_choice_add_no_more_than_the_tenants_that_are_told_apart(
        self, server: ServerProcess
    ) -> None:
        with grpc.insecure_channel(server.address) as channel:
            stub = server.stub(channel)

            def end(request: Any, *metadata: tuple[str, str]) -> None:
                stub.Embed.future(request, metadata=metadata, timeout=10).exception()

            for wrong in ({"model": "m0"}, {"prompt_name": "p0"}, {"encoding": 90}):
                end(pb.EmbedRequest(texts=["a"], **wrong))
            for priority in ("interactive", "default", "bulk", "p0"):
                end(HELLO, ("x-embedserve-priority", priority))
            before = series(server)
            for i in range(100):
                end(HELLO, ("x-embedserve-tenant", f"tenant-{i}"))
                end(HELLO, ("x-embedserve-priority", f"p{i}"))
                end(pb.EmbedRequest(model=f"m{i}", texts=["a"]))
                end(pb.EmbedRequest(texts=["a"], prompt_name=f"p{i}"))
                end(pb.EmbedRequest(texts=["a"], encoding=90 + i))  # type: ignore[arg-type]
                channel.unary_unary(f"/embedserve.v1.EmbeddingService/Method{i}").future(b"", timeout=10).exception()
            added = series(server) - before

        named = {found for one in added for found in re.findall(r"tenant-\d+", one)}
        assert len(named) <= TENANTS_MAX
        assert {one for one in added if "tenant" not in one} == set()
