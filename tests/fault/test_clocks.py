"""Row 28: a wall clock that is set an hour back or forth changes nothing, because nothing that decides reads it."""

from __future__ import annotations

import ast
from pathlib import Path

import embedserve

PACKAGE = Path(embedserve.__file__).parent
WALL_CLOCKS = {
    "time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today",
    "datetime.datetime.now", "datetime.datetime.utcnow", "date.today",
}  # fmt: skip
TELLERS = ("telemetry/", "status.py")
"""Who tells people and machines when something was: spans, metrics, logs, the status page."""


def readers_of_the_wall_clock() -> dict[str, list[int]]:
    """Lines that read the wall clock, by file within the package."""
    found: dict[str, list[int]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            now = isinstance(node, ast.Attribute) and ast.unparse(node) in WALL_CLOCKS
            # With an argument these two only spell a time that somebody else has read.
            spelled = isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.localtime", "time.gmtime")
            if now or (spelled and not node.args):
                found.setdefault(str(path.relative_to(PACKAGE)), []).append(node.lineno)
    return found


class TestWallClock:
    """Telemetry stamps what it tells; all else counts by the monotonic clock."""

    def test_nobody_but_telemetry_reads_it(self) -> None:
        readers = readers_of_the_wall_clock()

        assert {name for name in readers if not name.startswith(TELLERS)} == set()
        assert readers, "the search finds the stamps of spans and metrics, or it finds nothing at all"
