"""One engine process and two front ends behind one port, as real processes."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.frontends.conftest import LIMIT_S, TWO, stubs
from tests.integration.server.process import FAKE, ServerProcess, started

pytestmark = pytest.mark.process

TOUCHY = (*TWO, "--health.stall_ms", "250", "--scheduling.max_batch_ms", "100")
"""A pass of 300 ms is a stall, and so is an engine process that is stopped for so long."""
HASTY = (*TWO, "--shutdown.grace_ms", "50")


def scrape(server: ServerProcess) -> list[Any]:
    """Every sample of all its processes."""
    with urllib.request.urlopen(f"{server.operations}/metrics", timeout=LIMIT_S) as answer:
        text = answer.read().decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def total(found: Sequence[Any], name: str, **labels: str) -> dict[str, float]:
    """Value by process of the series with these labels."""
    by_process: dict[str, float] = {}
    for sample in found:
        if sample.name == name and labels.items() <= sample.labels.items():
            process = sample.labels["process"]
            by_process[process] = by_process.get(process, 0.0) + sample.value
    return by_process


def gauges(server: ServerProcess, name: str, label: str) -> dict[str, float]:
    """Value of each series of the engine process by ``label``."""
    return {sample.labels[label]: sample.value for sample in scrape(server) if sample.name == name}


class Growth:
    """What counters of a server that others use too have grown by since it was made."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._before = scrape(server)

    def __call__(self, name: str, **labels: str) -> dict[str, float]:
        """By process, of the series with these labels."""
        before = total(self._before, name, **labels)
        now = total(scrape(self._server), name, **labels)
        return {process: value - before.get(process, 0.0) for process, value in now.items()}


@contextmanager
def stopped(server: ServerProcess, role: str) -> Iterator[None]:
    """One process of it neither runs nor ends."""
    os.kill(server.ready["pids"][role], signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.ready["pids"][role], signal.SIGCONT)


@contextmanager
def watching(server: ServerProcess) -> Iterator[Iterator[int]]:
    """What health says from now on, once it has said SERVING."""
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)
        states = (answer.status for answer in watch)
        serving = health_pb2.HealthCheckResponse.SERVING
        assert any(state == serving for state in states), "it looks no further than that"
        yield states


def all_gone(server: ServerProcess) -> bool:
    """Whether none of its processes is left."""
    return all(gone(pid) for pid in server.ready["pids"].values())


def begin(stub: EmbeddingServiceStub, *texts: str, timeout: float = LIMIT_S) -> Any:
    return stub.Embed.future(pb.EmbedRequest(texts=texts), timeout=timeout)


def refused(stub: EmbeddingServiceStub) -> bool:
    return begin(stub, "hello", timeout=0.5).code() is grpc.StatusCode.UNAVAILABLE


def wait_running(server: ServerProcess, items: int = 1) -> None:
    """Until the device and its queue hold so many texts."""

    def held() -> bool:
        load = httpx.get(f"{server.operations}/health", timeout=LIMIT_S).json()
        return load["queue_depth"] + load["running_items"] >= items

    server.wait(held, f"{items} texts in the engine")


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def codes(calls: Sequence[Any]) -> list[grpc.StatusCode]:
    return [call.code() for call in calls]


class TestServing:
    def test_both_front_ends_take_calls_and_one_engine_answers_them(self, two):
        """One port, one operations port, the same vectors, and each event counted once."""
        more = Growth(two)
        with stubs(two, 16) as many:
            answers = [begin(stub, "hello world", "hello") for stub in many]
            values = {answer.result().embeddings[0].values[0] for answer in answers}
        assert len(values) == 1
        done = more("embedserve_requests_total", verdict="done")
        assert (done["engine"], done["frontend-0"] + done["frontend-1"]) == (16, 0)
        calls = more("rpc_server_call_duration_seconds_count", rpc_response_status_code="OK")
        assert calls["frontend-0"] > 0
        assert calls["frontend-1"] > 0
        assert sum(calls.values()) == 16
        assert set(total(scrape(two), "embedserve_queue_items")) == {"engine"}
        for name, expected, labels in (
            ("embedserve_tokenizer_texts_total", 32, {}),
            ("embedserve_items_settled_total", 32, {"verdict": "done"}),
            ("embedserve_admission_decisions_total", 16, {"decision": "admitted"}),
            ("embedserve_stage_duration_seconds_count", 16, {"stage": "forward"}),
            ("embedserve_queue_wait_seconds_count", 16, {}),
        ):
            assert sum(more(name, **labels).values()) == expected, name

    def test_a_stream_has_every_index_once_and_bad_texts_as_errors(self, two):
        with stubs(two, 1) as (stub,):
            texts = ["hello world"] * 100
            texts[17], texts[40] = "hello poison", "hello " * 500
            seen, errors = [], {}
            for message in stub.EmbedStream(pb.EmbedStreamRequest(texts=texts), timeout=LIMIT_S):
                seen += [embedding.index for embedding in message.embeddings]
                errors |= {error.index: error.reason for error in message.errors}
            assert sorted([*seen, *errors]) == list(range(100))
            assert errors[40] == "TEXT_TOO_LONG"
            assert set(errors) == {17, 40}

    def test_refusals_are_the_engines_with_reason_and_hint(self, two):
        """Also for a text that is so long that it would be tokenised in a thread: it is judged before that."""
        with stubs(two, 1) as (stub,):
            with pytest.raises(grpc.RpcError) as wrong:
                begin(stub, "hello " * 500).result()
            assert wrong.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "texts[0]" in wrong.value.details()
            more = Growth(two)
            fill = begin(stub, *["~"] * 100)
            wait_running(two, 100)
            for text in ("hello", "hello " * 100):
                refused = begin(stub, text)
                assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "queue full" in refused.details()
                assert "grpc-retry-pushback-ms" in {key for key, _ in refused.trailing_metadata()}
            assert fill.code() is grpc.StatusCode.OK
            assert sum(more("embedserve_tokenizer_texts_total").values()) == 101

    def test_a_deadline_and_a_cancel_reach_the_engine(self, two):
        """The text that is too late and those that nobody waits for leave the queue; the next is served."""
        more = Growth(two)
        with stubs(two, 2) as (one, other):
            dam = begin(one, "~")
            wait_running(two)
            late, left = begin(one, "~", timeout=0.15), begin(other, *["~"] * 8)
            wait_running(two, 9)
            left.cancel()
            assert late.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)

            def settled() -> bool:
                requests = [more("embedserve_requests_total", verdict=v) for v in ("expired", "cancelled", "rejected")]
                return sum(by_process["engine"] for by_process in requests) == 2

            two.wait(settled, "both requests' end in the engine")
            assert more("embedserve_items_settled_total", verdict="cancelled")["engine"] >= 8
            assert dam.code() is grpc.StatusCode.OK
            assert begin(one, "hello").result().embeddings[0].token_count > 0


class TestSilence:
    def test_a_silent_device_takes_the_front_ends_out_and_back(self, servers):
        """Health on the front ends' port follows the engine's device."""
        server = servers.get(*TOUCHY)
        with stubs(server, 1) as (stub,), watching(server) as states:
            slow = begin(stub, "~")
            assert next(states) == health_pb2.HealthCheckResponse.NOT_SERVING
            assert next(states) == health_pb2.HealthCheckResponse.SERVING
            assert slow.code() is grpc.StatusCode.OK

    def test_an_engine_process_that_is_stopped_takes_the_front_ends_out_and_back(self, servers):
        """With a call on its way and without any: its own watchdog cannot tell, since it does not run either."""
        server = servers.get(*TOUCHY)
        for busy in (False, True):
            with stubs(server, 1) as (stub,), watching(server) as states:
                with stopped(server, "engine"):
                    call = begin(stub, "hello") if busy else None
                    assert next(states) == health_pb2.HealthCheckResponse.NOT_SERVING
                    server.wait(lambda: refused(stub), "the refusal of the other front end, which may notice later")
                assert next(states) == health_pb2.HealthCheckResponse.SERVING
                assert call is None or call.code() is grpc.StatusCode.OK
                assert begin(stub, "hello").code() is grpc.StatusCode.OK
        events = [(line["process"], line["event"]) for line in server.log if line["event"] in ("stalled", "recovered")]
        for name in ("frontend-0", "frontend-1"):
            assert [event for process, event in events if process == name][-4:] == ["stalled", "recovered"] * 2

    def test_a_scraper_may_ask_in_any_bytes(self, two):
        """As one process answers: what it does not know it does not take for OpenMetrics."""
        for accept in (b"text/plain", "text/pl\u00e4in".encode(), b"text/pl\xe4in", b"\xff\xfe"):
            answer = httpx.get(f"{two.operations}/metrics", headers=[(b"Accept", accept)], timeout=LIMIT_S)
            assert answer.status_code == 200, accept
            assert b'process="frontend-1"' in answer.content

    def test_a_front_end_that_is_silent_is_named_and_the_others_are_shown(self, two):
        """In the metrics, and on the page; neither waits for it longer than a second or fails."""
        silent = {"frontend-0": 0.0, "frontend-1": 0.0}
        assert gauges(two, "embedserve_frontend_silent", "frontend") == silent
        with stopped(two, "frontend-1"):
            shown = scrape(two)
            told = {x.labels["frontend"]: x.value for x in shown if x.name == "embedserve_frontend_silent"}
            assert told == silent | {"frontend-1": 1.0}
            assert {x.labels["process"] for x in shown} == {"engine", "frontend-0"}
            process = httpx.get(f"{two.operations}/statusz.json", timeout=LIMIT_S).json()["process"]
            assert (process["front_ends"], process["silent"]) == (["frontend-0"], ["frontend-1"])
        two.wait(lambda: gauges(two, "embedserve_frontend_silent", "frontend") == silent, "its answer")


class TestPage:
    def test_it_shows_the_calls_of_all_front_ends_and_who_took_each(self, two):
        """Rates, stages, slow, refused and failed calls, as one process alone would show them."""
        before = httpx.get(f"{two.operations}/statusz.json", timeout=LIMIT_S).json()
        with stubs(two, 16) as many:
            for stub in many:
                assert begin(stub, "hello world").code() is grpc.StatusCode.OK
            failed = [begin(stub, "poison") for stub in many[:4]]
            assert codes(failed) == [grpc.StatusCode.INTERNAL] * 4
            fill = begin(many[0], *["~"] * 100)
            wait_running(two, 100)
            refused = [begin(stub, "hello") for stub in many]
            assert codes(refused) == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 16
            assert fill.code() is grpc.StatusCode.OK
        shown = httpx.get(f"{two.operations}/statusz.json", timeout=LIMIT_S).json()

        grown = {s: n - before["traffic"]["by_status"].get(s, 0) for s, n in shown["traffic"]["by_status"].items()}
        assert {status: n for status, n in grown.items() if n} == {"OK": 17, "INTERNAL": 4, "RESOURCE_EXHAUSTED": 16}
        assert shown["traffic"]["calls_per_s"] > 0
        assert shown["latency"]["count"] - before["latency"]["count"] == 17
        stages = {stage["name"]: stage["latency"] for stage in shown["stages"]}
        assert {latency["count"] for latency in stages.values()} == {shown["latency"]["count"]}
        assert all(stages[name]["p50_s"] > 0 for name in ("tokenize", "queue", "forward", "respond"))
        requests = shown["requests"]
        new = {kind: [call for call in kept if call["at_s"] > before["at_s"]] for kind, kept in requests.items()}
        assert (len(new["refused"]), len(new["failed"])) == (4, 4), "the last of that reason, and all"
        for kept in requests.values():
            assert {call["process"] for call in kept} <= {"frontend-0", "frontend-1"}
        assert {call["process"] for call in new["failed"] + new["refused"]} == {"frontend-0", "frontend-1"}
        assert requests["slow"][0]["duration_s"] > 0.25
        (refusal,) = [one for one in shown["admission"]["refusals"] if one["reason"] == "QUEUE_FULL"]
        assert refusal["total"] >= 16
        names = [resource["name"] for resource in shown["resources"]]
        assert names[3:] == ["event loop of frontend-0", "event loop of frontend-1"]
        assert shown["process"]["addresses"] == [two.address]
        assert shown["tokenizer"]["pieces_per_s"] > 0
        page = httpx.get(f"{two.operations}/statusz", timeout=LIMIT_S).text
        assert "frontend-0, frontend-1" in page


class TestLines:
    def test_each_says_which_process_wrote_it(self, two):
        """Those of calls too, of which there is one a call and no detour through structlog."""
        at = len(two.stderr)
        with stubs(two, 16) as many:
            assert codes([begin(stub, "hello") for stub in many]) == [grpc.StatusCode.OK] * 16

        def lines() -> list[dict[str, Any]]:
            return [line for line in map(json.loads, two.stderr[at:]) if line["event"] == "rpc"]

        two.wait(lambda: len(lines()) == 16, "a line for each call")
        assert {line["process"] for line in lines()} == {"frontend-0", "frontend-1"}
        served = {line.get("process", "") for line in two.log if line["event"] == "serving"}
        assert served == {"engine", "frontend-0", "frontend-1", ""}, "the last is the supervisor's, for all of them"


class TestStarts:
    def test_a_model_that_cannot_be_loaded_fails_the_start(self):
        with started([*FAKE, *TWO], WARM_UP="fail") as server:
            assert server.ended() == 1
            assert any("no memory left" in str(line.get("reason")) for line in server.log)
            assert server.stdout == []

    def test_a_stop_during_the_start_is_heard(self):
        with started([*FAKE, *TWO], WARM_UP="30") as server:
            server.wait(lambda: len(children(server.pid)) >= 3, "the processes")
            begun = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - begun < 10

    def test_a_second_deployment_on_the_port_fails_instead_of_taking_half(self, servers):
        first = servers.get(*TOUCHY)
        with started([*FAKE, *TWO, "--server.address", first.address]) as second:
            assert second.ended() == 1
            assert "cannot listen" in second.wait_log("start_failed")["reason"]

    def test_a_unix_socket_cannot_be_shared(self):
        with started([*FAKE, *TWO, "--server.address", "unix:/tmp/embedserve-two.sock"]) as server:
            assert server.ended() == 2
            assert any("server.frontends" in line for line in server.stderr)


class TestEnds:
    def test_a_drain_loses_no_call_whoever_is_signalled(self, two):
        """A service manager signals every process at once; the engine ends after the last front end's answer."""
        with stubs(two, 8) as many:
            calls = [begin(stub, "~") for stub in many]
            wait_running(two, 8)
            for pid in two.ready["pids"].values():
                os.kill(pid, signal.SIGTERM)
            assert two.stop() == 0
            assert codes(calls) == [grpc.StatusCode.OK] * 8
            ended = [line["process"] for line in two.log if line["event"] == "stopped"]
            assert ended[-1] == "engine"
            assert all_gone(two)

    def test_a_grace_that_is_too_short_is_told(self, servers):
        server = servers.get(*HASTY, END_MARGIN="0.5")
        with stubs(server, 1) as (stub,):
            call = begin(stub, "~", "hello")
            wait_running(server)
            assert server.stop() == 3
            assert call.code() is not grpc.StatusCode.OK

    @pytest.mark.parametrize("who", ["engine", "frontend-1"])
    def test_who_does_not_end_is_killed_and_told(self, servers, who):
        """SIGTERM while a process is stopped: the others end in their order, and it is killed after the margin."""
        server = servers.get(*HASTY, END_MARGIN="0.5")
        os.kill(server.ready["pids"][who], signal.SIGSTOP)
        begun = time.monotonic()
        assert server.stop() == 70
        assert time.monotonic() - begun < LIMIT_S / 2
        killed = [(line["role"], line["pid"]) for line in server.log if line["event"] == "process_killed"]
        assert killed == [(who, server.ready["pids"][who])]
        stopped_well = {line["process"] for line in server.log if line["event"] == "stopped"}
        assert stopped_well == {"engine", "frontend-0", "frontend-1"} - {who}
        assert all_gone(server)

    @pytest.mark.parametrize("how", ["killed", "worker"])
    def test_when_the_engine_dies_everybody_is_told_and_everything_ends(self, two, how):
        """INTERNAL for each call in flight, on each front end, streams too; then 70, and no process is left."""
        with stubs(two, 16) as many:
            calls = [begin(stub, "~") for stub in many[1:]]
            stream = many[0].EmbedStream(pb.EmbedStreamRequest(texts=["~"] * 20), timeout=LIMIT_S)
            wait_running(two, 20)
            if how == "killed":
                os.kill(two.ready["pids"]["engine"], signal.SIGKILL)
            else:
                calls.append(begin(many[0], "#"))
            assert two.ended() == 70
            with suppress(grpc.RpcError):
                list(stream)  # a client learns of the end behind the messages that it has read
            told = codes([*calls, stream])
            assert grpc.StatusCode.INTERNAL in told
            # With the worker's death a pass may have ended well before.
            allowed = {grpc.StatusCode.INTERNAL} if how == "killed" else {grpc.StatusCode.INTERNAL, grpc.StatusCode.OK}
            assert set(told) <= allowed
            assert all_gone(two)

    def test_when_a_front_end_dies_the_others_calls_are_answered_and_everything_ends(self, two):
        with stubs(two, 16) as many:
            calls = [begin(stub, "~") for stub in many]
            wait_running(two, 16)
            os.kill(two.ready["pids"]["frontend-1"], signal.SIGKILL)
            assert two.ended() == 70
            assert set(codes(calls)) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
            ended = [line for line in two.log if line["event"] == "process_ended"]
            assert [(line["role"], line["code"]) for line in ended] == [("frontend-1", -signal.SIGKILL)]
            assert all_gone(two)

    def test_nothing_outlives_a_supervisor_that_is_killed(self, servers):
        """And nobody is cut off by it: front ends answer what they have, and the engine ends after them."""
        server = servers.get(*TOUCHY)
        assert not any(gone(pid) for pid in server.ready["pids"].values())
        with stubs(server, 16) as many:
            calls = [begin(stub, "~") for stub in many[1:]]
            stream = many[0].EmbedStream(pb.EmbedStreamRequest(texts=["~"] * 4), timeout=LIMIT_S)
            wait_running(server, 19)
            server.process.kill()
            begun = time.monotonic()
            told = [*codes(calls), len([one for message in stream for one in message.embeddings])]
            assert time.monotonic() - begun < 2
            assert told == [grpc.StatusCode.OK] * 15 + [4]
        server.wait(lambda: all_gone(server), "the end of all processes")
        assert all_gone(server)


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []
