"""The track record: every fault has a test that is still there, or a reason for having none."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HERE = "tests/contract/test_track_record.py"
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "tests" / "TRACK_RECORD.md").read_text(encoding="utf-8")
PAGES = sorted(ROOT.glob("*.md"))
FOUND_BY = {
    "reading",
    "test",
    "simulation",
    "fault test",
    "security test",
    "conformance",
    "fuzz",
    "measurement",
    "second reader",
    "user",
    "not recorded",
}
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
COMMIT = r"[0-9a-f]{7}"


def rows(page: str) -> list[list[str]]:
    """Cells of each fault."""
    table = page.partition("\n| symptom |")[2]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:] if line]


def missing(command: str) -> list[str]:
    """What ``command`` names and is not there: a file, or a class or function in it."""
    named = re.findall(r"`(tests/[\w/.]+\.py)((?:::\w+)*)`", command)
    return [
        f"{path}{names}"
        for path, names in named
        if not (ROOT / path).is_file() or not _defines((ROOT / path).read_text(encoding="utf-8"), names.split("::")[1:])
    ]


def _defines(source: str, names: list[str]) -> bool:
    body = ast.parse(source).body
    for name in names:
        found = [node for node in body if isinstance(node, DEFINITIONS) and node.name == name]
        if not found:
            return False
        body = found[0].body
    return True


class TestTrackRecord:
    def test_every_row_is_whole(self) -> None:
        for row in rows(PAGE):
            assert len(row) == 5, row
            symptom, introduced, found_by, fixed, command = row
            assert symptom
            assert re.fullmatch(COMMIT, introduced), row
            assert found_by.partition(" (")[0] in FOUND_BY, row
            assert re.fullmatch(COMMIT, fixed), row
            assert re.fullmatch(r"`tests/[^`]+`|none: .+", command), row
        assert len(rows(PAGE)) > 60

    def test_no_fault_is_there_twice(self) -> None:
        symptoms = [row[0] for row in rows(PAGE)]
        assert len(symptoms) == len(set(symptoms))

    def test_every_test_that_it_names_is_there(self) -> None:
        assert [name for row in rows(PAGE) for name in missing(row[4])] == []

    @pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
    def test_so_is_every_one_that_another_page_names(self, page: Path) -> None:
        assert missing(page.read_text(encoding="utf-8")) == []

    @pytest.mark.parametrize(
        "gone", ["tests/unit/test_gone.py", f"{HERE}::TestGone", f"{HERE}::TestTrackRecord::missing"]
    )
    def test_one_that_is_gone_is_found(self, gone: str) -> None:
        assert missing(f"`{gone}`") == [gone]

    def test_the_count_of_those_found_by_users_is_what_the_head_says(self) -> None:
        (said,) = re.findall(r"Found by a user: \*\*(\d+)\*\*", PAGE)
        assert int(said) == sum(row[2].startswith("user") for row in rows(PAGE))
