"""Two engine processes behind front ends, as real processes on a CPU: ``cpu,cpu`` is what CI has for ``cuda:0,cuda:1``.

Few servers, each asked much: a start costs some four seconds of a core.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.frontends.conftest import LIMIT_S, TWO, stubs
from tests.integration.frontends.test_processes import (
    Growth,
    all_gone,
    begin,
    codes,
    refused,
    scrape,
    stopped,
    total,
    wait_running,
    watching,
)
from tests.integration.server.process import QUICK, ServerProcess

pytestmark = pytest.mark.process

DEVICES = ("--devices", "cpu,cpu")
BOTH = (*TWO, *DEVICES, "--health.stall_ms", "500", "--scheduling.max_batch_ms", "100")
"""An engine process that is stopped is noticed after half a second."""
HUNG = (
    *QUICK, *DEVICES, "--admission.policies", "none", "--health.stall_ms", "250", "--health.hang_ms", "1000",
    "--scheduling.max_batch_ms", "100",
)  # fmt: skip
"""One front end; an engine process that is stopped for a second is given up."""
ENGINES = ("engine-0", "engine-1")
OK = grpc.StatusCode.OK


@pytest.fixture
def both(servers) -> ServerProcess:
    return servers.get(*BOTH)


def done(more: Growth) -> list[float]:
    """Requests that each engine has answered."""
    by_process = more("embedserve_requests_total", verdict="done")
    return [by_process.get(engine, 0.0) for engine in ENGINES]


def silent(server: ServerProcess, engine: str) -> set[float]:
    """What the front ends that answer say of an engine."""
    found = scrape(server)
    return {x.value for x in found if x.name == "embedserve_engine_silent" and x.labels["engine"] == engine}


def readyz(server: ServerProcess) -> int:
    return httpx.get(f"{server.operations}/readyz", timeout=LIMIT_S).status_code


def last_told(server: ServerProcess, engine: str) -> set[tuple[str, str]]:
    """What each front end has said of an engine last."""
    last = {line["process"]: line["event"] for line in server.log if line.get("engine") == engine}
    return set(last.items())


def by_both(event: str) -> set[tuple[str, str]]:
    return {("frontend-0", event), ("frontend-1", event)}


def held(server: ServerProcess) -> dict[str, int]:
    """Descriptors of each process."""
    pids = {"supervisor": server.pid, **server.ready["pids"]}
    return {role: len(list(Path(f"/proc/{pid}/fd").iterdir())) for role, pid in pids.items()}


def resident_kib(server: ServerProcess) -> int:
    """Memory of all its processes."""
    pids = [server.pid, *server.ready["pids"].values()]
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * 4


def work(many: Sequence[EmbeddingServiceStub], rounds: int) -> set[tuple[float, ...]]:
    """So many calls on each connection, all answered; the vectors of one text."""
    vectors = set()
    for _ in range(rounds):
        for call in [begin(stub, "hello", "hello world") for stub in many]:
            answer = call.result()
            assert len(answer.embeddings) == 2
            vectors.add(tuple(answer.embeddings[0].values))
    return vectors


class TestServing:
    def test_both_engines_answer_what_front_ends_take_on_one_port(self, both):
        """The same vectors, each call once, one operations port for all four processes and the supervisor."""
        more = Growth(both)
        with stubs(both, 16) as many:
            assert len(work(many, 4)) == 1
        assert sum(done(more)) == 64
        assert min(done(more)) >= 4
        assert both.ready["device"] == "cpu,cpu"
        assert set(both.ready["pids"]) == {*ENGINES, "frontend-0", "frontend-1"}
        assert set(total(scrape(both), "embedserve_queue_items")) == set(ENGINES)
        with stubs(both, 1) as (stub,):
            assert stub.GetModel(pb.GetModelRequest(), timeout=LIMIT_S).model.device == "cpu,cpu"
        assert httpx.get(f"{both.operations}/livez", timeout=LIMIT_S).status_code == 200
        assert httpx.get(f"{both.operations}/health", timeout=LIMIT_S).json()["status"] == "healthy"
        page = httpx.get(f"{both.operations}/statusz.json", timeout=LIMIT_S).json()["process"]
        assert [(one["name"], one["device"], one["state"]) for one in page["engines"]] == [
            ("engine-0", "cpu", "healthy"),
            ("engine-1", "cpu", "healthy"),
        ]
        assert "engine-1" in httpx.get(f"{both.operations}/statusz", timeout=LIMIT_S).text

    def test_a_stream_has_every_index_once(self, both):
        with stubs(both, 4) as many:
            for stub in many:
                seen: list[int] = []
                for message in stub.EmbedStream(pb.EmbedStreamRequest(texts=["hello"] * 100), timeout=LIMIT_S):
                    seen += [embedding.index for embedding in message.embeddings]
                assert sorted(seen) == list(range(100))

    def test_nothing_is_left_behind_by_calls_that_are_answered_cancelled_or_late(self, both):
        """Descriptors to the number; memory does not grow with calls; no slot stays taken."""
        with stubs(both, 8) as many:
            work(many, 10)
            before, memory = held(both), resident_kib(both)
            for _ in range(2):
                work(many, 10)
                left = [begin(stub, *["hello"] * 50) for stub in many]
                for call in left[::2]:
                    call.cancel()
                late = [begin(stub, "~", timeout=0.02) for stub in many[:2]]
                assert {call.code() for call in left[1::2]} == {OK}
                assert OK not in codes(late)
            both.wait(lambda: not held_items(both), "the end of what nobody waits for")
            both.wait(lambda: held(both) == before, "the last descriptor: a connection of a probe may be closing")
            assert resident_kib(both) - memory < 8192


def held_items(server: ServerProcess) -> int:
    load = httpx.get(f"{server.operations}/health", timeout=LIMIT_S).json()
    return int(load["queue_depth"] + load["running_items"])


class TestSilence:
    @pytest.mark.parametrize("who", [0, 1])
    def test_one_that_is_stopped_costs_its_own_calls_and_nothing_else(self, both, who):
        """What it has waits for it; all that comes later is answered by the other. Ready all the while, and named."""
        engine, other = ENGINES[who], ENGINES[1 - who]
        with stubs(both, 16) as many:
            with stopped(both, engine):
                calls: list[Any] = [begin(stub, "hello") for stub in many]
                both.wait(lambda: last_told(both, engine) == by_both("engine_silent"), "both front ends' notice")
                assert silent(both, engine) == {1.0}
                both.wait(lambda: silent(both, other) == {0.0}, "the other, which a busy machine may have held up")
                assert readyz(both) == 200
                assert codes([begin(stub, "hello", timeout=2.0) for stub in many]) == [OK] * 16
                assert httpx.get(f"{both.operations}/health", timeout=LIMIT_S).json()["status"] == "degraded"
                page = httpx.get(f"{both.operations}/statusz.json", timeout=LIMIT_S).json()
                assert [one["state"] for one in page["process"]["engines"]][who] == "silent"
                assert engine in page["verdict"]["sentence"]
            assert codes(calls) == [OK] * 16
            both.wait(lambda: last_told(both, engine) == by_both("engine_back"), "their notice of its return")
            both.wait(lambda: silent(both, engine) == {0.0}, "the same in the metrics")
            more = Growth(both)
            work(many, 4)
            assert min(done(more)) >= 4

    def test_with_none_left_nobody_is_ready_until_one_is_back(self, both):
        with stubs(both, 1) as (stub,), watching(both) as states:
            with stopped(both, "engine-0"):
                with stopped(both, "engine-1"):
                    assert next(states) == 2, "NOT_SERVING"
                    both.wait(lambda: readyz(both) == 503, "not ready")
                    both.wait(lambda: refused(stub), "the refusal")
                assert next(states) == 1, "SERVING with one of them"
                both.wait(lambda: readyz(both) == 200, "ready")
                assert begin(stub, "hello").code() is OK
            both.wait(lambda: silent(both, "engine-0") == {0.0}, "its return")


class TestEnds:
    def test_sigterm_to_all_loses_no_call(self, servers, both):
        """Front ends first, then the engines: calls at both of them are answered."""
        with stubs(both, 8) as many:
            calls = [begin(stub, "~") for stub in many]
            wait_running(both, 8)
            for pid in both.ready["pids"].values():
                os.kill(pid, signal.SIGTERM)
            assert both.stop() == 0
            assert codes(calls) == [OK] * 8
            ended = [line["process"] for line in both.log if line["event"] == "stopped"]
            assert set(ended[2:]) == set(ENGINES)
            assert all_gone(both)

    @pytest.mark.parametrize("how", ["killed", "hung"])
    def test_when_one_engine_ends_the_others_calls_are_answered_and_everything_ends(self, servers, how):
        """INTERNAL for its own calls, vectors for the others', those that come meanwhile too; then 70, and nobody left.

        One that neither answers nor ends is killed after ``health.hang_ms``.
        """
        server = servers.get(*HUNG)
        gone_pid = server.ready["pids"]["engine-1"]
        with stubs(server, 1) as (stub,):
            calls = [begin(stub, "~", *["hello world"] * 99) for _ in range(8)]  # enough for each to make a difference
            wait_running(server, 800)
            os.kill(gone_pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            begun = time.monotonic()
            told = codes(calls)
            assert set(told) == {OK, grpc.StatusCode.INTERNAL}
            assert 2 <= told.count(OK) <= 6, "they were dealt over both"
            assert server.ended() == 70
            assert time.monotonic() - begun < LIMIT_S / 2
        assert all_gone(server)
        ended = [(line["role"], line["code"]) for line in server.log if line["event"] == "process_ended"]
        assert ended == [("engine-1", -signal.SIGKILL)]
        killed = [line["role"] for line in server.log if line["event"] == "process_killed"]
        assert killed == (["engine-1"] if how == "hung" else [])
