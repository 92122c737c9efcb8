"""The facts of the page are those of the server: in one process, and in a process of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import httpx
import pytest

from embedserve.testing.backends import FakeBackend, FaultPlan, FaultyBackend
from embedserve.testing.server import InProcessServer, serving
from embedserve.v1.embedding_pb2 import EmbedRequest, GetLoadRequest
from tests.canary import WATCH
from tests.integration.server.process import FAKE, running

ON = {"operations.enabled": "true"}
TENANT = (("x-embedserve-tenant", "search"),)


async def facts(server: InProcessServer) -> dict[str, Any]:
    """What ``/statusz.json`` says."""
    async with httpx.AsyncClient(base_url=server.operations_url) as client:
        answer = await client.get("/statusz.json")
    WATCH.saw("/statusz.json", answer.text)
    told: dict[str, Any] = answer.json()
    return told


class TestFacts:
    """Each part shows what has just happened."""

    async def test_the_stages_of_a_call_are_all_of_it(self) -> None:
        async with serving(settings=ON) as server:
            await server.stub.Embed(EmbedRequest(texts=["hello world", "hi"]))
            told = await facts(server)

        stages = {stage["name"]: stage["latency"]["p50_s"] for stage in told["stages"]}
        assert sum(stages.values()) == pytest.approx(told["latency"]["p50_s"], abs=1e-6)
        assert stages["forward"] > 0

    async def test_calls_and_passes_are_counted_and_questions_about_them_are_not(self) -> None:
        async with serving(settings=ON) as server:
            for _ in range(3):
                await server.stub.Embed(EmbedRequest(texts=["hello world", "hi"]), metadata=TENANT)
                await server.stub.GetLoad(GetLoadRequest())
            told = await facts(server)

        assert told["traffic"]["by_status"] == {"OK": 3}
        assert told["traffic"]["in_flight"] == 0
        assert told["latency"]["count"] == 3
        assert told["batches"]["outcomes"]["ok"] >= 3
        assert told["buckets"][0]["total"]["count"] == 3
        assert {call["tenant"] for call in told["requests"]["slow"]} == {"search"}

    async def test_what_waits_is_told_by_length_and_age(self) -> None:
        plan = FaultPlan()
        async with serving(FaultyBackend(plan), settings={**ON, "scheduling.batches_in_flight": "1"}) as server:
            plan.gate.clear()
            calls = [
                asyncio.ensure_future(server.stub.Embed(EmbedRequest(texts=["hi"] * 3), timeout=30)) for _ in range(3)
            ]
            while server.engine.scheduler.depth.waiting_items < 6:  # noqa: ASYNC110 - the engine has no event for it
                await asyncio.sleep(0.01)
            told = await facts(server)
            plan.gate.set()
            await asyncio.gather(*calls)

        (bucket,) = [bucket for bucket in told["buckets"] if bucket["items"]]
        assert (bucket["edge"], bucket["items"]) == (16, 6)
        assert bucket["tokens"] == 6 * 4  # two letters and two special tokens
        assert bucket["oldest_s"] > 0
        assert told["running_items"] == 3
        assert told["device"]["pass_age_s"] > 0
        assert told["resources"][0]["busy"] > 0

    async def test_every_policy_has_its_figures_and_its_opinion(self) -> None:
        settings = {**ON, "admission.policies": "throughput,latency_p95,gradient"}
        async with serving(settings=settings) as server:
            policies = {policy["name"]: policy for policy in (await facts(server))["admission"]["policies"]}

        assert list(policies) == [
            "queue",
            "deadline",
            "throughput",
            "latency_p95",
            "gradient",
            "in_flight",
            "tokenizer",
        ]
        assert all(policy["refuses"] is None for policy in policies.values())
        limits = {name: policy["figures"][0]["limit"] for name, policy in policies.items()}
        assert limits["throughput"] == 2.0
        assert limits["latency_p95"] == 0.5
        assert limits["in_flight"] == 4096

    async def test_a_refusal_has_its_reason_and_a_limit_that_is_met_says_so(self) -> None:
        plan = FaultPlan()
        async with serving(FaultyBackend(plan), settings={**ON, "limits.max_requests_in_flight": "1"}) as server:
            plan.gate.clear()
            held = asyncio.ensure_future(server.stub.Embed(EmbedRequest(texts=["hi"]), timeout=30))
            while not server.engine.requests:  # noqa: ASYNC110 - the engine has no event for it
                await asyncio.sleep(0.01)
            with pytest.raises(grpc.aio.AioRpcError, match="RESOURCE_EXHAUSTED"):
                await server.stub.Embed(EmbedRequest(texts=["hi"]), metadata=TENANT)
            told = await facts(server)
            plan.gate.set()
            await held

        (refusal,) = told["admission"]["refusals"]
        assert (refusal["reason"], refusal["total"]) == ("TOO_MANY_REQUESTS_IN_FLIGHT", 1)
        (refused,) = told["requests"]["refused"]
        assert (refused["tenant"], refused["texts"], refused["policy"]) == ("search", 1, "in_flight")
        opinions = {policy["name"]: policy["refuses"] for policy in told["admission"]["policies"]}
        assert opinions["in_flight"] == "TOO_MANY_REQUESTS_IN_FLIGHT"
        assert "shedding" in told["verdict"]["headline"]

    async def test_a_failed_call_is_among_the_failed(self) -> None:
        plan = FaultPlan(fail_every=True)
        async with serving(FaultyBackend(plan), settings=ON) as server:
            with pytest.raises(grpc.aio.AioRpcError, match="INTERNAL"):
                await server.stub.Embed(EmbedRequest(texts=["hi"]), metadata=TENANT)
            told = await facts(server)

        assert [(call["status"], call["tenant"]) for call in told["requests"]["failed"]] == [("INTERNAL", "search")]
        assert told["batches"]["outcomes"]["failed"] >= 1
        assert told["verdict"]["level"] == "bad"

    async def test_asking_teaches_no_policy_anything(self) -> None:
        settings = {**ON, "admission.policies": "throughput,latency_p95,gradient"}
        async with serving(FakeBackend(), settings=settings) as server:
            await server.stub.Embed(EmbedRequest(texts=["hi"]))
            before = {name: policy["figures"] for name, policy in _policies(await facts(server)).items()}
            for _ in range(20):
                await facts(server)
            after = {name: policy["figures"] for name, policy in _policies(await facts(server)).items()}

        assert after["gradient"] == before["gradient"]
        assert after["latency_p95"] == before["latency_p95"]


@pytest.mark.process
class TestProcess:
    """The whole process, as it is started."""

    def test_it_says_who_it_is_and_holds_no_text(self) -> None:
        secret = "a text that nobody may see"
        with running(command=FAKE) as server:
            with grpc.insecure_channel(server.address) as channel:
                server.stub(channel).Embed(EmbedRequest(texts=[secret]), metadata=TENANT)
                with pytest.raises(grpc.RpcError):
                    server.stub(channel).Embed(EmbedRequest(texts=["poison"]), metadata=TENANT)
            page, told = (httpx.get(f"{server.operations}/{path}") for path in ("statusz", "statusz.json"))
            shown = told.json()

        for answer in (page, told):
            WATCH.saw("/statusz", answer.text)
            assert secret not in answer.text
            assert "poison" not in answer.text
        assert shown["process"]["pid"] == server.pid
        assert shown["process"]["addresses"] == [server.address]
        assert [change["state"] for change in shown["process"]["changes"]] == ["starting", "warming", "serving"]
        assert shown["model"]["name"] == server.ready["model"]
        assert shown["model"]["dimension"] == server.ready["dimension"]
        assert [call["status"] for call in shown["requests"]["failed"]] == ["INTERNAL"]

    def test_switched_off_it_is_not_there_and_the_probes_are(self) -> None:
        with running("--operations.statusz", "false", command=FAKE) as server:
            answers = {path: httpx.get(server.operations + path) for path in ("/statusz", "/statusz.json", "/livez")}

        assert [answer.status_code for answer in answers.values()] == [404, 404, 200]
        assert answers["/statusz"].text == "statusz is off: operations.statusz = false\n"


def _policies(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {policy["name"]: policy for policy in told["admission"]["policies"]}
