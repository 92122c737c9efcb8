"""What a scrape shows: everything in the table, at zero, under the table's names; exemplars where asked for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

import pytest
import structlog
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import SpanContext, TraceFlags
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Sample

from embedserve.model.backend import ModelIdentity
from embedserve.scheduling.item import Rejection
from embedserve.telemetry import instruments as table
from embedserve.telemetry.histograms import HistogramProducer
from embedserve.telemetry.instruments import (
    INSTRUMENTS,
    Instrument,
    Instruments,
    Kind,
    prometheus_label,
    prometheus_name,
)
from embedserve.telemetry.load import LoadSnapshot, SharedSnapshot
from embedserve.telemetry.prometheus import PrometheusRenderer
from embedserve.telemetry.settings import TelemetrySettings
from embedserve.telemetry.setup import Telemetry, setup_telemetry
from tests.unit.telemetry.pipeline import EMBED

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"

EDGES = (16, 32, 64)
IDENTITY = ModelIdentity(
    name="m/n", revision="abc", weights_digest="sha256:00", tokenizer_digest="sha256:11", architecture="bert",
    dimension=384, max_input_length=512, pooling="mean", normalize=True, dtype="float32", device="cpu",
)  # fmt: skip


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    made = setup_telemetry(TelemetrySettings(bucket_edges=EDGES))
    yield made
    made.shutdown(5)


def scrape(telemetry: Telemetry) -> list[Sample]:
    assert telemetry.render_metrics is not None
    _, body = telemetry.render_metrics(OPENMETRICS)
    return [sample for family in parse_openmetrics(body.decode()) for sample in family.samples]


def shown_name(instrument: Instrument) -> str:
    return prometheus_name(instrument.name, instrument.unit, instrument.kind)


class TestFirstScrape:
    def test_every_metric_of_the_table_is_there_with_every_declared_series(self, telemetry: Telemetry) -> None:
        """But for that on front ends where there are none."""
        telemetry.register_model(IDENTITY)
        telemetry.register_load(
            lambda: LoadSnapshot(silent_front_ends={"frontend-0": False}, silent_engines={"e": False})
        )
        samples = scrape(telemetry)
        shown = {(sample.name, frozenset(sample.labels.items())) for sample in samples}
        names = {sample.name for sample in samples}

        for instrument in INSTRUMENTS:
            name = shown_name(instrument)
            names_of = (
                {name} if instrument.kind is not Kind.HISTOGRAM else {f"{name}_bucket", f"{name}_count", f"{name}_sum"}
            )
            assert names_of <= names, instrument.name
            for values in instrument.declared():
                labels = {prometheus_label(label.name): v for label, v in zip(instrument.labels, values, strict=True)}
                labels |= {prometheus_label(key): value for key, value in instrument.constant}
                count = f"{name}_count" if instrument.kind is Kind.HISTOGRAM else name
                assert (count, frozenset(labels.items())) in shown, (count, labels)

    def test_nothing_else_is_there(self, telemetry: Telemetry) -> None:
        telemetry.register_model(IDENTITY)
        known = {"target_info"}
        for instrument in INSTRUMENTS:
            name = shown_name(instrument)
            known |= {name, f"{name}_bucket", f"{name}_count", f"{name}_sum"}

        assert {sample.name for sample in scrape(telemetry)} <= known

    def test_all_of_it_is_zero_but_for_the_process_itself(self, telemetry: Telemetry) -> None:
        samples = scrape(telemetry)

        nonzero = {sample.name for sample in samples if sample.value != 0}
        assert {
            "target_info", "embedserve_lifecycle_state", "process_memory_usage_bytes", "process_cpu_time_seconds_total",
            "process_unix_file_descriptor_count", "process_uptime_seconds", "process_start_time_seconds",
        } >= nonzero  # fmt: skip

    def test_length_buckets_are_there(self, telemetry: Telemetry) -> None:
        samples = scrape(telemetry)
        for name in ("embedserve_queue_items", "embedserve_queue_tokens", "embedserve_queue_oldest_age_seconds"):
            assert {str(edge) for edge in EDGES} == {s.labels["bucket"] for s in samples if s.name == name}

    def test_no_series_carries_a_scope(self, telemetry: Telemetry) -> None:
        assert not [sample for sample in scrape(telemetry) if any("scope" in label for label in sample.labels)]


class TestCardinality:
    async def test_a_flood_of_unknown_words_makes_few_series(self, telemetry: Telemetry) -> None:
        before = len(scrape(telemetry))
        for number in range(2000):
            telemetry.engine_observer.rejected(Rejection(f"p{number}", f"R{number}", None), stage=f"s{number}")
            telemetry.engine_observer.settled(f"v{number}", 1)

        samples = scrape(telemetry)

        assert len(samples) - before <= 2 * 33
        assert sum(s.value for s in samples if s.name == "embedserve_admission_decisions_total") == 2000

    def test_the_first_scrape_is_of_bounded_size(self, telemetry: Telemetry) -> None:
        assert len(scrape(telemetry)) < 2500

    def test_no_metric_is_told_apart_by_what_a_caller_may_write(self) -> None:
        """Tenants, texts, peers, trace ids and error ids belong into spans."""
        labels = {label.name for instrument in INSTRUMENTS for label in instrument.labels}

        assert labels == {
            "rpc.method", "rpc.response.status_code", "attempt", "kind", "stage", "verdict", "decision", "policy",
            "reason", "bucket", "outcome", "variant", "state", "cpu.mode",
            "name", "revision", "weights_digest", "dtype", "device", "pooling", "dimension", "frontend",
            "engine",
        }  # fmt: skip
        free = {instrument.name for instrument in INSTRUMENTS for label in instrument.labels if not label.values}
        assert free == {
            "embedserve.admission.decisions", "embedserve.queue.wait", "embedserve.queue.items",
            "embedserve.queue.tokens", "embedserve.queue.oldest_age", "embedserve.model.info",
            "embedserve.frontend.silent", "embedserve.engine.silent",
        }  # fmt: skip


class TestTable:
    def test_names_and_descriptions_are_there_once(self) -> None:
        names = [instrument.name for instrument in INSTRUMENTS]
        assert len(set(names)) == len(names)
        assert len(set(map(shown_name, INSTRUMENTS))) == len(names)
        assert all(
            instrument.description.endswith(".") or instrument.description.endswith(")") for instrument in INSTRUMENTS
        )

    @pytest.mark.parametrize(
        ("name", "unit", "kind", "shown"),
        [
            ("rpc.server.call.duration", "s", Kind.HISTOGRAM, "rpc_server_call_duration_seconds"),
            ("a.b", "By", Kind.GAUGE, "a_b_bytes"),
            ("a.b", "1", Kind.GAUGE, "a_b_ratio"),
            ("a.b", "1", Kind.COUNTER, "a_b_total"),
            ("a.b", "{item}", Kind.COUNTER, "a_b_total"),
            ("a.busy", "s", Kind.COUNTER, "a_busy_seconds_total"),
        ],
    )
    def test_prometheus_names_follow_opentelemetrys_rule(self, name: str, unit: str, kind: Kind, shown: str) -> None:
        assert shown == prometheus_name(name, unit, kind)

    def test_histograms_of_seconds_take_the_configured_bounds(self) -> None:
        instruments = Instruments(duration_buckets_s=(0.5, 2.0))
        assert instruments.histogram(table.RPC_DURATION).cells()[0].point(0).explicit_bounds == (0.5, 2.0)
        assert table.BATCH_ITEMS.buckets == instruments.histogram(table.BATCH_ITEMS).cells()[0].point(0).explicit_bounds


class TestRender:
    def test_openmetrics_is_given_where_it_is_asked_for(self, telemetry: Telemetry) -> None:
        assert telemetry.render_metrics is not None
        content_type, body = telemetry.render_metrics(OPENMETRICS)
        assert content_type.startswith("application/openmetrics-text; version=1.0.0")
        assert body.endswith(b"# EOF\n")

    @pytest.mark.parametrize("accept", ["", "*/*", "text/plain", "text/html", "application/json;q=1", "\x00;;,,"])
    def test_everybody_else_gets_text(self, telemetry: Telemetry, accept: str) -> None:
        assert telemetry.render_metrics is not None
        content_type, body = telemetry.render_metrics(accept)
        assert content_type.startswith("text/plain; version=0.0.4")
        assert list(parse_text(body.decode()))

    def test_exemplars_lead_to_the_trace(self) -> None:
        instruments = Instruments()
        context = SpanContext(0xABC, 0xDEF, False, TraceFlags(1))
        instruments.histogram(table.RPC_DURATION).cell(EMBED, "OK").observe_traced(0.003, context, 1)
        renderer = PrometheusRenderer(HistogramProducer(instruments), Resource({}))
        _, openmetrics = renderer.render(OPENMETRICS)
        _, text = renderer.render("text/plain")

        found = [s for f in parse_openmetrics(openmetrics.decode()) for s in f.samples if s.exemplar is not None]
        ((sample),) = found
        assert {"trace_id": f"{0xABC:032x}", "span_id": f"{0xDEF:016x}"} == sample.exemplar.labels
        assert (sample.labels["le"], sample.exemplar.value) == ("0.005", 0.003)
        assert b"trace_id" not in text

    async def test_many_threads_may_scrape_while_calls_are_counted(self, telemetry: Telemetry) -> None:
        failures: list[BaseException] = []

        def hammer() -> None:
            try:
                for _ in range(5):
                    scrape(telemetry)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=hammer) for _ in range(4)]
        for thread in threads:
            thread.start()
        number = 0
        while any(thread.is_alive() for thread in threads):
            telemetry.engine_observer.rejected(Rejection("p", f"R{number}", None), stage="exact")
            number += 1
        assert failures == []

    def test_counts_add_up_to_the_bucket_that_holds_everything(self, telemetry: Telemetry) -> None:
        for wait_ms in (0.5, 1, 3, 30, 3000, 30_000):
            telemetry.engine_observer.tokenized(1, 1, int(wait_ms * 1e6), 0)

        buckets = {
            s.labels["le"]: s.value for s in scrape(telemetry) if s.name == "embedserve_tokenizer_wait_seconds_bucket"
        }
        assert [buckets["0.001"], buckets["0.005"], buckets["+Inf"]] == [2, 3, 6]


class TestGauges:
    def test_the_load_is_shown(self, telemetry: Telemetry) -> None:
        telemetry.register_load(
            lambda: LoadSnapshot(
                lifecycle_state="serving",
                accepting=True,
                waiting_items_by_bucket={16: 2, 32: 0, 64: 5},
                waiting_tokens_by_bucket={16: 20, 32: 0, 64: 300},
                oldest_age_s_by_bucket={16: 0.5, 32: 0.0, 64: 1.5},
                retry_items=7,
                retry_budget_s=-0.25,
                quarantined_tenants=2,
                policies=("queue", "gradient"),
                limit_tokens=4096.0,
                limit_signal=1.5,
                tokenizer_threads=4,
                tokenizer_busy=3,
                tokenizer_waiting=9,
                running_items=8,
                running_tokens=80,
                service_rate_tokens_per_s=45_000,
                drain_s=0.25,
                p95_s=0.3,
                shed_probability=0.125,
                theta=1.25,
                max_batch_tokens=8192,
                cost_fixed_s=0.004,
                cost_per_token_s=0.00002,
                device_memory_used_bytes=10,
                device_memory_total_bytes=20,
                variant="compiled",
                warm_up_s=2.5,
            )
        )
        values = {(s.name, *s.labels.values()): s.value for s in scrape(telemetry)}

        for key, value in {
            ("embedserve_queue_items", "64"): 5,
            ("embedserve_queue_tokens", "64"): 300,
            ("embedserve_queue_tokens", "32"): 0,
            ("embedserve_queue_oldest_age_seconds", "64"): 1.5,
            ("embedserve_queue_oldest_age_seconds", "16"): 0.5,
            ("embedserve_batch_retry_items",): 7,
            ("embedserve_batch_retry_budget_seconds",): -0.25,
            ("embedserve_quarantine_tenants",): 2,
            ("embedserve_admission_policy", "gradient"): 1,
            ("embedserve_admission_policy", "throughput"): 0,
            ("embedserve_admission_limit",): 4096,
            ("embedserve_admission_signal_ratio",): 1.5,
            ("embedserve_tokenizer_threads",): 4,
            ("embedserve_tokenizer_busy",): 3,
            ("embedserve_tokenizer_queue",): 9,
            ("embedserve_running_items",): 8,
            ("embedserve_running_tokens",): 80,
            ("embedserve_service_rate",): 45_000,
            ("embedserve_drain_estimated_seconds",): 0.25,
            ("embedserve_latency_p95_seconds",): 0.3,
            ("embedserve_admission_shed_probability_ratio",): 0.125,
            ("embedserve_admission_theta_ratio",): 1.25,
            ("embedserve_batch_max_tokens",): 8192,
            ("embedserve_cost_fixed_seconds",): 0.004,
            ("embedserve_cost_per_token_seconds",): 0.00002,
            ("embedserve_lifecycle_state", "serving"): 1,
            ("embedserve_lifecycle_state", "starting"): 0,
            ("embedserve_accepting",): 1,
            ("embedserve_device_memory_used_bytes",): 10,
            ("embedserve_device_memory_total_bytes",): 20,
            ("embedserve_model_variant", "compiled"): 1,
            ("embedserve_model_variant", "eager"): 0,
            ("embedserve_model_warm_up_seconds",): 2.5,
        }.items():
            assert value == values[key], key

    def test_one_scrape_asks_for_the_load_once(self) -> None:
        asked: list[float] = []

        def source() -> LoadSnapshot:
            asked.append(time.monotonic())
            return LoadSnapshot()

        snapshot = SharedSnapshot()
        snapshot.register(source)
        for _ in range(20):
            snapshot.read()

        assert len(asked) == 1

    def test_a_source_that_cannot_tell_in_time_is_asked_once_and_the_last_load_stands(self) -> None:
        answers: list[LoadSnapshot | None] = [LoadSnapshot(theta=2.0), None]
        asked = 0

        def source() -> LoadSnapshot:
            nonlocal asked
            asked += 1
            answer = answers[min(asked, len(answers)) - 1]
            if answer is None:
                raise TimeoutError
            return answer

        snapshot = SharedSnapshot()
        snapshot.register(source)
        assert snapshot.read().theta == 2.0
        snapshot._taken_s = float("-inf")  # as if time had passed
        assert [snapshot.read().theta for _ in range(20)] == [2.0] * 20
        assert asked == 2

    def test_the_model_is_shown_once_it_is_known(self, telemetry: Telemetry) -> None:
        assert not [s for s in scrape(telemetry) if s.name == "embedserve_model_info"]
        telemetry.register_model(IDENTITY)
        (info,) = [s for s in scrape(telemetry) if s.name == "embedserve_model_info"]
        assert (
            info.labels["name"],
            info.labels["revision"],
            info.labels["dimension"],
            info.value,
        ) == ("m/n", "abc", "384", 1)

    def test_log_lines_are_counted(self, capfd: pytest.CaptureFixture[str]) -> None:
        made = setup_telemetry(TelemetrySettings(log_format="json"))
        structlog.get_logger("embedserve.test").warning("one")
        logging.getLogger("foreign").warning("two")
        lines = {s.labels["outcome"]: s.value for s in scrape(made) if s.name == "embedserve_telemetry_log_lines_total"}
        made.shutdown(5)

        assert len(capfd.readouterr().err.splitlines()) == lines["written"] >= 2
        assert lines["dropped"] == 0

    def test_the_process_is_shown(self, telemetry: Telemetry) -> None:
        values = {s.name: s.value for s in scrape(telemetry)}
        assert values["process_memory_usage_bytes"] > 1 << 20
        assert values["process_unix_file_descriptor_count"] >= 3
        assert values["process_cpu_time_seconds_total"] >= 0
