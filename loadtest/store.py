"""A result as a folder: ``result.json`` for programs and ``report.html`` for people.

Decides names and the form of the file. ``result.json`` holds every repetition with its histograms and its timeline,
what the machine, the versions and the command were, and the scenario in full: ``compare`` and ``report`` need no more.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

__all__ = ["FORMAT", "REPORT", "Unreadable", "default_folder", "load", "save", "save_comparison", "write_json"]

FORMAT = 1
RESULT, REPORT, COMPARISON = "result.json", "report.html", "comparison.json"


class Unreadable(Exception):
    """No result of ours; the message says what is wrong."""


def default_folder(name: str) -> Path:
    """A new folder for a run that began now."""
    return Path("loadtest-results") / f"{name}-{dt.datetime.now(dt.UTC):%Y%m%d-%H%M%S}"


def save(folder: Path, result: Mapping[str, Any], page: str) -> None:
    """Write both files; the folder is made."""
    write_json(folder / RESULT, result)
    (folder / REPORT).write_text(page, encoding="utf-8")


def save_comparison(folder: Path, comparison: Mapping[str, Any]) -> None:
    """Beside the results of both sides."""
    write_json(folder / COMPARISON, comparison)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """One file, with the number of the form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps({"format": FORMAT, **content}, option=orjson.OPT_INDENT_2) + b"\n")


def load(place: Path) -> dict[str, Any]:
    """The result in a folder, or in a file.

    Raises:
        Unreadable: it is not there or of another form.
    """
    path = place / RESULT if place.is_dir() else place
    try:
        result: dict[str, Any] = orjson.loads(path.read_bytes())
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from None
    except orjson.JSONDecodeError:
        raise Unreadable(f"{path} is not JSON") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise Unreadable(f"{path} is not a result of this version of the load test (format {FORMAT})")
    return result
