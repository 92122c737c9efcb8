"""From one slow request to its batch, its neighbours and the stage that was slow, by exported spans alone.

A real server process with a fake device, a real collector, a file of what came through, and an engineer who has only
that file.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.fault.fault_server import SERVER
from tests.integration.server.process import FAKE, QUICK, ServerProcess, running
from tests.integration.telemetry.collector import collecting, rotel_agent
from tests.integration.telemetry.trace_file import ExportedSpan, TraceFile

AGENT = rotel_agent()
GRPCURL = Path(sys.executable).parent / "grpcurl"
pytestmark = [pytest.mark.process, pytest.mark.skipif(AGENT is None, reason="rotel is not installed")]

EMBED, STREAM = "embedserve.v1.EmbeddingService/Embed", "embedserve.v1.EmbeddingService/EmbedStream"
REQUESTS, CALLERS = 1000, 128
SDK_LINKS = 128
"""That a span keeps unless told otherwise."""
CROWD = 400
SLOW = "~ hello"
"""The fake device takes 300 ms for a batch with this text."""
HOLD_S = 0.15
PATIENT = ("--scheduling.max_queue_delay_ms", str(int(HOLD_S * 1000)))
"""So that requests that are sent together ride together."""
STALL = "* hello"
"""Another fake device takes 2 s for a batch with this text, and has taken no long one before."""
LATE_S, HOPELESS_S = 1.0, 0.1
"""The time of a caller that comes upon such a pass: it ends in the middle of it on any machine."""


@dataclass
class Story:
    """What was sent, and the file of what was exported."""

    file: TraceFile
    slow: str = ""
    """The trace of the request with the slow text."""
    beside: set[str] = field(default_factory=set)
    """Traces of those sent together with it."""
    crowd: set[str] = field(default_factory=set)
    quiet_ns: int = 0
    """When the crowd had gone: whoever is slow from then on is so for the device's sake."""
    late: str = ""
    """A request whose deadline came while the device was at work on it."""
    hopeless: str = ""
    """One that was refused for its deadline."""
    forced: str = ""
    """One that its caller does not sample, and asked to be traced all the same."""
    curled: str = ""
    """One that grpcurl sent."""
    told: dict[str, str] = field(default_factory=dict)
    """Traces that came back as x-trace-id, by the trace that was sent."""


class Sender:
    """Sends requests, each in a trace of its own that its caller samples."""

    def __init__(self, stub: Any, story: Story, seed: int) -> None:
        self._stub = stub
        self._story = story
        self._random = random.Random(seed)
        self.largest_batch = 0
        """Of those that an answer rode in."""

    def trace(self) -> str:
        """A new trace id."""
        return self._random.randbytes(16).hex()

    async def embed(self, text: str, *, trace: str = "", within_s: float | None = None) -> str:
        """One unary request; its trace."""
        trace = trace or self.trace()
        call = self._stub.Embed(pb.EmbedRequest(texts=[text]), metadata=self._metadata(trace), timeout=within_s)
        with contextlib.suppress(grpc.aio.AioRpcError):
            answer = await call
            self.largest_batch = max(self.largest_batch, answer.embeddings[0].batch_size)
        self._story.told[trace] = dict(await call.trailing_metadata() or ()).get("x-trace-id", "")
        return trace

    async def unseen(self, text: str, *also: tuple[str, str]) -> str:
        """One unary request that its caller does not sample; its trace."""
        trace = self.trace()
        metadata = (*self._metadata(trace, flags="00"), *also)
        await self._stub.Embed(pb.EmbedRequest(texts=[text]), metadata=metadata)
        return trace

    async def stream(self, texts: list[str]) -> str:
        """One streamed request; its trace."""
        trace = self.trace()
        call = self._stub.EmbedStream(pb.EmbedStreamRequest(texts=texts), metadata=self._metadata(trace))
        while await call.read() is not grpc.aio.EOF:
            pass
        return trace

    def _metadata(self, trace: str, flags: str = "01") -> tuple[tuple[str, str], ...]:
        return (("traceparent", f"00-{trace}-{self._random.randbytes(8).hex()}-{flags}"),)


async def tell(address: str, story: Story) -> None:
    """A thousand requests, a crowd, and a slow one among others."""
    gate = asyncio.Semaphore(CALLERS)
    rng = random.Random(7)
    async with grpc.aio.insecure_channel(address) as channel:
        sender = Sender(EmbeddingServiceStub(channel), story, seed=5)

        async def one(number: int) -> None:
            text = " ".join(rng.choices(["hello", "world", "text"], k=rng.randint(1, 30)))
            async with gate:
                await (sender.embed(text) if number % 10 else sender.stream([text] * 3))

        await asyncio.gather(*(one(number) for number in range(REQUESTS)))
        while sender.largest_batch <= SDK_LINKS and len(story.crowd) < 5 * CROWD:
            dam = asyncio.ensure_future(sender.unseen(SLOW))  # behind which they gather
            await asyncio.sleep(HOLD_S)
            story.crowd.update(await asyncio.gather(*(sender.embed("hello") for _ in range(CROWD))))
            await dam
        story.quiet_ns = time.time_ns()
        story.slow = sender.trace()
        together = [sender.embed("hello") for _ in range(15)]
        together.insert(7, sender.embed(SLOW, trace=story.slow))
        story.beside = set(await asyncio.gather(*together))
        story.forced = await sender.unseen("hello", ("x-force-trace", "1"))


async def tell_of_too_little_time(address: str, story: Story) -> None:
    """Nobody knows how slow the device can be: who has too little time is admitted. Who sees it at work is refused."""
    async with grpc.aio.insecure_channel(address) as channel:
        sender = Sender(EmbeddingServiceStub(channel), story, seed=6)
        story.late = await sender.embed(STALL, within_s=LATE_S)
        story.hopeless = await sender.embed("hello world", within_s=HOPELESS_S)


def curl(server: ServerProcess, trace: str) -> str:
    """What the real grpcurl prints of a call with a traceparent."""
    command = [
        str(GRPCURL), "-v", "-plaintext", "-H", f"traceparent: 00-{trace}-00f067aa0ba902b7-01", "-d",
        '{"texts":["hello"]}', server.address, EMBED,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    assert AGENT is not None
    folder = tmp_path_factory.mktemp("walk")
    traces = folder / "traces.jsonl"
    story = Story(file=None)  # type: ignore[arg-type]
    with collecting(AGENT, folder, traces=traces) as collector:
        exporting = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.grpc_endpoint, "OTEL_METRICS_EXPORTER": "none"}
        exporting["OTEL_BSP_SCHEDULE_DELAY"] = "200"
        with running(*QUICK, command=SERVER, **exporting) as stalling:
            asyncio.run(tell_of_too_little_time(stalling.address, story))
            assert stalling.stop() == 0
        flags = (*QUICK, *PATIENT, "--telemetry.force_trace", "true")
        with running(*flags, command=FAKE, **exporting) as server:
            asyncio.run(tell(server.address, story))
            if GRPCURL.exists():
                story.curled = "ab" * 16
                trailer = re.search(r"x-trace-id: (\w+)", curl(server, story.curled))
                story.told[story.curled] = trailer[1] if trailer else ""
            server.stop()
        # A graceful stop has flushed all of it to the collector.
        collector.sink.wait_for(lambda: _whole(collector.sink.spans, story))
        story.file = TraceFile(traces)
        yield story


def _whole(spans: list[Any], story: Story) -> bool:
    servers = {span.trace_id.hex() for span in spans if span.kind == 2}
    expected = REQUESTS + len(story.crowd) + 16 + 3 + bool(story.curled)
    linked = {(link.trace_id, link.span_id) for span in spans if span.name == "forward" for link in span.links}
    return len(servers) >= expected and linked <= {(span.trace_id, span.span_id) for span in spans}


def request_of(story: Story, trace: str) -> ExportedSpan:
    (found,) = [span for span in story.file.requests if span.trace_id == trace]
    return found


class TestStages:
    def test_of_a_thousand_requests_the_stages_add_up_to_the_request(self, story: Story) -> None:
        answered = [span for span in story.file.requests if span.attributes["rpc.response.status_code"] == "OK"]
        assert len(answered) >= REQUESTS
        for request in answered:
            stages = story.file.children(request)
            assert sum(stage.took_ns for stage in stages) == pytest.approx(request.took_ns, rel=0.01)
            assert {"validate", "admit", "tokenize", "queue", "forward", "respond"} <= {stage.name for stage in stages}

    def test_of_every_batch_too(self, story: Story) -> None:
        batches = [span for span in story.file.spans if span.name == "batch"]
        assert len(batches) > 10
        for batch in batches:
            assert sum(stage.took_ns for stage in story.file.children(batch)) == pytest.approx(batch.took_ns, rel=0.01)


class TestWalk:
    def test_from_the_slowest_request_to_its_batch_its_neighbours_and_the_slow_stage(self, story: Story) -> None:
        file = story.file
        slowest = file.slowest(after_ns=story.quiet_ns)
        assert slowest.took_ns > 300e6

        assert file.slow_stage(slowest).name == "forward"
        (batch,) = file.batches(slowest)
        assert file.slow_stage(batch).name == "forward"
        assert file.slow_stage(batch).took_ns > 290e6

        neighbours = {span.trace_id for span in file.members(batch)} - {slowest.trace_id}
        assert len(neighbours) == batch.attributes["embedserve.batch.requests"] - 1
        assert {slowest.trace_id, *neighbours} <= story.beside
        assert story.slow in {slowest.trace_id, *neighbours}

    def test_from_a_batch_to_each_of_its_members_and_back(self, story: Story) -> None:
        file = story.file
        for batch in (span for span in file.spans if span.name == "batch"):
            members = file.members(batch)
            assert len(members) == batch.attributes["embedserve.batch.requests.sampled"]
            for member in members:
                assert batch in file.batches(member)

    def test_from_a_request_to_each_of_its_batches_and_back(self, story: Story) -> None:
        file = story.file
        for request in file.requests:
            for batch in file.batches(request):
                assert request in file.members(batch)

    def test_a_batch_of_more_than_128_requests_loses_none(self, story: Story) -> None:
        file = story.file
        largest = max((span for span in file.spans if span.name == "batch"), key=lambda span: len(span.links))

        assert len(largest.links) > SDK_LINKS
        assert len(largest.links) == largest.attributes["embedserve.batch.requests"]
        assert {span.trace_id for span in file.members(largest)} <= story.crowd


class TestThoseThatWereNotAnswered:
    def test_one_that_expired_says_where_and_by_which_numbers(self, story: Story) -> None:
        late = request_of(story, story.late)
        assert late.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
        assert late.attributes["embedserve.error.kind"] == "expected"
        assert 0 < late.attributes["embedserve.deadline_ms"] < LATE_S * 1000 + 10  # gRPC rounds up

        queue, forward = story.file.children(late)[-2:]
        assert (queue.name, forward.name) == ("queue", "forward")
        (batch,) = story.file.batches(late)
        assert batch.end_ns > late.end_ns, "it expired while the device was at work, and has its batch all the same"
        assert queue.attributes["embedserve.predicted_ms"] < LATE_S * 1000
        assert queue.attributes["embedserve.bucket"] == 16

    def test_one_that_was_refused_says_by_whom_and_by_which_numbers(self, story: Story) -> None:
        refused = request_of(story, story.hopeless)
        said = refused.attributes
        assert said["embedserve.admission.policy"] == "deadline"
        assert said["embedserve.admission.reason"] == said["error.type"] == "DEADLINE_UNREACHABLE"
        assert said["embedserve.admission.figure.left_ns"] < said["embedserve.admission.figure.predicted_ns"]
        assert said["embedserve.error.kind"] == "expected"
        assert story.file.children(refused)[-1].name == "admit"


class TestTraceIds:
    def test_each_came_back_to_its_caller(self, story: Story) -> None:
        assert len(story.told) > REQUESTS / 2
        # A client that gives up by itself has no trailers.
        assert {told for sent, told in story.told.items() if told != sent and sent != story.late} == set()

    def test_a_caller_that_asks_for_it_has_a_trace_of_one_call(self, story: Story) -> None:
        request = request_of(story, story.forced)

        assert request.attributes["embedserve.trace.forced"] is True
        assert len(story.file.batches(request)) == 1

    @pytest.mark.skipif(not GRPCURL.exists(), reason="grpcurl is not installed")
    def test_grpcurl_finds_its_own_trace(self, story: Story) -> None:
        request = request_of(story, story.curled)

        assert request.parent_id == "00f067aa0ba902b7"
        assert [stage.name for stage in story.file.children(request)][-2:] == ["forward", "respond"]
        assert story.told[story.curled] == story.curled
