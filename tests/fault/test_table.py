"""The table of faults names tests that exist, and has every row."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE = (HERE / "README.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (\d+) \| (.*) \|$", TABLE, re.MULTILINE))


class TestTable:
    """Fifty rows."""

    def test_none_is_missing(self) -> None:
        assert [int(number) for number in ROWS] == list(range(1, 51))
        assert all("tests/" in row for row in ROWS.values())

    def test_every_test_that_it_names_is_there(self) -> None:
        named = re.findall(r"`(tests/[\w/.]+\.py)((?:::\w+)*)`", TABLE)
        missing = [
            f"{path}{names}"
            for path, names in named
            if not (ROOT / path).is_file()
            or any(
                not re.search(rf"^ *(class|(async )?def) {name}\b", (ROOT / path).read_text("utf-8"), re.MULTILINE)
                for name in names.split("::")[1:]
            )
        ]

        assert len(named) > 60
        assert missing == []
