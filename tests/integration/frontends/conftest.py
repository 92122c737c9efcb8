"""Servers of one engine process and two front ends, kept for as long as nobody has ended them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import grpc
import pytest

from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.server.process import FAKE, QUICK, ServerProcess, running
from tests.integration.telemetry.collector import Collector, collecting, rotel_agent

AGENT = rotel_agent()
TWO = (*QUICK, "--server.frontends", "2", "--admission.policies", "none")
COMMON = (
    *TWO, "--server.stream_window_items", "8", "--limits.max_texts", "100", "--scheduling.max_queue_items", "100",
    "--telemetry.log_requests", "all",
)  # fmt: skip
"""Of the server that most tests share: little room, and a line for each call."""
LIMIT_S = 20.0


class Servers:
    """Starts a server where a test needs one, and gives the next test the same one if it still runs."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._kept: dict[object, ServerProcess] = {}

    def get(self, *flags: str, **env: str) -> ServerProcess:
        """A server that is ready, with these flags. Whoever ends it takes it from nobody: the next one is new."""
        key = (flags, *sorted(env.items()))
        kept = self._kept.get(key)
        if kept is None or kept.process.poll() is not None:
            kept = self._kept[key] = self._stack.enter_context(running(*flags, command=FAKE, **env))
        return kept


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(stack)


@pytest.fixture(scope="session")
def collector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector | None]:
    """Takes the spans of the shared server; ``None`` where there is no collector."""
    if AGENT is None:
        yield None
        return
    folder = tmp_path_factory.mktemp("collector")
    with collecting(AGENT, folder, traces=folder / "traces.jsonl") as made:
        yield made


@pytest.fixture
def two(servers: Servers, collector: Collector | None) -> ServerProcess:
    """The server that most tests share; whoever looks at its figures looks at what has become more."""
    if collector is None:
        return servers.get(*COMMON)
    exporting = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.grpc_endpoint, "OTEL_METRICS_EXPORTER": "none"}
    return servers.get(*COMMON, OTEL_BSP_SCHEDULE_DELAY="200", **exporting)


@contextmanager
def stubs(server: ServerProcess, count: int) -> Iterator[list[EmbeddingServiceStub]]:
    """So many connections; the kernel deals them over the front ends (16 on one of two: once in 32,768 times)."""
    with ExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [stack.enter_context(grpc.insecure_channel(server.address, options=options)) for _ in range(count)]
        for channel in channels:
            grpc.channel_ready_future(channel).result(LIMIT_S)
        yield [EmbeddingServiceStub(channel) for channel in channels]
