"""The frame that every board has: variables, annotations, links, rows.

Decides how job, model and instance are chosen and what is marked on every chart. Must never know a panel's metric,
except those that say who and since when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from grafana_foundation_sdk.builders import dashboard as builder
from grafana_foundation_sdk.models import dashboard

from dashboards.panels import DATASOURCE, TRACES, Panel
from dashboards.query import BOARD, Scope, metric
from embedserve.telemetry import instruments as m

__all__ = ["Board", "Row", "build"]

TAG: Final = "embedserve"
SINCE: Final = "now-1h"
"""What a board shows at first: long enough to see when it began, short enough for a resolution of seconds."""
REFRESH: Final = "30s"
STEP: Final = "1m"
"""Resolution of annotations: a model that changes is marked for one of them."""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard."""

    name: str
    """Of its file, and after ``embedserve-`` of its address in Grafana."""
    title: str
    description: str
    rows: Sequence[Row]


def build(board: Board) -> dashboard.Dashboard:
    """The dashboard as Grafana imports it."""
    made = (
        builder.Dashboard(f"embedserve / {board.title}")
        .uid(f"embedserve-{board.name}")
        .description(board.description)
        .tags([TAG])
        .time(SINCE, "now")
        .refresh(REFRESH)
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .link(
            builder.DashboardLink("embedserve")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
    )
    for variable in _variables():
        made = made.with_variable(variable)
    for annotation in _annotations():
        made = made.annotation(annotation)
    number = 0
    for row in board.rows:
        number += 1
        made = made.with_row(builder.Row(row.title).id(number))
        for panel in row.panels:
            number += 1
            made = made.with_panel(panel.id(number))
    return made.build()


def _variables() -> list[builder.DatasourceVariable | builder.QueryVariable]:
    info = metric(m.MODEL_INFO)
    # A model is chosen by the instances that serve it: no metric but this one carries its name.
    return [
        builder.DatasourceVariable("datasource").label("Metrics").type("prometheus"),
        builder.DatasourceVariable(TRACES).label("Traces").type("tempo"),
        _choice("job", "Job", f"label_values({info}, job)"),
        _choice("model", "Model", f'label_values({info}{{job=~"$job"}}, name)'),
        _choice("instance", "Instance", f'label_values({info}{{job=~"$job",name=~"$model"}}, instance)'),
    ]


def _choice(name: str, label: str, query: str) -> builder.QueryVariable:
    everything = dashboard.VariableOption(selected=True, text=["All"], value=["$__all"])
    return (
        builder.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query({"query": query, "refId": f"variable-{name}"})
        .definition(query)
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(everything)
    )


def _annotations() -> list[builder.AnnotationQuery]:
    minute = Scope(BOARD.matchers, "2m")
    models, before = (
        f"count by (job, name, revision) ({BOARD.series(m.MODEL_INFO)}{offset})" for offset in ("", " offset 2m")
    )
    started = BOARD.gauge(m.PROCESS_START, "max", ("job", "instance"))
    return [
        _annotation("Restarts", f"{started} * 1000", "restarted", "{{instance}}", "purple")
        .use_value_for_time(True),
        _annotation(
            "Model", f"{models} unless {before}", "model", "{{name}} {{revision}}", "blue"
        ),
        _annotation(
            "Model swaps", f"{minute.increase(m.MODEL_SWAPS, ('instance', 'variant'))} > 0", "now runs {{variant}}",
            "{{instance}}", "green",
        ),
        _annotation(
            "Alerts", 'ALERTS{alertname=~"Embedserve.+",alertstate="firing",job=~"$job"}', "{{alertname}}",
            "{{severity}} {{instance}}", "red",
        ),
    ]  # fmt: skip


def _annotation(name: str, query: str, title: str, text: str, color: str) -> builder.AnnotationQuery:
    return (
        builder.AnnotationQuery()
        .name(name)
        .datasource(DATASOURCE)
        .enable(True)
        .icon_color(color)
        .expr(query)
        .step(STEP)
        .title_format(title)
        .text_format(text)
        .tag_keys("job")
    )
