"""Rows 10 to 13 and 19: passes that fail. Only the text that causes it is told; what fits is found out again."""

from __future__ import annotations

import asyncio
import random

import grpc
import grpc.aio
import numpy as np
import pytest

from embedserve.model.device import DeviceFault, fault_of
from embedserve.testing import FaultPlan, FaultyBackend
from embedserve.v1 import embedding_pb2 as pb
from tests.fault.sound import sound
from tests.fault.words import WORDS
from tests.integration.server.calls import expected, failure, poison_id, token_ids, until, values

BUDGET = 2048
SETTINGS = {"scheduling.max_batch_tokens": str(BUDGET), "admission.policies": "none"}


class TestOutOfMemory:
    """Memory that is not there costs a retry, never a caller."""

    async def test_nobody_sees_an_error_and_the_budget_falls_and_comes_back(self) -> None:
        rng = random.Random(11)
        plan = FaultPlan(memory_tokens=300)
        backend = FaultyBackend(plan)
        async with sound(backend, settings=SETTINGS) as made:
            server = made.server
            plan.gate.clear()
            texts = [[" ".join(rng.choices(WORDS, k=rng.randint(1, 20))) for _ in range(rng.randint(1, 12))]
                     for _ in range(60)]  # fmt: skip
            calls = [asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=some))) for some in texts]
            await until(lambda: server.guard.in_flight == 60)
            plan.gate.set()
            answers = await asyncio.gather(*calls)
            full = await made.figures()
            ran_out = full.total("embedserve_batch_duration_seconds_count", outcome="out_of_memory")
            low = full.total("embedserve_batch_max_tokens")
            plan.memory_tokens = None
            for _ in range(100):
                await server.stub.Embed(pb.EmbedRequest(texts=["hello"]))
            recovered = await made.settled()

        for some, answer in zip(texts, answers, strict=True):
            assert all(np.array_equal(values(e), expected(t)) for t, e in zip(some, answer.embeddings, strict=True))
        assert ran_out >= 3, "2048 tokens, 1024, 512"
        assert low < BUDGET / 2
        assert recovered.total("embedserve_batch_max_tokens") == BUDGET
        assert recovered.by("embedserve_items_settled_total", "verdict").keys() == {"done"}
        assert backend.released == ran_out, "memory is given back each time, outside the except block"

    async def test_one_text_that_does_not_fit_alone_is_told_for_good_and_no_neighbour(self) -> None:
        plan = FaultPlan(memory_tokens=60)
        backend = FaultyBackend(plan)
        async with sound(backend, settings=SETTINGS) as made:
            server = made.server
            plan.gate.clear()
            large = asyncio.ensure_future(failure(server.stub.Embed(pb.EmbedRequest(texts=["a " * 100]))))
            small = [asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=[w]))) for w in WORDS]
            await until(lambda: server.guard.in_flight == len(WORDS) + 1)
            plan.gate.set()
            error, answers = await large, await asyncio.gather(*small)
            attempts = (await made.settled()).total("embedserve_batch_duration_seconds_count")

        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.pushback_ms == -1
        assert all(np.array_equal(values(a.embeddings[0]), expected(w)) for a, w in zip(answers, WORDS, strict=True))
        assert attempts <= 12, "halved, not tried for ever"


class TestOneBadText:
    """It fails alone, at no more passes than bisection needs."""

    @pytest.mark.parametrize("fault", ["raise_on_id", "nan_on_id"])
    async def test_neighbours_of_other_callers_get_their_own_vectors(self, fault: str) -> None:
        plan = FaultPlan(**{fault: poison_id()})
        async with sound(FaultyBackend(plan), settings=SETTINGS) as made:
            server = made.server
            plan.gate.clear()
            first = asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=["hello"])))
            texts = [f"text {word}" for word in WORDS] * 4
            texts[17] = "the poison"
            calls = [asyncio.ensure_future(server.stub.Embed(pb.EmbedRequest(texts=[t]))) for t in texts]
            await until(lambda: server.guard.in_flight == len(texts) + 1)
            plan.gate.set()
            await first
            ended = await asyncio.gather(*calls, return_exceptions=True)
            found = await made.settled()

        for number, (text, end) in enumerate(zip(texts, ended, strict=True)):
            if number == 17:
                assert isinstance(end, grpc.aio.AioRpcError)
                assert end.code() is grpc.StatusCode.INTERNAL
            else:
                assert isinstance(end, pb.EmbedResponse), f"{text}: {end}"
                assert np.array_equal(values(end.embeddings[0]), expected(text))
        # The first, at most two batches of the others, then two halves a level.
        assert found.total("embedserve_batch_duration_seconds_count") <= 3 + 2 * np.ceil(np.log2(len(texts)))

    async def test_no_value_that_is_not_finite_ever_leaves(self) -> None:
        """300 calls, of which a third hold a text that gives NaN in company, and a few one that always does."""
        rng = random.Random(5)
        plan = FaultPlan(nan_once_on_id=int(token_ids("world")[1]), nan_on_id=poison_id())
        async with sound(FaultyBackend(plan), settings=SETTINGS) as made:
            stub = made.server.stub
            texts = [" ".join(rng.choices(["hello", "world", "a", "the"], k=4)) for _ in range(290)] + ["poison"] * 10
            rng.shuffle(texts)
            ended = await asyncio.gather(
                *(stub.Embed(pb.EmbedRequest(texts=[t])) for t in texts), return_exceptions=True
            )

        for text, end in zip(texts, ended, strict=True):
            if text == "poison":
                assert end.code() is grpc.StatusCode.INTERNAL
            else:
                assert np.isfinite(values(end.embeddings[0])).all()
                assert np.array_equal(values(end.embeddings[0]), expected(text))


class TestWordsOfTheDevice:
    """PyTorch says most of it in words only: these are the words of its releases."""

    @pytest.mark.parametrize(
        "message",
        [
            "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported",
            "CUDA error: an illegal memory access was encountered",
            "CUDA error: unspecified launch failure",
            "CUDA error: an illegal instruction was encountered",
            "CUDA error: misaligned address",
            "CUDA error: unknown error",
            "CUDA error: uncorrectable ECC error encountered",
            "CUDA error: the launch timed out and was terminated",
            "CUDA error: hardware stack error",
            "CUDA error: operation not supported on global/shared address space",
        ],
    )
    def test_a_lost_device_is_lost_and_never_transient(self, message: str) -> None:
        assert fault_of(RuntimeError(message)) is DeviceFault.LOST

    @pytest.mark.parametrize(
        "message",
        [
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 12 GiB",
            "CUDA error: out of memory",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
        ],
    )
    def test_memory_that_is_not_there_is_met_by_smaller_passes(self, message: str) -> None:
        assert fault_of(RuntimeError(message)) is DeviceFault.OUT_OF_MEMORY

    @pytest.mark.parametrize(
        "message",
        [
            # These may follow from a shape as well as from a device; sixteen alike in a row are the device.
            "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k)`",
            "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
            "mat1 and mat2 shapes cannot be multiplied (4x384 and 768x3)",
            "The size of tensor a (512) must match the size of tensor b (514) at non-singleton dimension 1",
            "index out of range in self",
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
        ],
    )
    def test_what_a_text_may_have_caused_is_bisected(self, message: str) -> None:
        assert fault_of(RuntimeError(message)) is None
