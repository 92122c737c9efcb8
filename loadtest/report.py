"""A result as one HTML page that needs nothing else: no script, no font, no picture from anywhere.

Decides what a reader sees first: whether the run counts, then the figures, then the plots. Must never know how a run
was made; everything comes from ``result.json``.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from math import log10
from pathlib import Path
from typing import Any

from loadtest import histogram
from loadtest.plot import Band, Line, bars, chart
from loadtest.summary import FIGURES
from loadtest.table import number, ranged

__all__ = ["page_of"]

PERCENTILES = (0.0, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999)
PHASES_SHOWN = 6
"""Lines that one plot holds apart."""

STYLE = Path(__file__).resolve().parent / "report.css"


def page_of(result: Mapping[str, Any]) -> str:
    """The page of one result of ``store.py``."""
    title = f"{result['scenario']['name']} on {result['target']}"
    sections = "".join(
        f"<section><h2>{escape(name)}</h2><p class='soft'>{escape(about)}</p>{body}</section>"
        for name, about, body in _sections(result)
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f"<h1>{escape(title)}</h1><p class='soft'>{escape(result['scenario']['about'])}</p>"
        f"{_verdict(result)}{_figures(result)}{sections}{_origin(result)}</body></html>\n"
    )


def _counted(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Repetitions that count; all of them where none does, so that a reader sees what happened."""
    return [one for one in result["repetitions"] if not one["void"]] or list(result["repetitions"])


def _verdict(result: Mapping[str, Any]) -> str:
    void = [(i, reason) for i, one in enumerate(result["repetitions"], 1) for reason in one["void"]]
    missed = [row for row in result["marks"] if not row["met"]]
    lines = [f"<p><strong>VOID</strong>, repetition {i}: {escape(reason)}</p>" for i, reason in void]
    for row in result["marks"]:
        word = "met" if row["met"] else "<strong>missed</strong>"
        lines.append(f"<p>{escape(row['mark'])} {row['asked']:g}: found {number(row['found'])}, {word}</p>")
    if not lines:
        count = result["summary"]["repetitions"]
        what = f"All {count} repetitions count" if count > 1 else "The run counts"
        lines.append(f"<p>{what}; no marks were set.</p>")
    notes = dict.fromkeys(note for one in result["repetitions"] for note in one["notes"])
    lines += [f"<p class='soft'>{escape(note)}</p>" for note in notes]
    if result["preliminary"]:
        lines.append("<p class='soft'>Preliminary: the machine was busy before the run began.</p>")
    return f"<div class='verdict{' bad' if void or missed else ''}'>{''.join(lines)}</div>"


def _figures(result: Mapping[str, Any]) -> str:
    left_out = {"texts_per_s"} if result["scenario"]["texts"]["per_call"] == 1 else set()
    names = [name for name in FIGURES if name not in left_out]
    head = "".join(f"<th>{escape(FIGURES[name][0])}</th>" for name in names)
    rows = ""
    for phase in result["summary"]["phases"]:
        load = f"{phase['callers']} callers" if phase["callers"] else f"{number(phase['rate']['median'])}/s"
        cells = "".join(f"<td>{_stacked(phase[name], share=name == 'failed_share')}</td>" for name in names)
        rows += f"<tr><td>{escape(phase['name'])}</td><td>{load}</td>{cells}</tr>"
    table = f"<div class='scroll'><table><tr><th>phase</th><th>load</th>{head}</tr>{rows}</table></div>"
    summary = result["summary"]
    facts = []
    if "client_cpu_share" in summary:
        facts.append(f"The clients used {ranged(summary['client_cpu_share'], share=True)} of a core together.")
    if "capacity" in summary:
        facts.append(f"Rates refer to a capacity of {ranged(summary['capacity'])} calls/s.")
    if "recovery_s" in summary:
        facts.append(f"Latency was normal again {ranged(summary['recovery_s'])} s after the burst.")
    return table + "".join(f"<p>{escape(fact)}</p>" for fact in facts)


def _stacked(spread: Mapping[str, float] | None, *, share: bool) -> str:
    """The median, and the range below it."""
    if spread is None or spread["lowest"] == spread["highest"]:
        return ranged(spread, share=share)
    low, high = (number(spread[end], share=share) for end in ("lowest", "highest"))
    return f"{number(spread['median'], share=share)}<br><small class='soft'>{low} to {high}</small>"


def _sections(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    runs = _counted(result)
    yield (
        "Latency against rate",
        (
            "Each point is a phase, from fewest calls a second to most: medians of the repetitions. Of an open loop, "
            "the rate is what was offered; of a closed one, what was answered."
        ),
        _latency_against_rate(runs),
    )
    yield (
        "Percentiles",
        "All answered calls, by phase. Latency counts from the instant at which a call was meant to be sent.",
        _percentiles(runs),
    )
    last = runs[-1]
    bands = [Band(p["name"], p["begins"], p["begins"] + p["seconds"]) for p in last["phases"]]
    yield "Timeline: calls", "By the second, of the last repetition that counts.", _calls_timeline(last, bands)
    yield "Timeline: latency", "By the second in which the calls were meant to be sent.", _latency_timeline(last, bands)
    yield "Batch sizes", *_batches(runs)
    yield (
        "Padding efficiency",
        "Tokens of texts over tokens computed: what is left is padding.",
        _padding(result["repetitions"]),
    )
    yield "Rejects by reason", "Calls without vectors, by status and the server's own word.", _rejects(runs)


def _latency_against_rate(runs: Sequence[Mapping[str, Any]]) -> str:
    points = []
    for column in zip(*(one["phases"] for one in runs), strict=True):
        answered = [phase for phase in column if phase["latency_ms"]]
        if answered:
            rate = statistics.median(phase["rate"] or phase["calls_per_s"] for phase in answered)
            points.append(
                (rate, [statistics.median(p["latency_ms"][q] for p in answered) for q in ("p50", "p95", "p99")])
            )
    points.sort()
    rates = [rate for rate, _ in points]
    lines = [Line(label, rates, [values[i] for _, values in points], points=True)
             for i, label in enumerate(("p50", "p95", "p99"))]  # fmt: skip
    return chart(lines, x_label="calls a second", y_label="latency, ms", log_y=True)


def _percentiles(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    columns = list(zip(*(one["phases"] for one in runs), strict=True))
    step = max(1, -(-len(columns) // PHASES_SHOWN))
    for column in columns[::step]:
        packed = [phase["histogram"] for phase in column]
        total = sum(sum(one.values()) for one in packed)
        if total:
            # A percentile of fewer than ten calls above it says nothing.
            shares = [share for share in PERCENTILES if (1 - share) * total >= 1]
            values: list[float | None] = [histogram.percentile(packed, share) for share in shares]
            lines.append(Line(column[0]["name"], [-log10(1 - share) for share in shares], values, points=True))
    reached = max((line.x[-1] for line in lines), default=0.0)
    named = [(0.0, "0"), (-log10(0.5), "50 %"), (1.0, "90 %"), (2.0, "99 %"), (3.0, "99.9 %"), (4.0, "99.99 %")]
    ticks = [tick for place, tick in enumerate(named) if place < 3 or named[place - 1][0] < reached - 1e-9]
    return chart(lines, x_label="share of the calls", y_label="latency, ms", log_y=True, x_ticks=ticks)


def _calls_timeline(run: Mapping[str, Any], bands: Sequence[Band]) -> str:
    timeline = run["timeline"]
    kinds = [
        kind
        for kind in ("sent", "answered", "refused", "expired", "failed")
        # A result that was written before those that expired were told apart has them among those that failed.
        if kind in ("sent", "answered") or any(timeline.get(kind, ()))
    ]
    lines = [Line(kind, timeline["second"], timeline[kind]) for kind in kinds]
    return chart(lines, x_label="seconds", y_label="calls a second", bands=bands)


def _latency_timeline(run: Mapping[str, Any], bands: Sequence[Band]) -> str:
    timeline = run["timeline"]
    lines = [Line(name, timeline["second"], timeline[f"{name}_ms"]) for name in ("p50", "p99")]
    return chart(lines, x_label="seconds", y_label="latency, ms", log_y=True, bands=bands)


def _batches(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    told = [one["server"]["batch_sizes"] for one in runs if one.get("server", {}).get("batch_sizes")]
    if told:
        what = "Batches by the number of texts in them, up to so many; by the server's own metrics."
    else:
        told = [phase["batches"] for one in runs for phase in one["phases"] if phase["batches"]]
        what = "Calls by the number of texts in the batch they rode in, up to so many; by the answers."
    if not told:
        return "The server does not say how many texts shared a batch.", ""
    edges = sorted(
        {edge for shares in told for edge in shares}, key=lambda e: float("inf") if e == "more" else float(e)
    )
    rows = []
    for edge in edges:
        share = sum(shares.get(edge, 0.0) for shares in told) / len(told)
        rows.append((edge, share, f"{share:.1%}"))
    return what, bars(rows)


def _padding(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for count, one in enumerate(runs, 1):
        value = one.get("server", {}).get("padding_efficiency")
        if value is None:
            told = [phase["padding_efficiency"] for phase in one["phases"] if phase["padding_efficiency"] is not None]
            value = sum(told) / len(told) if told else None
        if value is not None:
            rows.append((f"repetition {count}", value, f"{value:.1%}"))
    if not rows:
        return "<p class='none'>Not known: give --metrics with the address of the server's metrics.</p>"
    return bars(rows, highest=1.0, colour=2)


def _rejects(runs: Sequence[Mapping[str, Any]]) -> str:
    found = Counter[str]()
    for one in runs:
        for phase in one["phases"]:
            found.update(phase["rejects"])
    if not found:
        return "<p class='none'>Every call was answered.</p>"
    return bars([(reason, float(count), f"{count:,}") for reason, count in found.most_common()], colour=3)


def _origin(result: Mapping[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    size = f"{machine['cores']} cores, {machine['memory_gib']} GiB"
    rows = {
        "command": result["command"],
        "begun": result["begun"],
        "commit": result["commit"] + (", with uncommitted changes" if result["uncommitted_changes"] else ""),
        "client's machine": f"{machine['cpu']}, {size}, {machine['system']}",
        "load average before": ", ".join(str(x) for x in result["load_average_before"]),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "scenario": str(result["scenario"]),
    }
    lines = "\n".join(f"{name}: {value}" for name, value in rows.items())
    return f"<section><h2>Where this comes from</h2><pre>{escape(lines)}</pre></section>"
