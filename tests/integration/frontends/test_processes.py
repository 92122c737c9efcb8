"""One engine process and two front ends behind one port, as real processes."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.server.process import FAKE, QUICK, ServerProcess, running, started

pytestmark = pytest.mark.process

TWO = (*QUICK, "--server.frontends", "2", "--admission.policies", "none")
LIMIT_S = 20.0


@contextmanager
def stubs(server: ServerProcess, count: int) -> Iterator[list[EmbeddingServiceStub]]:
    """So many connections; the kernel deals them over the front ends (16 on one of two: once in 32,768 times)."""
    with ExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [stack.enter_context(grpc.insecure_channel(server.address, options=options)) for _ in range(count)]
        for channel in channels:
            grpc.channel_ready_future(channel).result(LIMIT_S)
        yield [EmbeddingServiceStub(channel) for channel in channels]


def samples(server: ServerProcess, name: str, **labels: str) -> dict[str, float]:
    """Value by process of the series with these labels."""
    with urllib.request.urlopen(f"{server.operations}/metrics", timeout=LIMIT_S) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                found[sample.labels["process"]] = found.get(sample.labels["process"], 0.0) + sample.value
    return found


def begin(stub: EmbeddingServiceStub, *texts: str, timeout: float = LIMIT_S) -> Any:
    return stub.Embed.future(pb.EmbedRequest(texts=texts), timeout=timeout)


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
    def test_both_front_ends_take_calls_and_one_engine_answers_them(self):
        """One port, one operations port, the same vectors, each event counted once, and a clean end."""
        with running(*TWO, command=FAKE) as server:
            with stubs(server, 16) as many:
                answers = [begin(stub, "hello world", "hello") for stub in many]
                values = {answer.result().embeddings[0].values[0] for answer in answers}
            assert len(values) == 1
            done = samples(server, "embedserve_requests_total", verdict="done")
            assert (done["engine"], done["frontend-0"] + done["frontend-1"]) == (16, 0)
            calls = samples(server, "rpc_server_call_duration_seconds_count", rpc_response_status_code="OK")
            assert calls["frontend-0"] > 0
            assert calls["frontend-1"] > 0
            assert sum(calls.values()) == 16
            assert set(samples(server, "embedserve_queue_items")) == {"engine"}
            tokenised = samples(server, "embedserve_tokenizer_texts_total")
            assert sum(tokenised.values()) == 32
            assert server.stop() == 0

    def test_a_stream_has_every_index_once_and_bad_texts_as_errors(self):
        with running(*TWO, "--server.stream_window_items", "8", command=FAKE) as server, stubs(server, 1) as (stub,):
            texts = ["hello world"] * 100
            texts[17], texts[40] = "hello poison", "hello " * 500
            seen, errors = [], {}
            for message in stub.EmbedStream(pb.EmbedStreamRequest(texts=texts), timeout=LIMIT_S):
                seen += [embedding.index for embedding in message.embeddings]
                errors |= {error.index: error.reason for error in message.errors}
            assert sorted([*seen, *errors]) == list(range(100))
            assert errors[40] == "TEXT_TOO_LONG"
            assert set(errors) == {17, 40}

    def test_refusals_are_the_engines_with_reason_and_hint(self):
        """Also for a text that is so long that it would be tokenised in a thread: it is judged before that."""
        flags = ("--limits.max_texts", "8", "--scheduling.max_queue_items", "8")
        with running(*TWO, *flags, command=FAKE) as server, stubs(server, 1) as (stub,):
            with pytest.raises(grpc.RpcError) as wrong:
                begin(stub, "hello " * 500).result()
            assert wrong.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "texts[0]" in wrong.value.details()
            tokenised = sum(samples(server, "embedserve_tokenizer_texts_total").values())
            waits = begin(stub, *["~"] * 8)
            wait_running(server, 8)
            for text in ("hello", "hello " * 100):
                refused = begin(stub, text)
                assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "queue full" in refused.details()
                assert "grpc-retry-pushback-ms" in {key for key, _ in refused.trailing_metadata()}
            assert waits.code() is grpc.StatusCode.OK
            assert sum(samples(server, "embedserve_tokenizer_texts_total").values()) == tokenised + 9

    def test_a_deadline_and_a_cancel_reach_the_engine(self):
        """The text that is too late and the one that nobody waits for leave the queue; the next is served."""
        with running(*TWO, "--scheduling.max_batch_items", "1", command=FAKE) as server, stubs(server, 2) as (one, two):
            late = begin(one, "~", "~", "~", timeout=0.4)
            assert late.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
            left = begin(two, *["~"] * 8)
            wait_running(server, 8)
            left.cancel()
            server.wait(
                lambda: sum(samples(server, "embedserve_items_settled_total", verdict="cancelled").values()) >= 7,
                "cancelled items",
            )
            assert begin(one, "hello").result().embeddings[0].token_count > 0

    def test_a_silent_device_takes_the_front_ends_out_and_back(self):
        """Health on the front ends' port follows the engine's device."""
        flags = ("--health.stall_ms", "100", "--scheduling.max_batch_ms", "100")
        with running(*TWO, *flags, command=FAKE) as server, stubs(server, 1) as (stub,):
            with grpc.insecure_channel(server.address) as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)
                states = (answer.status for answer in watch)
                assert next(states) == health_pb2.HealthCheckResponse.SERVING
                slow = begin(stub, "~")
                assert next(states) == health_pb2.HealthCheckResponse.NOT_SERVING
                assert next(states) == health_pb2.HealthCheckResponse.SERVING
                assert slow.code() is grpc.StatusCode.OK
            assert server.stop() == 0

    def test_an_engine_process_that_is_stopped_takes_the_front_ends_out_and_back(self):
        """Its own watchdog cannot tell: it does not run either."""
        with running(*TWO, "--health.stall_ms", "400", command=FAKE) as server, stubs(server, 1) as (stub,):
            engine = server.ready["pids"]["engine"]
            os.kill(engine, signal.SIGSTOP)
            call = begin(stub, "hello")
            server.wait(lambda: [x for x in server.log if x["event"] == "stalled"], "the stall")
            assert begin(stub, "hello").code() is grpc.StatusCode.UNAVAILABLE
            os.kill(engine, signal.SIGCONT)
            assert call.code() is grpc.StatusCode.OK
            server.wait(lambda: [x for x in server.log if x["event"] == "recovered"], "the recovery")
            assert begin(stub, "hello").code() is grpc.StatusCode.OK
            assert server.stop() == 0


class TestEnds:
    def test_a_drain_loses_no_call_whoever_is_signalled(self):
        """A service manager signals every process at once; the engine ends after the last front end's answer."""
        with running(*TWO, command=FAKE) as server, stubs(server, 8) as many:
            calls = [begin(stub, "~") for stub in many]
            wait_running(server, 8)
            for pid in server.ready["pids"].values():
                os.kill(pid, signal.SIGTERM)
            assert server.stop() == 0
            assert codes(calls) == [grpc.StatusCode.OK] * 8
            ended = [line["process"] for line in server.log if line["event"] == "stopped"]
            assert ended[-1] == "engine"
            assert all(gone(pid) for pid in server.ready["pids"].values())

    def test_a_grace_that_is_too_short_is_told(self):
        with running(*TWO, "--shutdown.grace_ms", "50", command=FAKE) as server, stubs(server, 1) as (stub,):
            call = begin(stub, "~", "hello")
            wait_running(server)
            assert server.stop() == 3
            assert call.code() is not grpc.StatusCode.OK

    @pytest.mark.parametrize("how", ["killed", "worker"])
    def test_when_the_engine_dies_everybody_is_told_and_everything_ends(self, how):
        """INTERNAL for each call in flight, on each front end, streams too; then 70, and no process is left."""
        with running(*TWO, command=FAKE) as server, stubs(server, 16) as many:
            calls = [begin(stub, "~") for stub in many[1:]]
            stream = many[0].EmbedStream(pb.EmbedStreamRequest(texts=["~"] * 20), timeout=LIMIT_S)
            wait_running(server, 30)
            if how == "killed":
                os.kill(server.ready["pids"]["engine"], signal.SIGKILL)
            else:
                calls.append(begin(many[0], "#"))
            assert server.ended() == 70
            with suppress(grpc.RpcError):
                list(stream)  # a client learns of the end behind the messages that it has read
            told = codes([*calls, stream])
            assert grpc.StatusCode.INTERNAL in told
            # With the worker's death a pass may have ended well before.
            allowed = {grpc.StatusCode.INTERNAL} if how == "killed" else {grpc.StatusCode.INTERNAL, grpc.StatusCode.OK}
            assert set(told) <= allowed
            assert all(gone(pid) for pid in server.ready["pids"].values())

    def test_when_a_front_end_dies_the_others_calls_are_answered_and_everything_ends(self):
        with running(*TWO, command=FAKE) as server, stubs(server, 16) as many:
            calls = [begin(stub, "~") for stub in many]
            wait_running(server, 16)
            os.kill(server.ready["pids"]["frontend-1"], signal.SIGKILL)
            assert server.ended() == 70
            assert set(codes(calls)) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
            ended = [line for line in server.log if line["event"] == "process_ended"]
            assert [(line["role"], line["code"]) for line in ended] == [("frontend-1", -signal.SIGKILL)]
            assert all(gone(pid) for pid in server.ready["pids"].values())

    def test_nothing_outlives_a_supervisor_that_is_killed(self):
        with running(*TWO, command=FAKE) as server:
            server.process.kill()
            server.wait(lambda: all(gone(pid) for pid in server.ready["pids"].values()), "the end of all processes")


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

    def test_a_second_deployment_on_the_port_fails_instead_of_taking_half(self):
        with running(*TWO, command=FAKE) as server:
            flags = ("--server.address", server.address)
            with started([*FAKE, *TWO, *flags]) as second:
                assert second.ended() == 1
                assert "cannot listen" in second.wait_log("start_failed")["reason"]

    def test_a_unix_socket_cannot_be_shared(self):
        with started([*FAKE, *TWO, "--server.address", "unix:/tmp/embedserve-two.sock"]) as server:
            assert server.ended() == 2
            assert any("server.frontends" in line for line in server.stderr)


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []
