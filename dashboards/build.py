"""Writes what is committed, or says what differs: ``python -m dashboards.build --write|--check``.

Decides which files there are and how they look. Must never hold a query. The files are committed so that nobody needs
Python to import a dashboard, and checked so that nobody edits them by hand and loses it. ``--operations`` is what
runbook links begin with: where OPERATIONS.md can be read from your pager.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import board
from dashboards.alerts import alert_groups, record_groups
from dashboards.engine import ENGINE
from dashboards.scheduler import SCHEDULER
from dashboards.service import SERVICE

__all__ = ["BOARDS", "OPERATIONS", "anchors", "boards", "made", "main", "panels"]

HERE: Final = Path(__file__).parent
PAGE: Final = HERE.parent / "OPERATIONS.md"
README: Final = HERE / "README.md"
OPERATIONS: Final = "OPERATIONS.md"
"""What runbook links begin with when nobody says otherwise."""
BOARDS: Final = (SERVICE, SCHEDULER, ENGINE)
_TABLE: Final = re.compile(r"(<!-- generated: panels -->\n).*?(\n<!-- end -->)", re.DOTALL)


def anchors(page: str) -> Mapping[str, str]:
    """Headings of a Markdown page, and the anchors that they become."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {heading: re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def boards() -> Mapping[str, dict[str, Any]]:
    """Every dashboard as Grafana imports it, by name."""
    made = {}
    for one in BOARDS:
        model = json.loads(json.dumps(board.build(one), cls=JSONEncoder))
        for link in model["links"]:
            del link["placement"]  # the SDK's default hides links to the other boards in a menu
        made[one.name] = model
    return made


def panels(model: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The panels of a dashboard, each with the heading that it stands under."""
    row = ""
    for panel in model["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        else:
            yield row, panel


def _questions() -> str:
    lines = ["| question | board | row | panel |", "| --- | --- | --- | --- |"]
    for one in BOARDS:
        for row, panel in panels(boards()[one.name]):
            cells = (panel["description"], one.title, row, panel["title"])
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rules(groups: list[dict[str, object]]) -> str:
    head = "# Made by `make dashboards` from dashboards/alerts.py and objectives.py: change those.\n"
    return head + yaml.safe_dump({"groups": groups}, sort_keys=False, width=120)


def made(operations: str = OPERATIONS) -> Mapping[Path, str]:
    """Every generated file, with its text."""
    files = {
        HERE / f"{name}.json": json.dumps(model, indent=1, sort_keys=True) + "\n" for name, model in boards().items()
    }
    files |= {HERE / "rules" / f"{file}.yml": _rules(groups) for file, groups in record_groups().items()}
    files[HERE / "rules" / "alerts.yml"] = _rules(alert_groups(anchors(PAGE.read_text(encoding="utf-8")), operations))
    readme = README.read_text(encoding="utf-8")
    files[README] = _TABLE.sub(lambda match: match[1] + _questions() + match[2], readme)
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """``--check`` returns 1 and prints a diff where a file is not what the code says; ``--write`` makes it so."""
    parser = argparse.ArgumentParser(description="Dashboards and rules, made from the code.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true")
    mode.add_argument("--write", action="store_true")
    parser.add_argument("--operations", default=OPERATIONS, metavar="URL", help="address of OPERATIONS.md")
    asked = parser.parse_args(arguments)
    wrong = 0
    for path, text in made(asked.operations).items():
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if asked.write:
            path.write_text(text, encoding="utf-8")
        elif before != text:
            wrong = 1
            diff = difflib.unified_diff(before.splitlines(True), text.splitlines(True), path.name, "what the code says")
            sys.stdout.writelines(diff)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
