"""``python -m loadtest``: the load test as a command.

Decides options, exit codes and where results go. Exit codes: 0 the run counts and reaches its marks, 1 a mark is
missed, 2 the command or the scenario is wrong or the server cannot be reached, 3 a repetition is void (of a server
that was lost, too), 130 Ctrl-C.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from loadtest import store, yardstick
from loadtest.comparison import compared
from loadtest.deployment import AUTO, CLIENTS, Reach
from loadtest.drive import TargetFailed
from loadtest.report import page_of
from loadtest.result import Run
from loadtest.runner import run_in_turns, saved
from loadtest.scenario import Marks, Scenario, ScenarioError, load_scenario, shipped
from loadtest.table import Teller, console, print_comparison, print_rows, print_run, ranged

MISSED, WRONG, VOID = 1, 2, 3
INTERRUPTED = 130
"""As a shell has it: 128 and the number of SIGINT."""
TARGET_HELP = "HOST:PORT of a deployment, or serve:, null: or echo: for a server that is started for the test."


class _Commands(click.Group):
    """Ctrl-C is a sentence and an exit code; what was started for the test has ended by then."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was given."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            Teller(console()).say("interrupted: all that was started has ended, and no result is written", "yellow")
            sys.exit(INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Load-test an embedserve deployment: python -m loadtest run short --target localhost:50051."""


def _load_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What may be changed of a scenario, and how calls travel."""
    options = (
        click.option("--out", type=click.Path(path_type=Path), help="Folder of the results."),
        click.option("--seconds", type=float, help="Of each phase, instead of the scenario's."),
        click.option("--callers", type=int, help="Closed loop with so many callers in each phase."),
        click.option("--rate", type=float, help="Open loop with so many calls a second in each phase."),
        click.option("--set", "sets", multiple=True, metavar="NAME=VALUE", help="Any key: texts.per_call=8."),
        click.option("--mark", "marks", multiple=True, metavar="NAME=VALUE", help="p99_ms_at_most=200."),
        click.option("--capacity", type=click.FloatRange(0, min_open=True), help="Calls/s; absent: measured first."),
        click.option("--processes", type=click.IntRange(1, 256), help="Client processes."),
        click.option("--connections", type=click.IntRange(1, 1000), default=4, help="Of each process; 4."),
        click.option("--client", type=click.Choice([AUTO, *CLIENTS]), default=AUTO, show_default=True,
                     help="By what they take of a core: native (C++, no TLS), wire, grpc (grpc.aio)."),
        click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="Metadata sent with each call."),
        click.option("--tls", is_flag=True, help="Speak TLS to HOST:PORT."),
        click.option("--ca", type=click.Path(exists=True, dir_okay=False), help="Trusted certificates, PEM."),
        click.argument("settings", nargs=-1, type=click.UNPROCESSED),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("scenario")
@click.option("--target", required=True, help=TARGET_HELP)
@click.option("--repeat", type=click.IntRange(1, 1000), default=1, show_default=True, help="Repetitions.")
@click.option(
    "--metrics", help="The server's metrics, such as http://HOST:8001/metrics: batches, padding, CPU, memory."
)
@_load_options
def run(scenario: str, target: str, repeat: int, metrics: str | None, **options: Any) -> None:
    """Run SCENARIO (a name of `list`, or a TOML file) against one server.

    After --, settings of a server that is started, as to `embedserve serve`.
    """
    teller = Teller(console())
    with _told_errors(teller):
        chosen = _scenario(scenario, options)
        (result,) = run_in_turns(
            chosen, [(target, _reach(options, metrics))], repeat=repeat, teller=teller, command=_command(),
            capacity=options["capacity"], processes=options["processes"],
        )  # fmt: skip
        folder = options["out"] or store.default_folder(chosen.name)
        saved(folder, result)
    print_run(teller, result)
    teller.say(f"written: {folder}/result.json and {folder}/report.html")
    sys.exit(_exit_code(result))


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--scenario", default="short", show_default=True, help="A name of `list`, or a TOML file.")
@click.option("--repeat", type=click.IntRange(1, 1000), default=5, show_default=True, help="Repetitions of each side.")
@click.option("--metrics-a", help="A's metrics.")
@click.option("--metrics-b", help="B's metrics.")
@_load_options
def compare(
    a: str, b: str, scenario: str, repeat: int, metrics_a: str | None, metrics_b: str | None, **options: Any
) -> None:
    """Compare two servers, in turns with the same texts; or two folders with results.

    Where the ranges of the repetitions overlap it says so: no difference shown.
    """
    teller = Teller(console())
    with _told_errors(teller):
        there = [Path(place).exists() for place in (a, b)]
        if any(there) and not all(there):
            folder, other = (a, b) if there[0] else (b, a)
            raise ScenarioError(
                f"compare takes two folders or two targets; {folder} is there, and {other} is no folder"
            )
        if all(there):
            results = [store.load(Path(place)) for place in (a, b)]
            comparison = compared(*results, interleaved=False)
        else:
            chosen = _scenario(scenario, options)
            sides = [(a, _reach(options, metrics_a)), (b, _reach(options, metrics_b))]
            results = run_in_turns(
                chosen, sides, repeat=repeat, teller=teller, command=_command(), capacity=options["capacity"],
                processes=options["processes"],
            )  # fmt: skip
            comparison = compared(*results, interleaved=True)
            folder = options["out"] or store.default_folder(f"compare-{chosen.name}")
            for side, result in zip("ab", results, strict=True):
                saved(folder / side, result)
            store.save_comparison(folder, comparison)
            teller.say(f"written: {folder}/comparison.json, {folder}/a and {folder}/b")
    print_comparison(teller, comparison)
    sys.exit(VOID if any(one["void"] for result in results for one in result["repetitions"]) else 0)


@main.command(name="list")
def list_scenarios() -> None:
    """The scenarios that come along."""
    teller = Teller(console())
    rows = []
    for name in shipped():
        scenario = load_scenario(name)
        rows.append((name, f"{scenario.seconds:.0f} s", scenario.about))
    print_rows(teller, "python -m loadtest run NAME --target HOST:PORT", ("name", "takes", "what it shows"), rows)


@main.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
def report(folder: Path) -> None:
    """Write the HTML report of a result anew."""
    teller = Teller(console())
    with _told_errors(teller):
        result = store.load(folder)
    place = (folder if folder.is_dir() else folder.parent) / store.REPORT
    place.write_text(page_of(result), encoding="utf-8")
    print_run(teller, result)
    teller.say(f"written: {place}")


def _yardstick_options(scenario: str, seconds: float, repeat: int) -> Callable[..., Any]:
    """Of the commands that start their servers themselves."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        options = (
            click.argument("scenario", default=scenario),
            click.option("--repeat", type=click.IntRange(1, 100), default=repeat, show_default=True),
            click.option("--seconds", type=float, default=seconds, show_default=True, help="Of each turn."),
            click.option("--client", type=click.Choice([AUTO, *CLIENTS]), default=AUTO, show_default=True),
            click.option("--write", type=click.Path(path_type=Path, dir_okay=False), help="The result as JSON."),
            click.argument("settings", nargs=-1, type=click.UNPROCESSED),
        )
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@main.command(name="ceiling")
@_yardstick_options("short", seconds=6.0, repeat=5)
def ceiling_command(**options: Any) -> None:
    """The product on the null model against a bare grpc.aio echo of the same sizes, in turns."""
    _yardstick("ceiling", options, lambda scenario, reach, teller: yardstick.ceiling(
        scenario, reach, options["repeat"], teller, _command()))  # fmt: skip


@main.command(name="bare")
@_yardstick_options("docs", seconds=8.0, repeat=3)
def bare_command(**options: Any) -> None:
    """End to end against the engine alone on the same texts, sorted, in its best batches; and that against matrices."""
    _yardstick("bare", options, lambda scenario, reach, teller: yardstick.bare(
        scenario, reach, options["repeat"], options["seconds"], teller))  # fmt: skip


@main.command(name="overhead")
@_yardstick_options("one", seconds=5.0, repeat=5)
def overhead_command(**options: Any) -> None:
    """One caller's p50 against tokenising and a bare forward pass of the same texts."""
    _yardstick("overhead", options, lambda scenario, reach, teller: yardstick.overhead(
        scenario, reach, options["repeat"], options["seconds"], teller))  # fmt: skip


@main.command(name="memory")
@click.option("--texts", type=click.IntRange(1000), default=1_000_000, show_default=True)
@_yardstick_options("ingest", seconds=15.0, repeat=1)
def memory_command(texts: int, **options: Any) -> None:
    """The server's memory after a million texts against its memory when it had settled."""
    _yardstick("memory", options, lambda scenario, reach, teller: yardstick.memory(scenario, reach, texts, teller))


def _yardstick(
    name: str, options: dict[str, Any], measure: Callable[[Scenario, Reach, Teller], dict[str, Any]]
) -> None:
    teller = Teller(console())
    noted = Run(name)
    with _told_errors(teller):
        scenario = load_scenario(options["scenario"], {"seconds": options["seconds"]})
        found = measure(scenario, Reach(client=options["client"], settings=tuple(options["settings"])), teller)
    rows = [(title, ranged(value)) for title, value in found["rows"]]
    print_rows(teller, f"{name}: {scenario.name}", ("", "median (range)"), rows)
    teller.say(f"mark {found['mark']}: {'met' if found['met'] else 'MISSED'}", "green" if found["met"] else "bold red")
    if not noted.quiet:
        teller.say("preliminary: the machine was busy before the run began", "yellow")
    if options["write"]:
        store.write_json(
            options["write"], {**noted.facts(_command()), "scenario": scenario.model_dump(mode="json"), **found}
        )
        teller.say(f"written: {options['write']}")
    sys.exit(0 if found["met"] else MISSED)


def _scenario(name: str, options: dict[str, Any]) -> Scenario:
    overrides: dict[str, Any] = {
        key: options[key] for key in ("callers", "rate", "seconds") if options[key] is not None
    }
    if "callers" in overrides and "rate" in overrides:
        raise ScenarioError("--callers is a closed loop and --rate an open one: give one of them")
    overrides |= dict(_pair(text, "--set") for text in options["sets"])
    for text in options["marks"]:
        mark, value = _pair(text, "--mark")
        if mark not in Marks.model_fields:
            raise ScenarioError(f"--mark {mark}: no such mark; there are {', '.join(Marks.model_fields)}")
        overrides[f"marks.{mark}"] = value
    return load_scenario(name, overrides)


def _pair(text: str, option: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ScenarioError(f"{option} takes NAME=VALUE, not {text!r}")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value  # a word: the schema says whether it may be one


def _reach(options: dict[str, Any], metrics: str | None) -> Reach:
    headers = []
    for text in options["headers"]:
        name, equals, value = text.partition("=")
        if not equals:
            raise ScenarioError(f"--header takes NAME=VALUE, not {text!r}")
        headers.append((name, value))
    return Reach(
        client=options["client"],
        connections=options["connections"],
        metadata=tuple(headers),
        tls=options["tls"],
        ca_file=options["ca"],
        metrics=metrics,
        settings=tuple(options["settings"]),
    )


def _exit_code(result: dict[str, Any]) -> int:
    if any(one["void"] for one in result["repetitions"]):
        return VOID
    return 0 if all(row["met"] for row in result["marks"]) else MISSED


def _command() -> str:
    given = sys.argv[1:]
    # A header may be a secret; what follows it is not written down.
    words = ["..." if before == "--header" else word for before, word in zip(["", *given], given, strict=False)]
    return "python -m " + " ".join(["loadtest", *words])


class _told_errors:  # noqa: N801 - reads as a sentence where it is used
    """What a user can mend becomes a sentence and exit code 2."""

    def __init__(self, teller: Teller) -> None:
        self._teller = teller

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ScenarioError | TargetFailed | ConnectionError | store.Unreadable | ValueError):
            self._fail(error)

    def _fail(self, error: BaseException) -> NoReturn:
        self._teller.say(str(error), "bold red")
        sys.exit(WRONG)


if __name__ == "__main__":
    main(prog_name="python -m loadtest")
