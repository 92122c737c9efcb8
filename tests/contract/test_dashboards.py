"""Dashboards, rules and their documents agree with the code: names, questions, units, layout, runbooks."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboards import build
from dashboards.alerts import ALERTS, RECORDS
from dashboards.objectives import LATENCY, LATENCY_BOUND_S, OBJECTIVES
from dashboards.query import BOARD, RULE, share
from grafana_foundation_sdk.models.dashboard import Dashboard

from embedserve.config import Config
from embedserve.telemetry import instruments as m
from embedserve.telemetry.instruments import INSTRUMENTS, prometheus_name
from embedserve.telemetry.settings import DURATION_BUCKETS_S
from tests.contract.test_documents import PROMETHEUS, wrong_names

RULES = build.HERE / "rules"
BOARDS = build.boards()
PANELS = [
    pytest.param(panel, id=f"{name}: {panel['title']}")
    for name, model in BOARDS.items()
    for _, panel in build.panels(model)
]
PROMTOOL = shutil.which("promtool")
NOT_OURS = {"up", "ALERTS"}
"""What Prometheus itself writes."""
WORDS = {
    "by", "ignoring", "on", "group_left", "and", "or", "unless", "offset", "sum", "min", "max", "count", "rate",
    "increase", "changes", "topk", "max_over_time",
    "histogram_quantile", "label_replace", "count_over_time", "sum_over_time",
}  # fmt: skip
"""Of PromQL, as far as it is used here."""


def metrics_of(query: str) -> set[str]:
    """Names of series in a query: what is left without strings, label lists, windows and PromQL's own words."""
    query = re.sub(r'"[^"]*"', "", query)
    query = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|on|ignoring|group_left) \([^)]*\)|offset \w+", "", query)
    return {word for word in re.findall(r"[a-zA-Z_:][\w:]*", query) if word not in WORDS}


def queries_of(model: dict[str, Any]) -> list[str]:
    """Of panels, marks and variables."""
    found = [target["expr"] for _, panel in build.panels(model) for target in panel["targets"]]
    found += [mark["expr"] for mark in model["annotations"]["list"]]
    choices = [v["query"]["query"] for v in model["templating"]["list"] if v["type"] == "query"]
    return found + [choice.removeprefix("label_values(").rpartition(",")[0] for choice in choices]


class TestFiles:
    """What is committed."""

    def test_it_is_what_the_code_says(self) -> None:
        for path, text in build.made().items():
            assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: run `make dashboards`"

    def test_nothing_else_lies_beside_it(self) -> None:
        made = {path for path in build.made() if path.suffix in {".json", ".yml"}}
        assert {*build.HERE.glob("*.json"), *RULES.glob("*.yml")} == made

    def test_a_file_that_was_edited_by_hand_is_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        edited = {tmp_path / path.name: text for path, text in build.made().items()}
        monkeypatch.setattr(build, "made", lambda _: edited)
        assert build.main(["--check"]) == 1
        assert build.main(["--write"]) == 0
        assert build.main(["--check"]) == 0
        capsys.readouterr()
        board = tmp_path / "engine.json"
        board.write_text(board.read_text().replace("percentunit", "percent", 1))
        assert build.main(["--check"]) == 1
        assert '-     "unit": "percent"' in capsys.readouterr().out

    def test_runbook_links_can_begin_elsewhere(self) -> None:
        made = build.made("https://git.example.com/OPERATIONS.md")
        assert "runbook_url: https://git.example.com/OPERATIONS.md#stalled" in made[RULES / "alerts.yml"]


class TestNames:
    """Both ways: what is asked for is emitted, and what is emitted is shown."""

    @pytest.mark.parametrize("name", BOARDS)
    def test_every_query_of_a_board_asks_for_what_the_service_emits(self, name: str) -> None:
        for query in queries_of(BOARDS[name]):
            assert metrics_of(query), query
            assert metrics_of(query) <= PROMETHEUS | NOT_OURS, query

    def test_every_rule_asks_for_what_is_emitted_or_recorded(self) -> None:
        recorded = {record.name for record in RECORDS}
        for query in [record.query for record in RECORDS] + [alert.expression() for alert in ALERTS]:
            assert metrics_of(query), query
            assert metrics_of(query) <= PROMETHEUS | NOT_OURS | recorded, query

    def test_every_metric_is_on_a_panel(self) -> None:
        shown = {name for model in BOARDS.values() for _, panel in build.panels(model) for t in panel["targets"]
                 for name in metrics_of(t["expr"])}  # fmt: skip
        for instrument in INSTRUMENTS:
            if instrument is m.PROCESS_START:
                continue  # a mark on every chart says more than a number with ten digits
            name = prometheus_name(instrument.name, instrument.unit, instrument.kind)
            assert shown & {name + part for part in ("", "_bucket", "_sum", "_count")}, f"{name} is on no panel"

    def test_a_wrong_name_is_seen(self) -> None:
        assert metrics_of('sum by (job) (rate(embedserve_nothing_total{job="a"}[5m])) > 0') == {
            "embedserve_nothing_total"
        }

    def test_a_label_or_value_that_a_metric_has_not_stops_the_making(self) -> None:
        with pytest.raises(ValueError, match="no label stage"):
            BOARD.rate(m.REQUESTS, where={"stage": "queue"})
        with pytest.raises(ValueError, match="never"):
            BOARD.rate(m.REQUESTS, where={"verdict": "done|lost"})
        with pytest.raises(ValueError, match="no part"):
            BOARD.rate(m.REQUESTS, part="_bucket")

    def test_the_readme_names_what_there_is(self) -> None:
        assert wrong_names(build.README.read_text(encoding="utf-8")) == set()


class TestQueries:
    """How PromQL is written."""

    def test_a_board_sees_what_its_variables_choose_and_a_rule_every_job(self) -> None:
        assert BOARD.rate(m.STALLS) == (
            'sum (rate(embedserve_stalls_total{job=~"$job",instance=~"$instance"}[$__rate_interval]))'
        )
        assert RULE.each("instance").increase(m.STALLS) == (
            "sum by (job, instance) (increase(embedserve_stalls_total[5m]))"
        )

    @pytest.mark.parametrize(
        ("wanted", "matcher"),
        [
            ("done", '="done"'),
            ("!done", '!="done"'),
            ("done|failed", '=~"done|failed"'),
            ("!done|failed", '!~"done|failed"'),
        ],
    )
    def test_values_are_matched_as_they_are_written(self, wanted: str, matcher: str) -> None:
        assert RULE.series(m.REQUESTS, "", {"verdict": wanted}) == f"embedserve_requests_total{{verdict{matcher}}}"

    def test_a_share_of_nothing_is_nothing(self) -> None:
        assert share("a", "b", spread=("x",)) == "a / ignoring (x) group_left () (b > 0)"


class TestPanels:
    """What makes them readable."""

    @pytest.mark.parametrize("panel", PANELS)
    def test_it_answers_a_question(self, panel: dict[str, Any]) -> None:
        assert "?" in panel["description"]

    @pytest.mark.parametrize("panel", PANELS)
    def test_its_numbers_have_a_unit_and_its_series_a_name(self, panel: dict[str, Any]) -> None:
        defaults = panel["fieldConfig"]["defaults"]
        mapped = panel["type"] in {"table", "state-timeline"}
        unit = panel["options"]["yAxis"]["unit"] if panel["type"] == "heatmap" else defaults.get("unit")
        assert mapped or unit
        assert panel["type"] == "table" or all(target["legendFormat"] for target in panel["targets"])
        assert mapped or unit == _unit(panel) or _unit(panel) is None, panel["title"]

    @pytest.mark.parametrize("panel", PANELS)
    def test_its_data_source_is_the_chosen_one(self, panel: dict[str, Any]) -> None:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0

    @pytest.mark.parametrize("panel", PANELS)
    def test_exemplars_are_asked_of_buckets_only(self, panel: dict[str, Any]) -> None:
        for target in panel["targets"]:
            assert not target.get("exemplar") or "_bucket{" in target["expr"]

    @pytest.mark.parametrize("panel", PANELS)
    def test_what_is_counted_a_second_says_so(self, panel: dict[str, Any]) -> None:
        rates = [t["expr"] for t in panel["targets"] if re.match(r"(label_replace\()?sum[^/]*rate\([^/]*$", t["expr"])]
        counted = [query for query in rates if not re.search(r"_seconds(_total|_sum)\{", query)]
        if counted and panel["type"] != "heatmap":
            assert panel["fieldConfig"]["defaults"]["unit"] in {"reqps", "cps", "ops", "si:tok/s"}
            assert len(rates) == len(panel["targets"]) or "capacity" in str(panel), "counts and rates on one axis"


def _unit(panel: dict[str, Any]) -> str | None:
    """What the metric's own name says of a panel with one plain query."""
    if len(panel["targets"]) > 1 or "/" in panel["targets"][0]["expr"]:
        return None
    query = panel["targets"][0]["expr"]
    (name,) = metrics_of(query)
    if "rate(" in query and "quantile" not in query:
        return None
    return next((unit for end, unit in (("_seconds", "s"), ("_seconds_bucket", "s"), ("_bytes", "bytes"))
                 if name.endswith(end)), None)  # fmt: skip


class TestBoards:
    """A dashboard as a whole."""

    @pytest.mark.parametrize("name", BOARDS)
    def test_grafanas_own_model_takes_it(self, name: str) -> None:
        read = Dashboard.from_json(BOARDS[name])
        assert (read.uid, len(read.panels or [])) == (f"embedserve-{name}", len(BOARDS[name]["panels"]))

    @pytest.mark.parametrize("name", BOARDS)
    def test_ids_and_titles_are_its_own(self, name: str) -> None:
        ids = [panel["id"] for panel in BOARDS[name]["panels"]]
        titles = [panel["title"] for _, panel in build.panels(BOARDS[name])]
        assert len(set(ids)) == len(ids)
        assert len(set(titles)) == len(titles)

    @pytest.mark.parametrize("name", BOARDS)
    def test_nothing_overlaps_and_no_row_has_a_hole(self, name: str) -> None:
        taken: set[tuple[int, int]] = set()
        for panel in BOARDS[name]["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not cells & taken, panel["title"]
            taken |= cells
        assert {x for x, _ in taken} == set(range(24))
        for _, y in taken:
            assert sum(1 for x in range(24) if (x, y) in taken) == 24, f"a hole at {y}"

    @pytest.mark.parametrize("name", BOARDS)
    def test_it_begins_with_six_figures(self, name: str) -> None:
        glance = [panel for row, panel in build.panels(BOARDS[name]) if row == "At a glance"]
        assert [panel["type"] for panel in glance] == ["stat"] * 6

    @pytest.mark.parametrize("name", BOARDS)
    def test_it_can_be_narrowed_and_is_marked(self, name: str) -> None:
        model = BOARDS[name]
        assert [v["name"] for v in model["templating"]["list"]] == ["datasource", "traces", "job", "model", "instance"]
        assert [mark["name"] for mark in model["annotations"]["list"]] == ["Restarts", "Model", "Model swaps", "Alerts"]

    def test_latency_leads_to_slow_traces(self) -> None:
        (latency,) = (panel for _, panel in build.panels(BOARDS["service"]) if panel["title"] == "Latency")
        (link,) = latency["fieldConfig"]["defaults"]["links"]
        assert link["url"].startswith("/explore?")
        for variable in ("${traces}", "${__from}", "${__to}"):
            assert variable in link["url"]


class TestObjectives:
    """What is promised."""

    def test_the_latency_bound_can_be_counted_and_is_what_the_policy_promises(self) -> None:
        assert LATENCY_BOUND_S in DURATION_BUCKETS_S
        assert Config().admission.latency_p95.slo_ms / 1000 == LATENCY_BOUND_S
        assert LATENCY.good["le"] == str(LATENCY_BOUND_S)

    def test_the_readme_says_what_counts(self) -> None:
        readme = build.README.read_text(encoding="utf-8").replace("`", "")
        for objective in OBJECTIVES:
            assert f"| {objective.name} | {objective.target * 100:g} % | {objective.counts} |" in readme


class TestAlerts:
    """What wakes somebody."""

    @pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: f"{alert.name}-{alert.severity}")
    def test_it_leads_to_a_runbook_and_a_board(self, alert: Any) -> None:
        page = build.PAGE.read_text(encoding="utf-8")
        assert alert.severity in {"page", "ticket"}
        assert alert.board in BOARDS
        runbook = page.partition("## Runbook")[2].partition("\n## ")[0]
        assert f"\n### {alert.runbook}\n" in runbook
        (row,) = (line for line in runbook.splitlines() if line.startswith("|") and f"`{alert.name}`" in line)
        assert alert.severity in row
        assert f"](#{build.anchors(page)[alert.runbook]})" in row

    def test_the_runbook_lists_no_other(self) -> None:
        page = build.PAGE.read_text(encoding="utf-8")
        assert set(re.findall(r"`(Embedserve\w+)`", page)) == {alert.name for alert in ALERTS}

    def test_each_is_shown_to_fire_and_to_stay_silent(self) -> None:
        shown: set[tuple[str, str]] = set()
        for path in sorted((RULES / "tests").glob("*.yml")):
            for group in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
                for test in group["alert_rule_test"]:
                    name = test["alertname"]
                    fires = {alert["exp_labels"]["severity"] for alert in test["exp_alerts"]}
                    shown |= {(name, severity) for severity in fires}
                    shown |= {(name, f"no {one.severity}") for one in ALERTS if one.name == name} - {
                        (name, f"no {severity}") for severity in fires
                    }
        assert shown == {(a.name, word) for a in ALERTS for word in (a.severity, f"no {a.severity}")}

    @pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
    @pytest.mark.parametrize(
        "arguments",
        [["check", "rules", *map(str, sorted(RULES.glob("*.yml")))],
         *(["test", "rules", str(path)] for path in sorted((RULES / "tests").glob("*.yml")))],
        ids=lambda arguments: f"{arguments[0]} {Path(arguments[-1]).stem}",
    )  # fmt: skip
    def test_promtool_agrees(self, arguments: list[str]) -> None:
        run = subprocess.run([str(PROMTOOL), *arguments], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        assert "SUCCESS" in run.stdout
