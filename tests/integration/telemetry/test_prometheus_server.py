"""A real Prometheus scrapes what we render, and its HTTP API gives the series and the exemplars back."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families

from embedserve.telemetry.load import LoadSnapshot
from embedserve.telemetry.settings import TelemetrySettings
from embedserve.telemetry.setup import Telemetry, setup_telemetry
from embedserve.telemetry.span_queue import SpanQueue
from tests.integration.telemetry.prometheus_server import PROMETHEUS, ask, scraping
from tests.integration.telemetry.traffic import METHOD, ride_together

pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed")


@pytest.fixture(scope="module")
def telemetry() -> Iterator[Telemetry]:
    # Spans are made, so that there is something to link to, and go to standard error.
    with pytest.MonkeyPatch.context() as variables:
        for name in [name for name in os.environ if name.startswith("OTEL_")]:
            variables.delenv(name)
        variables.setenv("OTEL_TRACES_EXPORTER", "console")
        variables.setenv("OTEL_TRACES_SAMPLER", "always_on")
        made = setup_telemetry(TelemetrySettings(bucket_edges=(16, 32)))
    assert isinstance(made._spans, SpanQueue)
    made.register_load(lambda: LoadSnapshot(lifecycle_state="serving", waiting_items_by_bucket={16: 3, 32: 0}))
    yield made
    made.shutdown(5)


@pytest.fixture(scope="module")
def scraped(telemetry: Telemetry) -> Iterator[int]:
    """The port on which the metrics are served."""
    render = telemetry.render_metrics
    assert render is not None

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content_type, body = render(self.headers.get("Accept", ""))
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def prometheus(scraped: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prometheus that scrapes often."""
    with scraping([f"127.0.0.1:{scraped}"], tmp_path_factory.mktemp("prometheus"), every="200ms") as url:
        yield url


class TestPrometheus:
    async def test_every_series_that_we_render_can_be_queried_from_the_first_scrape(
        self, telemetry: Telemetry, prometheus: str
    ) -> None:
        assert telemetry.render_metrics is not None
        _, body = telemetry.render_metrics("")
        rendered = {
            sample.name for family in text_string_to_metric_families(body.decode()) for sample in family.samples
        }

        ask(prometheus, "/api/v1/query", query="up == 1")
        found = ask(prometheus, "/api/v1/query", query='count by (__name__) ({job="embedserve"})')

        own = {"up", "scrape_duration_seconds", "scrape_samples_scraped", "scrape_samples_post_metric_relabeling"}
        assert rendered == {series["metric"]["__name__"] for series in found} - own - {"scrape_series_added"}

    async def test_a_call_shows_in_its_series_and_its_exemplar_leads_to_its_trace(
        self, telemetry: Telemetry, prometheus: str
    ) -> None:
        traffic = ride_together(telemetry, [[], []])

        counted = ask(
            prometheus,
            "/api/v1/query",
            query=f'rpc_server_call_duration_seconds_count{{rpc_method="{METHOD}",rpc_response_status_code="OK"}} == 2',
        )
        exemplars = ask(
            prometheus,
            "/api/v1/query_exemplars",
            query="rpc_server_call_duration_seconds_bucket",
            start=str(time.time() - 60),
            end=str(time.time() + 60),
        )
        queued = ask(prometheus, "/api/v1/query", query="sum(embedserve_queue_items)")

        assert len(counted) == 1
        ids = {exemplar["labels"]["trace_id"] for series in exemplars for exemplar in series["exemplars"]}
        assert ids
        assert ids <= set(traffic.trace_ids)
        assert queued[0]["value"][1] == "3"
