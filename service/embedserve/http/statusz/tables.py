"""Tables and lists of the page, all built alike.

Decides how a table is told to those who cannot see it: a caption, heads with a scope, and a frame that a keyboard can
scroll where the screen is narrow. Must never know what is in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from embedserve.http.statusz.markup import Html, Part, tag

__all__ = ["facts", "section", "table"]


def section(name: str, title: str, *parts: Part) -> Html:
    """A part of the page with its own heading; ``name`` is its anchor."""
    return tag("section", tag("h2", title, id=name), *parts, aria_labelledby=name, class_=f"part part-{name}")


def table(
    name: str, caption: str, heads: Sequence[str], rows: Iterable[Sequence[Part]], *, numbers: str = "", empty: str = ""
) -> Html:
    """Rows under ``heads``; the first cell of each names it.

    ``numbers`` has a letter for each column: ``n`` for numbers, ``p`` for a bar, ``h`` for a history, ``w`` for long
    words, anything else for short ones. With ``empty``, a sentence stands for a table without rows.
    """
    kinds = {"n": "num", "p": "pic", "w": "words", "h": "history"}
    classes = [kinds.get(kind) for kind in numbers.ljust(len(heads), "-")]
    body = [
        tag(
            "tr",
            [
                tag("th" if place == 0 else "td", cell, class_=kind, scope="row" if place == 0 else None)
                for place, (cell, kind) in enumerate(zip(row, classes, strict=True))
            ],
        )
        for row in rows
    ]
    # Beside the table and not in it: a caption would be as wide as what is scrolled, and be cut off on a narrow screen.
    label = f"{name}-caption"
    said = tag("p", caption, id=label, class_="caption")
    if not body and empty:
        return tag("div", said, tag("p", empty, class_="empty"), class_="table")
    # A column of pictures, which stand beside their numbers, has no name.
    head = tag(
        "tr",
        [
            tag("th", word, scope="col", class_=kind) if word else tag("td", class_=kind)
            for word, kind in zip(heads, classes, strict=True)
        ],
    )
    grid = tag("table", tag("thead", head), tag("tbody", body), aria_labelledby=label)
    frame = tag("div", grid, class_="scroll", role="region", tabindex=0, aria_labelledby=label)
    return tag("div", said, frame, class_="table")


def facts(*pairs: tuple[str, Part]) -> Html:
    """Names and values."""
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs], class_="facts")
