"""Paths and HTTP statuses of the operations port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import httpx
import pytest

from embedserve.engine.load import LoadReport
from embedserve.errors import StartupError
from embedserve.http.operations import OperationsPort
from embedserve.http.statusz.page import CONTENT_SECURITY_POLICY
from embedserve.snapshot import Snapshot
from tests.unit.http.snapshots import SERVING, shedding

HEALTHY = LoadReport("healthy", True, 12, 1500.0, 8.0, 20.5, 3, 60, 2, 40)
SHEDDING = LoadReport("overloaded", False, 90_000, 1500.0, 60_000.0, 900.0, 700, 60, 2, 40)


@pytest.fixture
async def port() -> AsyncIterator[SimpleNamespace]:
    state = SimpleNamespace(alive=True, ready=True, load=HEALTHY, lifecycle="serving", accepts=[], snapshot=SERVING)

    def render(accept: str) -> tuple[str, bytes]:
        state.accepts.append(accept)
        return "text/plain; version=0.0.4; charset=utf-8", b"up 1\n"

    async def snapshot() -> Snapshot:
        shown: Snapshot = state.snapshot
        return shown

    operations = OperationsPort(
        alive=lambda: state.alive,
        ready=lambda: state.ready,
        load=lambda: state.load,
        render_metrics=render,
        lifecycle_state=lambda: state.lifecycle,
        snapshot=snapshot,
    )
    address = await operations.start("127.0.0.1:0")
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        state.get = client.get
        state.client = client
        state.address = address
        yield state
    await operations.stop()


class TestProbes:
    """Liveness never depends on load; readiness follows the lifecycle."""

    async def test_a_process_that_serves_is_alive_and_ready(self, port: SimpleNamespace) -> None:
        answers = [await port.get(path) for path in ("/livez", "/readyz")]

        assert [(a.status_code, a.text) for a in answers] == [(200, "ok\n"), (200, "ready\n")]

    async def test_a_process_that_drains_is_alive_and_not_ready_and_says_why(self, port: SimpleNamespace) -> None:
        port.ready, port.lifecycle = False, "draining"
        live, ready = [await port.get(path) for path in ("/livez", "/readyz")]

        assert live.status_code == 200
        assert (ready.status_code, ready.text) == (503, "not ready: draining\n")

    async def test_a_process_that_failed_is_not_alive(self, port: SimpleNamespace) -> None:
        port.alive = False

        assert (await port.get("/livez")).status_code == 503

    async def test_a_process_that_sheds_is_alive_and_ready(self, port: SimpleNamespace) -> None:
        port.load = SHEDDING

        assert [(await port.get(path)).status_code for path in ("/livez", "/readyz")] == [200, 200]


class TestHealth:
    """The fields of GetLoad, and 503 when a request sent now would not be taken."""

    async def test_the_body_has_the_fields_of_get_load(self, port: SimpleNamespace) -> None:
        answer = await port.get("/health")

        assert answer.status_code == 200
        assert answer.json() == {
            "status": "healthy",
            "accepting_requests": True,
            "queued_tokens": 12,
            "service_rate_tokens_per_second": 1500.0,
            "estimated_drain_time_ms": 8.0,
            "p95_latency_ms": 20.5,
            "queue_depth": 3,
            "uptime_seconds": 60,
            "running_items": 2,
            "running_tokens": 40,
        }

    async def test_it_is_503_when_not_accepting(self, port: SimpleNamespace) -> None:
        port.load = SHEDDING
        answer = await port.get("/health")

        assert (answer.status_code, answer.json()["status"]) == (503, "overloaded")


class TestMetrics:
    """What the renderer gives, as it gives it."""

    async def test_the_accept_header_reaches_the_renderer(self, port: SimpleNamespace) -> None:
        answer = await port.get("/metrics", headers={"Accept": "application/openmetrics-text"})

        assert answer.text == "up 1\n"
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert port.accepts == ["application/openmetrics-text"]


class TestStatusz:
    """A page for people and its facts for machines, kept by nobody; off means off."""

    async def test_the_page(self, port: SimpleNamespace) -> None:
        answer = await port.get("/statusz")

        assert answer.status_code == 200
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert answer.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
        assert answer.text.startswith("<!DOCTYPE html>")
        assert "Serving 200 calls/s." in answer.text

    async def test_the_facts(self, port: SimpleNamespace) -> None:
        port.snapshot = shedding()
        answer = await port.get("/statusz.json")
        told = answer.json()

        assert answer.headers["Content-Type"] == "application/json"
        assert told["verdict"]["headline"] == "Serving, device is full, shedding"
        assert told["admission"]["refusals"][0]["reason"] == "P95_EXCEEDED"
        assert set(told) == {"verdict", *SERVING.__dataclass_fields__}

    @pytest.mark.parametrize("path", ["/statusz", "/statusz.json"])
    async def test_nothing_of_it_is_kept_guessed_or_lent(self, port: SimpleNamespace, path: str) -> None:
        headers = (await port.get(path)).headers

        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"

    async def test_without_a_snapshot_it_is_off_and_says_by_which_setting(self) -> None:
        off = OperationsPort(
            alive=lambda: True, ready=lambda: True, load=lambda: HEALTHY, render_metrics=None, lifecycle_state=str
        )
        address = await off.start("127.0.0.1:0")
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            answers = [await client.get(path) for path in ("/statusz", "/statusz.json")]
        await off.stop()

        assert {(a.status_code, a.text) for a in answers} == {(404, "statusz is off: operations.statusz = false\n")}


class TestMethods:
    """Everything is read only: HEAD is GET without a body, and whatever would change something is refused."""

    PATHS = ("/livez", "/readyz", "/health", "/metrics", "/statusz", "/statusz.json")

    @pytest.mark.parametrize("path", PATHS)
    async def test_head_has_the_headers_and_no_body(self, port: SimpleNamespace, path: str) -> None:
        got, head = await port.get(path), await port.client.head(path)

        assert (head.status_code, head.content) == (got.status_code, b"")
        assert head.headers["Content-Type"] == got.headers["Content-Type"]
        assert head.headers["Content-Length"] == got.headers["Content-Length"]

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
    async def test_others_are_not_allowed(self, port: SimpleNamespace, path: str, method: str) -> None:
        answer = await port.client.request(method, path)

        assert (answer.status_code, answer.headers["Allow"]) == (405, "GET,HEAD")


class TestJunk:
    """Bytes that are no HTTP are refused and stand in no log: they may be a secret on its way to another port."""

    @pytest.mark.parametrize(
        "junk",
        [
            b"POST /statusz HTTP/1.1\r\nHost: x\r\nContent-Length: zz BODYSECRET\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nBODYSECRET",
            b"\x16\x03\x01BODYSECRET\r\n\r\n",
            b"GET / HTTP/1.1\r\nAuthorization: BODY\x00SECRET\r\n\r\n",
        ],
        ids=["a length", "HTTP/2", "TLS", "a header"],
    )
    async def test_it_is_refused_without_a_line(
        self, port: SimpleNamespace, caplog: pytest.LogCaptureFixture, junk: bytes
    ) -> None:
        host, _, number = port.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(number))
        writer.write(junk)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()

        assert answer == b"" or b" 400 " in answer.split(b"\r\n")[0]
        assert caplog.text == ""
        assert (await port.get("/livez")).status_code == 200


class TestBinding:
    """A port that is taken stops the start with a sentence."""

    async def test_a_taken_port_is_named(self, port: SimpleNamespace) -> None:
        second = OperationsPort(
            alive=lambda: True, ready=lambda: True, load=lambda: HEALTHY, render_metrics=None, lifecycle_state=str
        )
        with pytest.raises(StartupError, match=f"operations.address {port.address} cannot be bound"):
            await second.start(port.address)
