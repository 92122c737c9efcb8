"""HTML that is built from parts, where a plain string can never be markup.

Decides how values are escaped: all of them, always. Must never know what a page says. Names of tenants and models come
from outside and are taken for hostile: what would change the direction of the text around it, or is no character to
see, is shown as its code.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable

__all__ = ["Html", "Part", "foreign", "tag"]

_VOID = frozenset({"br", "link", "meta", "path", "rect", "line"})
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories: controls, formats (bidirectional marks among them), surrogates, unassigned, separators."""


class Html(str):
    """Markup. Made by ``tag``, and of this package's own files."""

    __slots__ = ()


Part = str | Html | Iterable["Part"] | None
"""What an element holds: text, which is escaped; markup; several of them; or nothing."""


def tag(name: str, /, *parts: Part, **attributes: str | float | bool | None) -> Html:
    """An element. ``class_`` and ``aria_label`` stand for ``class`` and ``aria-label``; ``None`` and false: none."""
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = key.rstrip("_").replace("_", "-")
        words.append(word if value is True else f'{word}="{html.escape(_seen(str(value)))}"')
    opening = f"<{' '.join(words)}>"
    if name in _VOID:
        return Html(opening if name in {"br", "link", "meta"} else f"{opening}</{name}>")
    return Html(f"{opening}{_flat(parts)}</{name}>")


def foreign(value: str) -> Html:
    """A name that somebody else chose: apart from the direction of what is around it."""
    return tag("bdi", value)


def _flat(part: Part) -> str:
    if part is None:
        return ""
    if isinstance(part, Html):
        return part
    if isinstance(part, str):
        return html.escape(_seen(part))
    return "".join(_flat(piece) for piece in part)


def _seen(value: str) -> str:
    if value.isascii() and value.isprintable():
        return value
    return "".join(f"\\u{ord(letter):04x}" if unicodedata.category(letter) in _UNSEEN else letter for letter in value)
