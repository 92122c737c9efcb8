"""The tables of OPERATIONS.md that are made from code: ``python -m tests.contract.operations_page --check|--write``.

Decides what stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. Must never hold a fact of its own: what a
table says is read from the module that decides it. What stands outside the markers is written by hand.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from embedserve.api.status import _SPELLINGS
from embedserve.errors import CallerError, DeadlineExpired, Overloaded, Refusal, ServerFault
from embedserve.reference import migration_reference, settings_reference
from embedserve.telemetry.instruments import INSTRUMENTS, REFUSALS, Instrument, Kind, Label, prometheus_name
from embedserve.telemetry.span_catalogue import SPANS

__all__ = ["PAGE", "TABLES", "main", "regenerate"]

PAGE: Final = Path(__file__).parents[2] / "OPERATIONS.md"

_BLOCK: Final = re.compile(r"(<!-- generated: (?P<name>[a-z]+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
_LABEL_VALUES_MAX: Final = 10
"""Of one label; where there are more, their number is said and the code has the rest."""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _label(label: Label) -> str:
    name = f"`{label.name}`"
    if not label.values:
        return name
    if len(label.values) > _LABEL_VALUES_MAX:
        return f"{name} ({len(label.values)} values)"
    return f"{name} ({', '.join(value.rpartition('/')[2] for value in label.values)})"


def _prometheus(instrument: Instrument) -> str:
    name = prometheus_name(instrument.name, instrument.unit, instrument.kind)
    return f"`{name}`" + (" `_bucket` `_sum` `_count`" if instrument.kind is Kind.HISTOGRAM else "")


def metrics() -> str:
    """Every instrument under both of its names."""
    return _table(
        ("OpenTelemetry", "Prometheus", "kind", "unit", "labels", "meaning"),
        (
            (
                f"`{instrument.name}`",
                _prometheus(instrument),
                instrument.kind.value,
                f"`{instrument.unit}`",
                ", ".join(map(_label, instrument.labels)),
                instrument.description,
            )
            for instrument in INSTRUMENTS
        ),
    )


def spans() -> str:
    """Every span, in the order of a call's life."""
    rows = ((f"`{span.name}`", span.kind, span.parent, span.description) for span in SPANS)
    return _table(("span", "kind", "parent", "what it covers"), rows)


def errors() -> str:
    """Every failure that can end a call. Classes that stand for a family are left out: only its members are raised."""
    kinds = [kind for kind in _SPELLINGS if issubclass(kind, (CallerError, Refusal, DeadlineExpired, ServerFault))]
    members = [kind for kind in kinds if kind is ServerFault or not any(kind in other.__mro__[1:] for other in kinds)]
    rows = (
        (
            f"`{_SPELLINGS[kind].code.name}`",
            "the policy's, below" if kind is Overloaded else f"`{_SPELLINGS[kind].reason}`",
            (inspect.getdoc(kind) or "").split("\n\n", 1)[0].replace("``", "`"),
            "yes" if kind.retryable else "no",
        )
        for kind in members
    )
    return _table(("status", "`ErrorInfo.reason`", "when", "may succeed unchanged"), rows)


def refusals() -> str:
    """Every refusal that is declared, and at which of the two stages it is made."""
    stages: dict[tuple[str, str], list[str]] = {}
    for policy, reason, stage in REFUSALS:
        stages.setdefault((policy, reason), []).append(stage)
    rows = ((f"`{policy}`", f"`{reason}`", ", ".join(at)) for (policy, reason), at in stages.items())
    return _table(("policy", "reason", "stage"), rows)


TABLES: Final[Mapping[str, Callable[[], str]]] = {
    "settings": settings_reference,
    "migration": migration_reference,
    "metrics": metrics,
    "spans": spans,
    "errors": errors,
    "refusals": refusals,
}
"""What may stand between markers, by name."""


def regenerate(page: str) -> str:
    """``page`` with every table made anew. Raises ``ValueError`` where a table is unknown, missing or there twice."""
    found = [match["name"] for match in _BLOCK.finditer(page)]
    if sorted(found) != sorted(TABLES):
        raise ValueError(f"the page has the tables {sorted(found)}, the generator {sorted(TABLES)}")
    return _BLOCK.sub(lambda match: match[1] + TABLES[match["name"]]().strip("\n") + match[3], page)


def main(arguments: Sequence[str] | None = None) -> int:
    """``--check`` returns 1 and prints a diff when the page is not what the code says; ``--write`` makes it so."""
    parser = argparse.ArgumentParser(description="The tables of OPERATIONS.md that are made from code.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true")
    mode.add_argument("--write", action="store_true")
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args(arguments)
    page: Path = asked.page
    before = page.read_text(encoding="utf-8")
    after = regenerate(before)
    if asked.write:
        page.write_text(after, encoding="utf-8")
        return 0
    diff = difflib.unified_diff(before.splitlines(True), after.splitlines(True), page.name, "what the code says")
    sys.stdout.writelines(diff)
    return int(before != after)


if __name__ == "__main__":
    sys.exit(main())
