"""The settings and the migration table as Markdown, for OPERATIONS.md.

Decides how they are laid out. Must never hold a fact of its own: names, defaults, ranges and meanings come from
``config.py``, the other systems' names from ``migration.py``.
"""

from __future__ import annotations

from itertools import groupby

from embedserve.config import Config
from embedserve.migration import MIGRATION
from embedserve.settings import ENV_PREFIX, Setting, render, settings_of

__all__ = ["migration_reference", "settings_reference"]


def settings_reference() -> str:
    """One table a section: name, variable, default, what is allowed, meaning."""
    first = settings_of(Config)[0]
    rule = (
        f"The variable of a setting is `{ENV_PREFIX}` and its name in capitals with `_` for each dot, as in "
        f"`{first.env}`; its flag is `--` and its name, as in `{first.flag}`."
    )
    lines = [rule]
    for section, settings in groupby(settings_of(Config), key=lambda setting: setting.path.rpartition(".")[0]):
        lines += ["", f"### `{section}`", "", "| setting | environment | default | allowed | meaning |"]
        lines += ["|---|---|---|---|---|", *map(_row, settings)]
    return "\n".join(lines) + "\n"


def _row(setting: Setting) -> str:
    default = render(setting.default)
    shown = f"`{default}`" if default else "empty"
    return f"| `{setting.path}` | `{setting.env}` | {shown} | {_cell(setting.allowed)} | {_cell(setting.meaning)} |"


def migration_reference() -> str:
    """One table a system: their name, ours, what differs."""
    lines: list[str] = []
    for system, replaced in groupby(MIGRATION, key=lambda replaced: replaced.system):
        lines += [*([""] if lines else []), f"### From {system}", "", "| theirs | here | note |", "|---|---|---|"]
        lines += [
            f"| `{entry.name}` | {f'`{entry.path}`' if entry.path else 'no equivalent'} | {_cell(entry.note)} |"
            for entry in replaced
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Pipes and line breaks would end a cell; meanings are docstrings that may span lines."""
    return " ".join(text.split()).replace("|", "\\|")
