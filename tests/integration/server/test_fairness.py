"""Who is served when, over the wire: priorities, tenants, and small callers beside large ones.

Judged by the passes of the device between a call's arrival and the one that it rides in, not by the clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from embedserve.api.rpc import Rpc
from embedserve.model.backend import BatchResult, TokenBatch
from embedserve.telemetry.instruments import INSTRUMENTS
from embedserve.testing import FakeBackend, FaultPlan, FaultyBackend
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.server.calls import failure, until

PASS_NS = 10_000_000
MARK = 999
"""A token that only the caller who is watched sends."""
TENANT, PRIORITY = "x-embedserve-tenant", "x-embedserve-priority"
Metadata = tuple[tuple[str, str], ...]


class Watched(FakeBackend):
    """10 ms a pass; knows which passes the marked caller rode in."""

    def __init__(self) -> None:
        super().__init__(pass_ns=lambda _batch: PASS_NS)
        self.marked: list[int] = []

    def embed(self, batch: TokenBatch) -> BatchResult:
        if (batch.ids == MARK).any():
            self.marked.append(len(self.passes))
        return super().embed(batch)


class Ordered(FaultyBackend):
    """Waits at its gate; knows the order in which single tokens came."""

    def __init__(self) -> None:
        super().__init__(FaultPlan())
        self.order: list[int] = []

    def embed(self, batch: TokenBatch) -> BatchResult:
        self.plan.gate.wait()
        self.order += batch.ids.tolist()
        return super().embed(batch)


def token(number: int) -> pb.EmbedRequest:
    """A request of one token: what it costs is the same for all."""
    return pb.EmbedRequest(token_ids=[pb.TokenIds(ids=[number])])


async def waits(server: InProcessServer, metadata: Metadata, job: asyncio.Future[object]) -> list[int]:
    """Passes that ran before each marked call's own, one call after the other while ``job`` goes on."""
    backend, guard = server.backend, server.guard
    assert isinstance(backend, Watched)
    found, begun, begin = [], 0, guard._begin

    def arrive(call: Rpc, context: object) -> None:
        nonlocal begun
        begun = len(backend.passes)  # the way here, and a busy machine, are not what is judged
        begin(call, context)

    guard._begin = arrive  # type: ignore[method-assign]
    await until(lambda: len(backend.passes) >= 2)
    while not job.done():
        await server.stub.Embed(token(MARK), metadata=metadata)
        found.append(backend.marked[-1] - begun)
    return found[:-1]  # the last may have come when the job was over


SMALL_BATCHES = {"scheduling.max_batch_items": "128", "admission.policies": "none"}


class TestBesideABulkJob:
    """10,000 texts do not delay one text by more than the pass that runs, and the one that is closed already."""

    @pytest.mark.parametrize("streamed", [False, True])
    @pytest.mark.parametrize(("mine", "theirs"), [("interactive", "bulk"), ("default", "default")])
    async def test_a_single_text_is_in_the_next_batch_that_is_closed(
        self, streamed: bool, mine: str, theirs: str
    ) -> None:
        """By its class, and as a newcomer also within one class."""
        async with serving(Watched(), settings=SMALL_BATCHES) as server, server.connect() as channel:
            other = EmbeddingServiceStub(channel)
            texts, metadata = ["hello"] * 10_000, ((PRIORITY, theirs),)
            if streamed:
                job = asyncio.ensure_future(
                    drain(other.EmbedStream(pb.EmbedStreamRequest(texts=texts), metadata=metadata))
                )
            else:
                job = asyncio.ensure_future(other.Embed(pb.EmbedRequest(texts=texts), metadata=metadata))
            found = await waits(server, ((PRIORITY, mine),), job)
            await job

        assert len(found) >= 20
        # The one that runs has begun; one more may be closed already, shortly before that one ends.
        assert max(found) <= 2
        assert sum(found) / len(found) <= 1.2

    async def test_the_lowest_class_goes_on(self) -> None:
        """Interactive callers that never stop leave it its share."""
        settings = {"scheduling.max_batch_items": "4", "admission.policies": "none"}
        async with serving(Ordered(), settings=settings) as server:
            server.plan.gate.clear()
            calls = [server.stub.Embed(token(901), metadata=((PRIORITY, "bulk"),)) for _ in range(20)]
            calls += [server.stub.Embed(token(902), metadata=((PRIORITY, "interactive"),)) for _ in range(800)]
            gathered = asyncio.gather(*calls)
            await until(lambda: server.engine.requests == 820)
            server.plan.gate.set()
            await gathered
            order = server.backend.order  # type: ignore[attr-defined]

        served_before_the_last_bulk = order[: len(order) - order[::-1].index(901)].count(902)
        # A twentieth of the tokens is theirs: 20 of 400, though not one by one.
        assert 200 < served_before_the_last_bulk < 600


async def drain(stream: grpc.aio.UnaryStreamCall) -> None:
    async for _ in stream:
        pass


@asynccontextmanager
async def closed() -> AsyncIterator[InProcessServer]:
    """A server with its gate closed and one pass that waits there: all that comes now is queued."""
    single = {"scheduling.max_batch_items": "1", "scheduling.batches_in_flight": "1", "admission.policies": "none"}
    async with serving(Ordered(), settings=single) as server:
        server.plan.gate.clear()
        first = asyncio.ensure_future(server.stub.Embed(token(MARK)))
        await until(lambda: server.engine.load().running_items == 1)
        yield server
        await first


async def served(server: InProcessServer, calls: list[tuple[int, Metadata]]) -> list[int]:
    """The order in which tokens are served that were queued in the order of ``calls``."""
    sent = []
    for number, metadata in calls:
        sent.append(asyncio.ensure_future(server.stub.Embed(token(number), metadata=metadata)))
        await until(lambda: server.engine.load().queue_depth == len(sent))
    server.plan.gate.set()
    await asyncio.gather(*sent)
    order: list[int] = server.backend.order  # type: ignore[attr-defined]
    return order[order.index(MARK) + 1 :]


class TestTenants:
    """Tenants take turns, whatever each of them sends."""

    async def test_a_modest_tenant_is_not_behind_a_greedy_one(self) -> None:
        greedy: list[tuple[int, Metadata]] = [(1, ((TENANT, "greedy"),))] * 30
        modest: list[tuple[int, Metadata]] = [(2, ((TENANT, "modest"),))] * 3
        async with closed() as server:
            order = await served(server, [*greedy, *modest])

        assert [place for place, number in enumerate(order) if number == 2] == pytest.approx([0, 2, 4], abs=1)

    async def test_connections_give_nobody_a_larger_share(self) -> None:
        """Fifty of them, four calls on each."""
        async with serving(Watched(), settings={**SMALL_BATCHES, "scheduling.max_batch_items": "4"}) as server:
            channels = [server.connect() for _ in range(50)]
            stubs = [EmbeddingServiceStub(channel) for channel in channels]
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
            greedy = asyncio.gather(
                *(stub.Embed(token(1), metadata=((TENANT, "greedy"),)) for stub in stubs for _ in range(4))
            )
            # All of them are here: a call that is still on its way behind them is not what is judged.
            await until(lambda: 4 * len(server.backend.passes) + server.engine.requests >= 200)
            found = await waits(server, ((TENANT, "modest"),), greedy)
            await greedy
            for channel in channels:
                await channel.close()

        assert len(found) >= 10
        assert max(found) <= 2

    async def test_those_over_max_tenants_share_one_place(self) -> None:
        """By default the 65th and the 66th; each of the 64 keeps its own."""
        known: list[tuple[int, Metadata]] = [(n, ((TENANT, f"tenant {n}"),)) for n in range(1, 65)]
        over: list[tuple[int, Metadata]] = [(n, ((TENANT, f"tenant {n}"),)) for n in (101, 102)]
        async with closed() as server:
            order = await served(server, [*known, *known, *over, *over])
        first, second = order[:65], order[65:130]

        for turn in (first, second):
            assert set(range(1, 65)) <= set(turn)
            assert sum(number > 100 for number in turn) == 1
        assert len(order[130:]) == 2

    @pytest.mark.parametrize("name", ["blue team", '"quoted"', "a/b;c=d,e", "%00 \\x00", "~" * 64, "-"])
    async def test_any_printable_name_is_a_name(self, server: InProcessServer, name: str) -> None:
        answer = await server.stub.Embed(token(1), metadata=((TENANT, name),))

        assert len(answer.embeddings) == 1

    def test_no_metric_has_a_tenant(self) -> None:
        """Names are the callers' own: as labels they would be series without end."""
        labels = {label.name for instrument in INSTRUMENTS for label in instrument.labels}

        assert not any("tenant" in label for label in labels)


class TestPriorities:
    """``interactive`` before ``default`` before ``bulk``; nothing else is one."""

    async def test_their_order(self) -> None:
        calls: list[tuple[int, Metadata]] = [
            (1, ((PRIORITY, "bulk"),)),
            (2, ()),
            (3, ((PRIORITY, "interactive"),)),
            (4, ((PRIORITY, "default"),)),
        ]
        async with closed() as server:
            assert await served(server, calls) == [3, 2, 4, 1]

    @pytest.mark.parametrize("said", ["INTERACTIVE", "high", "", "bulk, interactive"])
    async def test_what_is_none_is_told_with_those_there_are(self, server: InProcessServer, said: str) -> None:
        error = await failure(server.stub.Embed(token(1), metadata=((PRIORITY, said),)))

        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.violations == {f"metadata.{PRIORITY}": "UNKNOWN_PRIORITY"}
        for word in (PRIORITY, "interactive", "default", "bulk"):
            assert word in error.message
