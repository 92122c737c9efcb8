"""Every query of every panel, mark, variable and rule returns data from a real Prometheus beside a loaded server."""

from __future__ import annotations

import math
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboards.alerts import ALERTS, RECORDS
from dashboards.build import HERE, boards, panels

from tests.integration.server.process import FAKE, QUICK, running
from tests.integration.telemetry.collector import free_port
from tests.integration.telemetry.mixed_load import mixed_load
from tests.integration.telemetry.prometheus_server import JOB, PROMETHEUS, PROMTOOL, ask, ask_now, scraping

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian: prometheus)"),
]

IDLE_S, LOADED_S = 3, 8
"""Without calls, so that a known text is sent, and with them: enough scrapes for rates over ``RATE``."""
RATE = "5s"
"""What Grafana makes of $__rate_interval where Prometheus scrapes every second: four scrapes and the step."""
FLAGS = (
    "--scheduling.max_queue_tokens", "600", "--admission.policies", "throughput,latency_p95,gradient",
    "--admission.latency_p95.soft_ms", "100", "--health.canary_interval_ms", "500", "--health.stall_ms", "200",
)  # fmt: skip
"""Little room, so that six callers are too many at times, and a pass of 300 ms is a stall."""
BLIND = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "1", "OTEL_METRIC_EXPORT_INTERVAL": "500", "OTEL_BSP_SCHEDULE_DELAY": "500",
    "OTEL_TRACES_SAMPLER": "always_on", "OTEL_LOGS_EXPORTER": "otlp",
}  # fmt: skip
"""Every call is traced, and nobody takes what is sent: port 9 is discard, which nothing serves."""
BOARDS = boards()
TARGETS = [
    pytest.param(panel, target, id=f"{name}: {panel['title']} {target['refId']}")
    for name, model in BOARDS.items()
    for _, panel in panels(model)
    for target in panel["targets"]
]
MARKS = BOARDS["service"]["annotations"]["list"]

RESTING = {
    ("Lost telemetry", "D"): 'embedserve_telemetry_log_lines_total{outcome="dropped"}',  # which the test reads
    ("Device memory", "A"): "embedserve_device_memory_used_bytes",  # the fake model has no device
    ("Device memory", "B"): "embedserve_device_memory_total_bytes",  # the same
    ("Form of the model", "A"): 'embedserve_model_variant{variant="compiled"}',  # the fake model has one form
    ("Compiled models", "A"): 'embedserve_model_compile_duration_seconds_count{outcome="cached"}',  # the same
    ("Time to compile", "A"): 'embedserve_model_compile_duration_seconds_sum{outcome="compiled"}',  # the same
    ("Swaps", "A"): 'embedserve_model_swaps_total{variant="compiled"}',  # the same
    ("CUDA graphs", "A"): "embedserve_graphs_planned",  # no GPU
    ("CUDA graphs", "B"): "embedserve_graphs_captured",  # the same
    ("Graph hits", "A"): 'embedserve_graphs_passes_total{outcome="hit"}',  # the same
    ("Capture", "A"): "embedserve_graphs_capture_duration_seconds",  # the same
    ("Graph memory", "A"): "embedserve_graphs_memory_bytes",  # the same
    ("Silent processes", "A"): 'embedserve_frontend_silent{frontend="frontend-0"}',  # all answer
}
"""Queries whose series are there and stay at 0 here, why, and a series from which promtool is to draw something."""
BRIEF = {
    ("Waiting", "A"), ("Oldest", "A"), ("Texts under suspicion", "A"), ("Tokenizer threads", "B"),
    ("Tokenizer threads", "C"), ("Silent processes", "B"),
}  # fmt: skip
"""Gauges of what lasts for less than the time between two scrapes: at 0 unless a scrape meets it."""
RESTING_MARK = {"Model swaps": RESTING["Swaps", "A"]}
"""The one mark that is rightly empty here."""


@dataclass
class Grafana:
    """As much of Grafana as fills in a query."""

    url: str
    begun: float
    ended: float
    chosen: dict[str, str]
    several: dict[str, str] = field(default_factory=dict)
    """The same choice, but for the instance: that of several processes alone."""

    def fill(self, text: str, rate: str = RATE) -> str:
        """``text`` with its variables."""
        filled = text.replace("$__rate_interval", rate)
        for name, value in self.chosen.items():
            filled = filled.replace(f'"${name}"', f'"{value}"')
        left = re.findall(r"\$(?!\d)\w+", filled)
        assert not left, f"no such variable: {left}"
        return filled

    def series(self, query: str) -> list[dict[str, Any]]:
        """What a chart of the loaded time shows."""
        window = {"start": str(self.begun), "end": str(self.ended), "step": "1"}
        data = ask_now(self.url, "/api/v1/query_range", query=self.fill(query), **window)
        return list(data["result"])

    def now(self, query: str) -> list[dict[str, Any]]:
        """What a table shows."""
        return list(ask_now(self.url, "/api/v1/query", query=self.fill(query), time=str(self.ended))["result"])


def label_values(url: str, query: str) -> list[str]:
    """Grafana's ``label_values(selector, label)``."""
    match = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
    assert match is not None, query
    found = ask(url, "/api/v1/series", **{"match[]": match[1]})
    return sorted({series[match[2]] for series in found})


@pytest.fixture(scope="module")
def grafana(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grafana]:
    """Two servers under load, one of a process and one of several, with the boards' variables at all that there is."""
    rules = sorted((HERE / "rules").glob("*.yml"))
    folder = tmp_path_factory.mktemp("prometheus")
    where = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    with (
        scraping(where, folder, rules) as url,  # which takes its time, and the servers theirs
        running(*QUICK, *FLAGS, "--operations.address", where[0], command=FAKE, **BLIND) as one,
        running(
            *QUICK, *FLAGS, "--operations.address", where[1], "--server.frontends", "2", command=FAKE, **BLIND
        ) as several,
    ):
        ask(url, "/api/v1/query", query=f"min(sum_over_time(up[1m])) >= {IDLE_S}")
        begun = time.time()
        with mixed_load(one.address), mixed_load(several.address):
            ask(url, "/api/v1/query", query=f"min(sum_over_time(up[1m])) >= {IDLE_S + LOADED_S}")
            ask(url, "/api/v1/query", query='ALERTS{alertname="EmbedserveAvailabilityBurn",alertstate="firing"}')
            ended = time.time()
        chosen = _choose(url)
        instance = re.escape(several.ready["operations"]).replace("\\", "\\\\")
        yield Grafana(url, begun, ended, chosen, chosen | {"instance": instance})


def _choose(url: str) -> dict[str, str]:
    """Each query variable at *All*, as Grafana writes it into a query: the values, escaped, with | between them."""
    chosen: dict[str, str] = {}
    for variable in BOARDS["service"]["templating"]["list"]:
        if variable["type"] == "query":
            query = variable["query"]["query"]
            for name, value in chosen.items():
                query = query.replace(f'"${name}"', f'"{value}"')
            values = [re.escape(value).replace("\\", "\\\\") for value in label_values(url, query)]
            chosen[variable["name"]] = f"({'|'.join(values)})"
    return chosen


def finite(series: Mapping[str, Any]) -> list[float]:
    """The points of a series that can be drawn."""
    values = series["values"] if "values" in series else [series["value"]]
    return [number for _, text in values if math.isfinite(number := float(text))]


class TestPanels:
    """What each shows."""

    @pytest.mark.parametrize(("panel", "target"), TARGETS)
    def test_it_has_data_whose_labels_its_legend_names(
        self, grafana: Grafana, panel: dict[str, Any], target: dict[str, Any]
    ) -> None:
        found = grafana.now(target["expr"]) if target["instant"] else grafana.series(target["expr"])

        points = [number for series in found for number in finite(series)]
        assert points, f"no data: {target['expr']}"
        named = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
        for series in found:
            assert named <= series["metric"].keys()
        key = (panel["title"], target["refId"])
        resting = key in RESTING
        assert key in BRIEF or any(points) is not resting, f"{'not ' if resting else ''}always 0: {target['expr']}"

    @pytest.mark.parametrize(("panel", "target"), TARGETS)
    def test_it_has_as_many_series_for_an_instance_of_several_processes(
        self, grafana: Grafana, panel: dict[str, Any], target: dict[str, Any]
    ) -> None:
        """No series is drawn twice, once for each process, and none of them says which process it is of."""
        several = replace(grafana, chosen=grafana.several)
        found = several.now(target["expr"]) if target["instant"] else several.series(target["expr"])

        assert [number for series in found for number in finite(series)], f"no data: {target['expr']}"
        assert not [series for series in found if "process" in series["metric"]]
        legends = [tuple(sorted(series["metric"].items())) for series in found]
        assert len(set(legends)) == len(legends)

    @pytest.mark.parametrize(("panel", "target"), [param for param in TARGETS if param.values[1].get("exemplar")])
    def test_its_points_lead_to_traces(self, grafana: Grafana, panel: dict[str, Any], target: dict[str, Any]) -> None:
        window = {"start": str(grafana.begun - 10), "end": str(grafana.ended + 10)}

        found = ask_now(grafana.url, "/api/v1/query_exemplars", query=grafana.fill(target["expr"]), **window)

        ids = {exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]}
        assert ids
        assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


def _resting() -> list[Any]:
    """Query and series of everything that rests in this run."""
    found = {(panel["title"], target["refId"]): target["expr"] for panel, target in (p.values for p in TARGETS)}
    cases = [pytest.param(found[key], series, id=f"{key[0]} {key[1]}") for key, series in RESTING.items()]
    marks = {mark["name"]: mark["expr"] for mark in MARKS}
    return cases + [pytest.param(marks[name], series, id=name) for name, series in RESTING_MARK.items()]


class TestResting:
    """What is at 0 on this machine, drawn from series that are not."""

    @pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
    @pytest.mark.parametrize(("query", "series"), _resting())
    def test_it_draws_what_is_there(self, query: str, series: str, tmp_path: Path) -> None:
        name, _, labels = series.rstrip("}").partition("{")
        grafana = Grafana("", 0, 0, {"job": JOB, "instance": ".+"})
        test = {
            "interval": "1m",
            "input_series": [{"series": f'{name}{{job="{JOB}",instance="a",{labels}}}', "values": "0 1+1x20"}],
            "promql_expr_test": [
                {
                    "expr": f"count(({grafana.fill(query, rate='5m')}) > 0)",
                    "eval_time": "10m",
                    "exp_samples": [{"labels": "{}", "value": 1}],
                }
            ],
        }
        path = tmp_path / "resting.yml"
        path.write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [test]}))

        checked = subprocess.run(
            [str(PROMTOOL), "test", "rules", str(path)], capture_output=True, text=True, check=False
        )

        assert checked.returncode == 0, checked.stdout + checked.stderr


class TestFrame:
    """Variables and marks."""

    def test_every_choice_has_values(self, grafana: Grafana) -> None:
        assert grafana.chosen["job"] == f"({JOB})"
        assert grafana.chosen["model"] == "(fake/model)"
        here = r"127\\\\\.0\\\\\.0\\\\\.1:\d+"
        assert re.fullmatch(rf"\({here}\|{here}\)", grafana.chosen["instance"])

    def test_an_instance_of_another_model_is_not_shown(self, grafana: Grafana) -> None:
        (query,) = (v["query"]["query"] for v in BOARDS["service"]["templating"]["list"] if v["name"] == "instance")
        selector = query.replace('"$job"', '".+"').replace('"$model"', '"another"')
        selector = selector.removeprefix("label_values(").removesuffix(", instance)")
        assert ask_now(grafana.url, "/api/v1/series", **{"match[]": selector}) == []

    @pytest.mark.parametrize("mark", MARKS, ids=[mark["name"] for mark in MARKS])
    def test_every_mark_is_found(self, grafana: Grafana, mark: dict[str, Any]) -> None:
        found = grafana.series(mark["expr"])

        assert bool(found) is (mark["name"] not in RESTING_MARK)
        named = set(re.findall(r"\{\{(\w+)\}\}", mark["titleFormat"]))
        assert all(named <= series["metric"].keys() for series in found)

    def test_a_restart_is_marked_at_the_time_at_which_the_process_started(self, grafana: Grafana) -> None:
        (mark,) = (mark for mark in MARKS if mark.get("useValueForTime"))
        found = grafana.series(mark["expr"])
        assert len(found) == 2

        for series in found:
            (at,) = set(finite(series))
            assert grafana.begun - 60 < at / 1000 < grafana.begun


class TestRules:
    """What is recorded, and what alerts look at."""

    def test_prometheus_evaluates_all_of_them(self, grafana: Grafana) -> None:
        groups = ask_now(grafana.url, "/api/v1/rules")["groups"]

        rules = [rule for group in groups for rule in group["rules"]]
        assert len(rules) == len(RECORDS) + len(ALERTS)
        assert [rule["lastError"] for rule in rules if rule["health"] != "ok"] == []

    @pytest.mark.parametrize("record", RECORDS, ids=[record.selector() for record in RECORDS])
    def test_every_recorded_series_is_there(self, grafana: Grafana, record: Any) -> None:
        found = grafana.series(record.selector())

        assert any(finite(series) for series in found)
        assert all("job" in series["metric"] for series in found)

    @pytest.mark.parametrize(
        "condition",
        [
            pytest.param(condition, id=f"{alert.name} {alert.severity} {number}")
            for alert in ALERTS
            for number, condition in enumerate(condition for case in alert.cases for condition in case)
        ],
    )
    def test_every_figure_that_an_alert_looks_at_is_there(self, grafana: Grafana, condition: Any) -> None:
        assert any(finite(series) for series in grafana.now(condition.query))

    def test_an_alert_that_fires_links_to_its_runbook(self, grafana: Grafana) -> None:
        alerts = ask_now(grafana.url, "/api/v1/alerts")["alerts"]

        assert "EmbedserveAvailabilityBurn" in {alert["labels"]["alertname"] for alert in alerts}
        assert all("#" in alert["annotations"]["runbook_url"] for alert in alerts)
