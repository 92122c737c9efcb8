"""The ``embedserve`` command: serve, check-config, healthcheck, embed.

Decides how settings become flags, what is printed where, and the exit code of every ending:

    0   done; served and drained
    1   could not start, or the work could not be done
    2   the settings or the command line are wrong; every problem is listed
    3   served, but calls were cut off because the grace was too short
    70  a promise of our own code is broken
    130 interrupted

Standard output carries results only; all else goes to standard error. Must never import torch or gRPC before a command
needs them: ``check-config`` and ``--help`` answer at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import orjson

from embedserve import __version__
from embedserve.bulk.command import embed
from embedserve.config import Config, Loaded
from embedserve.errors import ConfigError, EmbedServeError, InvariantBroken
from embedserve.flags import load_flags, setting_flags
from embedserve.lifecycle import ExitCode
from embedserve.migration import hints
from embedserve.settings import render, settings_of

__all__ = ["main"]

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


class ReaderLeft(Exception):
    """Whoever reads our standard output has seen enough."""


class Commands(click.Group):
    """The group of all commands. click ends the process with 1 on a broken pipe; for us that is no failure."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was given."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderLeft from error


@click.group(cls=Commands, context_settings={"max_content_width": 120, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="embedserve", message="%(prog)s %(version)s")
def commands() -> None:
    """Text to vectors in production."""


@commands.command()
@setting_flags()
def serve(config_file: str | None, **arguments: Any) -> int:
    """Serve until SIGTERM."""
    loaded = load_flags(config_file, arguments, on_this_machine=True)
    from embedserve.app import run  # noqa: PLC0415 (brings torch and gRPC)

    return run(loaded.config)


@commands.command("check-config")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@setting_flags()
def check_config(config_file: str | None, *, as_json: bool, **arguments: Any) -> int:
    """Print every setting with where it came from, or every problem."""
    try:
        loaded = load_flags(config_file, arguments, on_this_machine=True)
    except ConfigError as error:
        if not as_json:
            _print_hints()
            raise
        click.echo(orjson.dumps({"problems": error.problems, "hints": hints(os.environ)}, option=orjson.OPT_INDENT_2))
        return ExitCode.BAD_CONFIG
    if as_json:
        click.echo(_json(loaded))
    else:
        click.echo(_table(loaded))
        _print_hints()
    return ExitCode.OK


def _values(loaded: Loaded) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for setting in settings_of(Config):
        value: Any = loaded.config
        for name in setting.path.split("."):
            value = getattr(value, name)
        values[setting.path] = value
    return values


def _table(loaded: Loaded) -> str:
    rows = [(path, render(value), str(loaded.provenance[path])) for path, value in _values(loaded).items()]
    rows.insert(0, ("setting", "value", "from"))
    path_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{path:<{path_width}}  {value:<{value_width}}  {origin}" for path, value, origin in rows)


def _json(loaded: Loaded) -> bytes:
    settings = {
        path: {"value": value, "source": loaded.provenance[path].source, "name": loaded.provenance[path].name}
        for path, value in _values(loaded).items()
    }
    return orjson.dumps({"settings": settings, "hints": hints(os.environ)}, option=orjson.OPT_INDENT_2)


def _print_hints() -> None:
    for hint in hints(os.environ):
        click.echo(f"hint: {hint}", err=True)


@commands.command()
@setting_flags("server.address")
@click.option("--service", default="", metavar="NAME", help="Health service to ask for. Default: the whole server.")
@click.option(
    "--timeout-ms",
    type=click.IntRange(1, 3_600_000),
    default=1000,
    show_default=True,
    help="Time for the answer. Kubernetes gives a probe one second.",
)
def healthcheck(config_file: str | None, *, service: str, timeout_ms: int, **arguments: Any) -> int:
    """Exit with 0 when the server at server.address (the first one) is SERVING, with 1 and a reason otherwise."""
    loaded = load_flags(config_file, arguments, on_this_machine=False)
    from embedserve.probe import check_health, target_of  # noqa: PLC0415 (brings gRPC)

    why_not = check_health(target_of(loaded.config.server.addresses[0]), service, timeout_ms)
    if why_not is None:
        return ExitCode.OK
    click.echo(f"embedserve: {why_not}", err=True)
    return ExitCode.START_FAILED


commands.add_command(embed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    _hold_standard_descriptors()
    try:
        code = commands.main(args=arguments, prog_name="embedserve", standalone_mode=False)
        if sys.stdout is not None:  # it is None where it was closed before we came
            sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ConfigError as error:
        _say("\n  ".join([f"{len(error.problems)} wrong in the settings:", *error.problems]))
        return ExitCode.BAD_CONFIG
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except (ReaderLeft, BrokenPipeError):
        # The interpreter flushes standard output once more at its end: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except InvariantBroken:
        traceback.print_exc()
        return ExitCode.BROKEN
    except EmbedServeError as error:
        _say(str(error))
        return ExitCode.START_FAILED
    except Exception:  # noqa: BLE001 (one of the three places that may: an unforeseen end is a broken promise, too)
        traceback.print_exc()
        return ExitCode.BROKEN
    return int(code or ExitCode.OK)


def _hold_standard_descriptors() -> None:
    """Point descriptors 0 to 2 to nowhere where they were closed before we came.

    The next socket would get such a number: foreign code that writes to standard error would write to a client, and
    libuv aborts the process when it closes one.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the system gives the lowest number that is free
    if sys.stderr is None:  # a traceback would go to standard output then, and a progress bar has nowhere to go
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives


def _say(sentence: str) -> None:
    click.echo(f"embedserve: {sentence}", err=True)
