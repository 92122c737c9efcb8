"""Kinds of panels, and how each looks.

Decides what a stat, a line chart, a heatmap and a state timeline look like on every board. Must never know a metric.
A panel's description is the question that it answers, so none is made without one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import quote

from grafana_foundation_sdk.builders import common as common_builder
from grafana_foundation_sdk.builders import dashboard as dashboard_builder
from grafana_foundation_sdk.builders import heatmap as heatmap_builder
from grafana_foundation_sdk.builders import prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.models import common, dashboard, heatmap
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

__all__ = ["DATASOURCE", "TRACES", "Limits", "Panel", "Target", "facts", "figure", "heat", "lines", "timeline"]

DATASOURCE: Final = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
TRACES: Final = "traces"
"""Name of the variable that chooses where traces are."""
STAT_HEIGHT, CHART_HEIGHT = 4, 8
WIDTH: Final = 24

Panel = timeseries.Panel | stat.Panel | heatmap_builder.Panel | statetimeline.Panel | table.Panel
"""Any kind; all are built the same way."""


@dataclass(frozen=True, slots=True)
class Target:
    """One query, and what its series are called."""

    query: str
    legend: str = ""
    exemplar: bool = False
    """Show sampled traces as points: for queries over a histogram's buckets."""

    def build(self, number: int, *, now: bool = False, heat: bool = False) -> prometheus.Dataquery:
        """As the panel's target ``number``."""
        made = prometheus.Dataquery().expr(self.query).legend_format(self.legend).ref_id(chr(ord("A") + number))
        if now:
            return made.instant()
        made = made.range().exemplar(self.exemplar)
        return made.format(PromQueryFormat.HEATMAP) if heat else made


@dataclass(frozen=True, slots=True)
class Limits:
    """Values from which a figure turns yellow, and red."""

    warning: float
    bad: float

    def build(self) -> dashboard_builder.ThresholdsConfig:
        """Green below, or red, yellow, green where low is bad."""
        low = self.bad < self.warning
        steps = (
            [(None, "red"), (self.bad, "yellow"), (self.warning, "green")]
            if low
            else [(None, "green"), (self.warning, "yellow"), (self.bad, "red")]
        )
        return (
            dashboard_builder.ThresholdsConfig()
            .mode(dashboard.ThresholdsMode.ABSOLUTE)
            .steps([dashboard.Threshold(value, color) for value, color in steps])
        )


def _thresholds(limits: Limits | None) -> dashboard_builder.ThresholdsConfig:
    if limits is not None:
        return limits.build()
    return dashboard_builder.ThresholdsConfig().steps([dashboard.Threshold(None, "blue")])


def _mapping(values: Mapping[int, tuple[str, str]]) -> list[dashboard.ValueMapping]:
    results = {
        str(value): dashboard.ValueMappingResult(text=text, color=color, index=place)
        for place, (value, (text, color)) in enumerate(values.items())
    }
    return [dashboard.ValueMap(options=results)]


def _slow_traces(min_s: float) -> dashboard_builder.DashboardLink:
    """A click on a chart of latencies: traces of the chosen time that are slow, in Tempo."""
    panes = {
        "slow": {
            "datasource": f"${{{TRACES}}}",
            "queries": [
                {
                    "refId": "A",
                    "queryType": "traceql",
                    "query": f'{{ name =~ "embedserve.v1.EmbeddingService/.*" && duration > {min_s * 1000:g}ms }}',
                    "datasource": {"type": "tempo", "uid": f"${{{TRACES}}}"},
                }
            ],
            "range": {"from": "${__from}", "to": "${__to}"},
        }
    }
    query = quote(json.dumps(panes, separators=(",", ":")), safe="")
    for variable in (TRACES, "__from", "__to"):  # which Grafana fills in only where they stand as they are
        query = query.replace(quote(f"${{{variable}}}"), f"${{{variable}}}")
    return (
        dashboard_builder.DashboardLink("Slow traces of this time")
        .url(f"/explore?schemaVersion=1&panes={query}")
        .target_blank(True)
    )


def figure(
    title: str, question: str, *targets: Target, unit: str, limits: Limits | None = None, none: str = "no calls",
    decimals: int | None = None, width: int = 4, colors: Mapping[str, str] | None = None, named: bool = False,
) -> stat.Panel:  # fmt: skip
    """One number that is read at a glance: as it is now, or ``none`` where there is none now.

    It is asked for as of now because Grafana shows the last value of the chosen time otherwise, however old it is, and
    without NaN, which a quantile of nothing is. ``named`` or with ``colors``, the series' name stands beside it.
    """
    made = (
        stat.Panel()
        .title(title).description(question).datasource(DATASOURCE).height(STAT_HEIGHT).span(width)
        .unit(unit).no_value(none).thresholds(_thresholds(limits))
        .color_mode(common.BigValueColorMode.BACKGROUND if limits else common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.NONE)
        .text_mode(common.BigValueTextMode.VALUE_AND_NAME if colors or named else common.BigValueTextMode.AUTO)
        .reduce_options(common_builder.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )  # fmt: skip
    if decimals is not None:
        made = made.decimals(decimals)
    for name, color in (colors or {}).items():
        made = made.override_by_name(
            name, [dashboard.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})]
        )
    for number, target in enumerate(targets):
        made = made.with_target(replace(target, query=f"{target.query} >= 0").build(number, now=True))
    return made


def lines(
    title: str, question: str, *targets: Target, unit: str, width: int = 8, stacked: bool = False,
    limits: Limits | None = None, low: float | None = 0, high: float | None = None, slow_from_s: float | None = None,
    colors: Mapping[str, str] | None = None,
) -> timeseries.Panel:  # fmt: skip
    """Values over time. ``limits`` are drawn as lines; ``slow_from_s`` adds a link to traces that took longer."""
    made = (
        timeseries.Panel()
        .title(title).description(question).datasource(DATASOURCE).height(CHART_HEIGHT).span(width)
        .unit(unit).line_width(1).fill_opacity(60 if stacked else 8).show_points(common.VisibilityMode.NEVER)
        .legend(
            common_builder.VizLegendOptions().display_mode(common.LegendDisplayMode.TABLE)
            .placement(common.LegendPlacement.BOTTOM).show_legend(True).calcs(["lastNotNull", "max"])
        )
        .tooltip(
            common_builder.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
        )
    )  # fmt: skip
    if low is not None:
        made = made.min(low)
    if high is not None:
        made = made.max(high)
    if stacked:
        made = made.stacking(common_builder.StackingConfig().mode(common.StackingMode.NORMAL))
    if limits is not None:
        style = common_builder.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        made = made.thresholds(limits.build()).thresholds_style(style)
    if slow_from_s is not None:
        made = made.data_links([_slow_traces(slow_from_s)])
    for name, color in (colors or {}).items():
        fixed = [dashboard.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})]
        made = made.override_by_name(name, fixed)
    for number, target in enumerate(targets):
        made = made.with_target(target.build(number))
    return made


def heat(title: str, question: str, target: Target, *, unit: str, width: int = 8) -> heatmap_builder.Panel:
    """How many observations fell into each bucket of a histogram, over time. The query sums by ``le``."""
    return (
        heatmap_builder.Panel()
        .title(title).description(question).datasource(DATASOURCE).height(CHART_HEIGHT).span(width)
        .calculate(False).y_axis(heatmap_builder.YAxisConfig().unit(unit))
        .color(
            heatmap_builder.HeatmapColorOptions().mode(heatmap.HeatmapColorMode.SCHEME).scheme("Oranges").steps(32)
            .exponent(0.5).fill("dark-orange").reverse(False)
        )
        .filter_values(heatmap_builder.FilterValueRange().le(1e-9))
        .cell_gap(1).show_legend()
        .with_target(target.build(0, heat=True))
    )  # fmt: skip


def timeline(
    title: str, question: str, target: Target, *, states: Mapping[int, tuple[str, str]], width: int = 12
) -> statetimeline.Panel:
    """Which state each series was in, and since when. ``states`` are the names and colours of its values."""
    return (
        statetimeline.Panel()
        .title(title).description(question).datasource(DATASOURCE).height(CHART_HEIGHT).span(width)
        .mappings(_mapping(states)).merge_values(True).show_value(common.VisibilityMode.AUTO).row_height(0.8)
        .color_scheme(dashboard_builder.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))
        .with_target(target.build(0))
    )  # fmt: skip


def facts(
    title: str, question: str, target: Target, *, columns: Sequence[str], units: Mapping[str, str] | None = None,
    width: int = 12,
) -> table.Panel:  # fmt: skip
    """A table of what is true now: one row for each series, its labels as ``columns``."""
    shown: dict[str, Any] = {"indexByName": {name: place for place, name in enumerate(columns)}}
    made = (
        table.Panel()
        .title(title).description(question).datasource(DATASOURCE).height(CHART_HEIGHT).span(width)
        .with_transformation(
            dashboard.DataTransformerConfig(
                id_val="filterFieldsByName", options={"include": {"names": list(columns)}}
            )
        )
        .with_transformation(dashboard.DataTransformerConfig(id_val="organize", options=shown))
        .with_target(target.build(0, now=True).format(PromQueryFormat.TABLE))
    )  # fmt: skip
    for name, unit in (units or {}).items():
        made = made.override_by_name(name, [dashboard.DynamicConfigValue("unit", unit)])
    return made
