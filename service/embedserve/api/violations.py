"""What is wrong with one request, gathered until all of it is known.

Decides how much of it an error lists. Must never know what the rules are: ``validation.py`` and ``token_ids.py`` do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from embedserve.errors import InvalidRequest, Violation

__all__ = ["MAX_ECHO_CHARACTERS", "MAX_VIOLATIONS", "BadText", "Violations", "echo"]

MAX_VIOLATIONS: Final = 32
"""Violations that one error lists, the last of which says how many more there are: as many as a person may read, and
about as many as fit the trailers."""
MAX_ECHO_CHARACTERS: Final = 64
"""How much of a caller's own value an error repeats."""


@dataclass(frozen=True, slots=True)
class BadText:
    """A text that cannot be embedded: a violation of a unary call, an ItemError (INVALID_ARGUMENT) of a stream."""

    index: int
    reason: str
    message: str

    @property
    def violation(self) -> Violation:
        """The same as a violation of ``texts``."""
        return Violation(f"texts[{self.index}]", self.message, self.reason)


class Violations:
    """Keeps the first ``MAX_VIOLATIONS`` and counts the rest."""

    __slots__ = ("kept", "total")

    def __init__(self) -> None:
        """Nothing is wrong yet."""
        self.kept: list[Violation] = []
        self.total = 0

    def add(self, field: str, description: str, reason: str) -> None:
        """One more thing is wrong."""
        self.total += 1
        if self.total <= MAX_VIOLATIONS:
            self.kept.append(Violation(field, description, reason))

    def add_texts(self, bad_texts: Iterable[BadText], field: str) -> None:
        """Each of ``bad_texts``, as an element of ``field``."""
        for bad in bad_texts:
            self.total += 1
            if self.total <= MAX_VIOLATIONS:
                self.kept.append(Violation(f"{field}[{bad.index}]", bad.message, bad.reason))

    def raise_if_any(self) -> None:
        """Raise ``InvalidRequest`` with what is kept; the last place says how much is not."""
        if self.total > MAX_VIOLATIONS:
            more = self.total - MAX_VIOLATIONS + 1
            self.kept[-1] = Violation("", f"{more} more violations are not listed", "MORE_VIOLATIONS")
        if self.kept:
            raise InvalidRequest(self.kept)


def echo(value: str) -> str:
    """A caller's own value, quoted and cut, for a sentence about it."""
    return repr(value if len(value) <= MAX_ECHO_CHARACTERS else value[:MAX_ECHO_CHARACTERS] + "…")
