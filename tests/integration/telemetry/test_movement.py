"""Each figure of a real server moves when what it tells of happens, and no caller can make more series of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc.aio
import pytest

from embedserve.api.validation import TENANT_KEY
from embedserve.config import Scheduling
from embedserve.model.tokenizer import Truncation
from embedserve.telemetry.settings import TelemetrySettings
from embedserve.telemetry.setup import Telemetry, setup_telemetry
from embedserve.testing import FaultPlan, FaultyBackend, tiny_tokenizer
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from tests.fault.figures import Figures

POISON = int(tiny_tokenizer().encode(["poison"], truncation=Truncation.NONE).ids[1])
LONG = "hello world the text " * 8
EDGES = tuple(edge for edge in Scheduling().bucket_edges if edge <= 128)


@dataclass
class Watched:
    """A server over a fake device, and its metrics."""

    server: InProcessServer
    telemetry: Telemetry

    async def figures(self) -> Figures:
        """A scrape, from a thread as it always is: it waits for the event loop."""
        render = self.telemetry.render_metrics
        assert render is not None
        _, body = await asyncio.to_thread(render, "")
        return Figures(body.decode())

    async def embed(self, *texts: str, tenant: str = "") -> grpc.StatusCode:
        """The status of one call."""
        metadata = ((TENANT_KEY, tenant),) if tenant else ()
        try:
            await self.server.stub.Embed(pb.EmbedRequest(texts=texts), metadata=metadata, timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    async def until(self, name: str, value: float, **labels: str) -> Figures:
        """The first scrape in which a series has a value, since the load is shown for 50 ms."""
        async with asyncio.timeout(10):
            while (figures := await self.figures()).total(name, **labels) != value:  # noqa: ASYNC110 - all that is known
                await asyncio.sleep(0.02)
        return figures


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    telemetry = setup_telemetry(TelemetrySettings(bucket_edges=EDGES, log_requests="off"))
    backend = FaultyBackend(FaultPlan(raise_on_id=POISON))
    settings = {
        "admission.policies": "gradient",
        "tokenizer.threads": "2",
        "tokenizer.inline_chars": "0",
        "scheduling.batches_in_flight": "1",
    }
    async with serving(backend, settings=settings, telemetry=telemetry) as server:
        yield Watched(server, telemetry)


class TestMovement:
    async def test_what_the_process_is_made_of_is_there_once_it_serves(self, watched: Watched) -> None:
        figures = await watched.figures()

        assert figures.by("embedserve_model_variant", "variant") == {"eager": 1}
        assert figures.by("embedserve_admission_policy", "policy") == {"gradient": 1}
        assert figures.total("embedserve_admission_limit") > 0
        assert figures.total("embedserve_model_warm_up_seconds") > 0
        assert figures.total("embedserve_tokenizer_threads") == 2
        assert figures.total("embedserve_batch_retry_budget_seconds") > 0

    async def test_what_waits_is_shown_in_its_bucket_with_its_tokens_and_age(self, watched: Watched) -> None:
        watched.server.plan.gate.clear()
        calls = [asyncio.ensure_future(watched.embed("hello"))]
        await watched.until("embedserve_running_items", 1)
        calls += [asyncio.ensure_future(watched.embed(LONG)) for _ in range(4)]
        figures = await watched.until("embedserve_queue_items", 4)

        (bucket,) = figures.by("embedserve_queue_items", "bucket")
        tokens = figures.by("embedserve_queue_tokens", "bucket")
        assert set(tokens) == {bucket}
        assert int(bucket) / 2 < tokens[bucket] / 4 <= int(bucket)
        assert set(figures.by("embedserve_queue_oldest_age_seconds", "bucket")) == {bucket}

        watched.server.plan.gate.set()
        await asyncio.gather(*calls)
        await watched.until("embedserve_queue_tokens", 0)

    async def test_a_poison_text_leaves_retries_and_a_tenant_apart(self, watched: Watched) -> None:
        watched.server.plan.gate.clear()
        calls = [asyncio.ensure_future(watched.embed("hello"))]
        await watched.until("embedserve_running_items", 1)
        calls += [asyncio.ensure_future(watched.embed(text, tenant="m")) for text in ("poison", *["hello"] * 3)]
        await watched.until("embedserve_queue_items", 4)
        watched.server.plan.gate.set()
        statuses = await asyncio.gather(*calls)
        figures = await watched.until("embedserve_quarantine_tenants", 1)

        assert statuses.count(grpc.StatusCode.INTERNAL) == 1
        assert figures.total("embedserve_batch_retries_total") >= 4
        assert figures.total("embedserve_batch_retry_busy_seconds_total") > 0
        assert figures.by("embedserve_rpc_errors_total", "kind") == {"unexpected": 1}
        assert figures.total("embedserve_batch_retry_items") == 0

    async def test_predicted_and_actual_waits_are_of_the_same_requests(self, watched: Watched) -> None:
        for _ in range(5):
            await watched.embed("hello")
        figures = await watched.until("embedserve_wait_actual_seconds_count", 5)

        assert figures.total("embedserve_wait_predicted_seconds_count") == 5
        assert figures.total("embedserve_wait_predicted_seconds_sum") > 0
        assert figures.total("embedserve_wait_actual_seconds_sum") > 0

    async def test_what_a_caller_did_wrong_is_expected(self, watched: Watched) -> None:
        assert await watched.embed() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await watched.figures()).by("embedserve_rpc_errors_total", "kind") == {"expected": 1}

    async def test_ten_thousand_names_of_tenants_make_no_series(self, watched: Watched) -> None:
        """Nor do texts, statuses or trace ids: a label's values are ours."""
        await watched.embed("hello", "x" * 10_000)
        await watched.embed()
        before = await watched.figures()
        for number in range(200):
            await watched.embed("hello", tenant=f"tenant-{number}")

        after = await watched.figures()
        assert {(s.name, *sorted(s.labels.items())) for s in after._samples} == {
            (s.name, *sorted(s.labels.items())) for s in before._samples
        }
        assert not [s for s in after._samples if any("tenant-" in value for value in s.labels.values())]
