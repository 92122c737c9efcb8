"""A result as a folder: ``result.json`` for programs and ``report.html`` for people.

Decides names and the form of the file. ``result.json`` holds every repetition with its histograms and its timeline,
what the machine, the versions and the command were, and the scenario in full: ``compare`` and ``report`` need no more.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

__all__ = ["FORMAT", "REPORT", "Unreadable", "default_folder", "load", "save", "save_comparison", "write_json"]

FORMAT = 1
RESULT, REPORT, COMPARISON = "result.json", "report.html", "comparison.json"


OF_RUN = (
    "target", "command", "begun", "commit", "uncommitted_changes", "machine", "load_average_before", "preliminary",
    "versions", "scenario", "summary", "marks", "repetitions",
)  # fmt: skip
OF_SCENARIO = ("name", "about", "texts", "method", "seed", "timeout_s", "phases")
OF_REPETITION = ("void", "notes", "capacity", "recovery_s", "phases", "timeline", "clients")
OF_PHASE = ("name", "callers", "rate", "failed_share", "calls_per_s", "texts_per_s", "tokens_per_s", "latency_ms")


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
    """The result of a run in a folder, or in a file.

    Raises:
        Unreadable: it is not there or of another form; the sentence has the file and the key.
    """
    path = place / RESULT if place.is_dir() else place
    if not path.exists() and (place / COMPARISON).exists():
        raise Unreadable(f"{place} holds a comparison: its two results are in {place / 'a'} and {place / 'b'}")
    try:
        result: dict[str, Any] = orjson.loads(path.read_bytes())
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from None
    except orjson.JSONDecodeError:
        raise Unreadable(f"{path} is not JSON") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise Unreadable(f"{path} is not a result of this version of the load test (format {FORMAT})")
    if result.get("kind") != "run":
        raise Unreadable(f"{path}: kind must be run, as `python -m loadtest run` writes it, not {result.get('kind')}")
    _check(path, "", result, OF_RUN)
    _check(path, "scenario.", result["scenario"], OF_SCENARIO)
    for number, repetition in _numbered(path, "repetitions", result["repetitions"]):
        _check(path, f"repetitions[{number}].", repetition, OF_REPETITION)
        for phase, found in _numbered(path, f"repetitions[{number}].phases", repetition["phases"]):
            _check(path, f"repetitions[{number}].phases[{phase}].", found, OF_PHASE)
    return result


def _check(path: Path, place: str, value: Any, keys: Sequence[str]) -> None:
    if not isinstance(value, dict):
        raise Unreadable(f"{path}: {place.rstrip('.')} must be a table, not {value!r:.60}")
    missing = [place + key for key in keys if key not in value]
    if missing:
        raise Unreadable(f"{path}: {missing[0]} is missing, which every result has")


def _numbered(path: Path, place: str, value: Any) -> Iterator[tuple[int, Any]]:
    if not isinstance(value, list) or not value:
        raise Unreadable(f"{path}: {place} must be a list that is not empty, not {value!r:.60}")
    return enumerate(value, 1)
