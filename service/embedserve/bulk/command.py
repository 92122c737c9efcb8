"""The command line of ``embedserve embed``.

Decides what its options are called and mean. Must never read, embed or write anything itself, nor import what does
before it is run: ``embedserve --help`` answers at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from embedserve.bulk.source import STDIN, InputFormat
from embedserve.flags import load_flags, setting_flags

__all__ = ["embed"]


@click.command()
@setting_flags("model.source", "model.device", "model.dtype")
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, allow_dash=True), metavar="[FILE]...")
@click.option(
    "--server", metavar="TARGET", help="Embed on a server, such as localhost:50051. Without: in this process."
)
@click.option(
    "--input-format",
    type=click.Choice(["lines", "jsonl"]),
    help="Default: jsonl where the first file's name ends in .jsonl or .ndjson, lines otherwise.",
)
@click.option("--field", default="text", show_default=True, help="Where the text is in each JSON object.")
@click.option("--id-field", help="A field of each JSON object that goes into the output as id.")
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False, writable=True), default="-", help="Default: standard output."
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["jsonl", "npy", "parquet"]),
    help="Default: as --output ends, or jsonl.",
)
@click.option("--normalize/--no-normalize", default=None, help="Default: as the model says.")
@click.option("--dimensions", type=click.IntRange(min=1), help="Leading components to keep. Default: all.")
@click.option("--prompt-name", help="One of the model's prompts. Default: the model's own.")
@click.option(
    "--truncate",
    type=click.Choice(["none", "end", "start"]),
    default="none",
    show_default=True,
    help="What to cut off a text that is too long; none makes it an error.",
)
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip", "null"]),
    default="fail",
    show_default=True,
    help="A text that fails ends the run, is left out, or gets a row without a vector.",
)
@click.option("--expected-revision", default="", help="Fail unless the server serves this revision or weights digest.")
@click.option(
    "--priority",
    type=click.Choice(["interactive", "default", "bulk"]),
    default="bulk",
    show_default=True,
    help="Class on the server: bulk gives way to everybody who waits for an answer.",
)
@click.option("--batch-size", type=click.IntRange(1, 16384), default=256, show_default=True, help="Texts in one call.")
@click.option(
    "--concurrency", type=click.IntRange(1, 256), default=4, show_default=True, help="Calls at the same time."
)
@click.option(
    "--timeout-ms", type=click.IntRange(1, 86_400_000), default=300_000, show_default=True, help="Deadline of one call."
)
@click.option(
    "--max-retry-ms",
    type=click.IntRange(0, 86_400_000),
    default=120_000,
    show_default=True,
    help="How long to retry without any progress when the server is away or sheds load.",
)
def embed(config_file: str | None, **arguments: Any) -> int:
    """Embed the texts of FILEs, or of standard input, in order.

    With --server, --model is the name of one of its models; without, it is the checkpoint (model.source).
    """
    output, output_format = _output(arguments["output"], arguments["output_format"])
    server, model, config = arguments["server"], arguments["model__source"], None
    if server is None:
        config = load_flags(config_file, arguments, on_this_machine=True).config
    from embedserve.bulk.job import Job, run_job  # noqa: PLC0415 (brings numpy)
    from embedserve.bulk.outcome import Options  # noqa: PLC0415 (brings numpy)

    tally = asyncio.run(
        run_job(
            Job(
                files=arguments["files"] or (STDIN,),
                input_format=arguments["input_format"] or _format_of(arguments["files"]),
                field=arguments["field"],
                id_field=arguments["id_field"],
                output=output,
                output_format=output_format,
                options=Options(
                    truncate=arguments["truncate"],
                    dimensions=arguments["dimensions"],
                    normalize=arguments["normalize"],
                    prompt_name=arguments["prompt_name"],
                ),
                batch_texts=arguments["batch_size"],
                concurrency=arguments["concurrency"],
                on_error=arguments["on_error"],
                server=server,
                config=config,
                model=model or "",
                revision=arguments["expected_revision"],
                priority=arguments["priority"],
                timeout_ms=arguments["timeout_ms"],
                max_retry_ms=arguments["max_retry_ms"],
            )
        )
    )
    if tally.failed:
        click.echo(f"embedserve: {tally.failed} of {tally.failed + tally.embedded} texts have no vector", err=True)
    return 0


def _output(output: str, form: str | None) -> tuple[Path | None, Any]:
    """The file, ``None`` for standard output, and the format. Raises ``click.UsageError`` where they do not fit."""
    path = None if output == STDIN else Path(output)
    if form is None:
        form = {".npy": "npy", ".parquet": "parquet"}.get(path.suffix if path else "", "jsonl")
    if path is None and form != "jsonl":
        raise click.UsageError(
            f"--format {form} needs --output FILE: its rows are counted at the end, which a pipe cannot take"
        )
    return path, form


def _format_of(files: Sequence[str]) -> InputFormat:
    """What the first file's name says, as the output's does."""
    return "jsonl" if files and files[0].endswith((".jsonl", ".ndjson")) else "lines"
