"""Results in a terminal.

Decides columns and words. Must never know how a figure came about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtest.drive import Progress as HowFar
from loadtest.summary import FIGURES

__all__ = ["Teller", "console", "number", "print_comparison", "print_rows", "print_run", "ranged"]

WORDS = 30
"""Characters of a cell that is no figure any more."""
WIDE = 100
"""Columns of a terminal that holds every figure."""


def console() -> Console:
    """Standard output; a file or a pipe has room for every figure."""
    found = Console()
    return found if found.is_terminal else Console(width=140)


def number(value: float | None, *, share: bool = False) -> str:
    """Three significant digits, thousands whole; a share as per cent."""
    if value is None or value != value:  # noqa: PLR0124 - NaN
        return "-"
    if share:
        return f"{value:.1%}"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def ranged(spread: Mapping[str, float] | None, *, share: bool = False) -> str:
    """A median, and its range where there is one."""
    if spread is None:
        return "-"
    median = number(spread["median"], share=share)
    if spread["lowest"] == spread["highest"]:
        return median
    return f"{median} ({number(spread['lowest'], share=share)} to {number(spread['highest'], share=share)})"


def _stacked(spread: Mapping[str, float] | None, *, share: bool) -> str:
    """The median, and the range in a second line."""
    if spread is None or spread["lowest"] == spread["highest"]:
        return ranged(spread, share=share)
    low, high = (number(spread[end], share=share) for end in ("lowest", "highest"))
    return f"{number(spread['median'], share=share)}\n[dim]{low} to {high}[/dim]"


class Teller:
    """Says what goes on: a bar where there is a terminal, a line for each repetition anyway."""

    def __init__(self, console: Console) -> None:
        """``console`` is where results go as well."""
        self.console = console

    @contextmanager
    def bar(self, title: str) -> Iterator[Any]:
        """A progress bar; what it gives is called with each ``Progress``."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[calls]}"),
        )
        # Off a terminal nothing is drawn: a log full of bars helps nobody.
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(escape(title), total=None, calls="connecting and warming up")

            def show(far: HowFar) -> None:
                calls = f"{far.calls:,} calls" + (f", {far.failed:,} not answered" if far.failed else "")
                bar.update(task, total=far.of, completed=max(0.0, min(far.seconds, far.of)), calls=calls)

            yield show

    def say(self, text: str, style: str = "") -> None:
        """A line."""
        self.console.print(escape(text), style=style, highlight=False, soft_wrap=True)


def print_run(teller: Teller, result: Mapping[str, Any]) -> None:
    """A run's phases, its marks, and what a reader should know."""
    summary = result["summary"]
    table = Table(title=escape(f"{result['scenario']['name']}: {result['target']}"), title_justify="left")
    table.add_column("phase")
    table.add_column("load", justify="right")
    # One text a call needs no second column that says the same, and a narrow terminal has no room for all.
    left_out = {"texts_per_s"} if result["scenario"]["texts"]["per_call"] == 1 else set()
    left_out |= {"tokens_per_s", "p95_ms"} if teller.console.width < WIDE else set()
    names = [name for name in FIGURES if name not in left_out]
    for name in names:
        table.add_column(FIGURES[name][0], justify="right", no_wrap=True)
    for phase in summary["phases"]:
        load = f"{phase['callers']} callers" if phase["callers"] else f"{number(phase['rate']['median'])}/s"
        cells = (_stacked(phase[name], share=name == "failed_share") for name in names)
        table.add_row(escape(phase["name"]), load, *cells)
    teller.console.print(table)
    for line in _facts(result):
        teller.say(line)
    for row in result["marks"]:
        verdict = "met" if row["met"] else "MISSED"
        teller.say(f"mark {row['mark']} {row['asked']:g}: found {number(row['found'])}: {verdict}",
                   "green" if row["met"] else "bold red")  # fmt: skip
    for note in dict.fromkeys(note for one in result["repetitions"] for note in one["notes"]):
        teller.say(f"note: {note}", "yellow")
    for count, one in enumerate(result["repetitions"], 1):
        for reason in one["void"]:
            teller.say(f"VOID, repetition {count}: {reason}", "bold red")


def _facts(result: Mapping[str, Any]) -> Iterator[str]:
    summary = result["summary"]
    if "client_cpu_share" in summary:
        processes = len(result["repetitions"][0]["clients"])
        yield f"clients: {processes} process(es), {ranged(summary['client_cpu_share'], share=True)} of a core together"
    if "capacity" in summary:
        yield f"capacity: {ranged(summary['capacity'])} calls/s"
    if "recovery_s" in summary:
        yield f"normal again {ranged(summary['recovery_s'])} s after the burst"
    if "padding_efficiency" in summary:
        yield f"padding efficiency: {ranged(summary['padding_efficiency'], share=True)} of what was computed was text"
    rejects: dict[str, int] = {}
    for one in result["repetitions"]:
        for phase in one["phases"]:
            for reason, count in phase["rejects"].items():
                rejects[reason] = rejects.get(reason, 0) + count
    if rejects:
        yield "not answered: " + ", ".join(f"{count:,} x {reason}" for reason, count in rejects.items())
    if result["preliminary"]:
        yield f"preliminary: the machine was busy before the run (load average {result['load_average_before'][0]})"


def print_comparison(teller: Teller, comparison: Mapping[str, Any]) -> None:
    """Two sides, phase by phase."""
    a, b = comparison["a"], comparison["b"]
    repetitions = " and ".join(str(n) for n in comparison["repetitions"])
    table = Table(title=escape(f"{comparison['scenario']}: A = {a}, B = {b}; {repetitions} repetitions"))
    for title in ("phase", "figure"):
        table.add_column(title)
    for title in ("A", "B", "A / B"):
        table.add_column(title, justify="right")
    table.add_column("verdict")
    for row in comparison["rows"]:
        share = row["figure"] == "failed_share"
        style = "" if row["verdict"].startswith("no difference") else "bold"
        table.add_row(escape(row["phase"]), FIGURES[row["figure"]][0], ranged(row["a"], share=share),
                      ranged(row["b"], share=share), ranged(row["ratio"]), row["verdict"], style=style)  # fmt: skip
    teller.console.print(table)
    for line in comparison["notes"]:
        teller.say(f"note: {line}", "yellow")


def print_rows(teller: Teller, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A small table; a last column that says something in words is set as words are."""
    table = Table(title=escape(title), title_justify="left")
    for place, column in enumerate(columns):
        words = not place or max((len(row[place]) for row in rows), default=0) > WORDS
        table.add_column(column, justify="left" if words else "right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    teller.console.print(table)
