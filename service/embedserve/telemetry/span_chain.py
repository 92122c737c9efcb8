"""Spans below another that follow one another without a gap, as those of most calls and passes do.

Decides what of them is the same each time: how many they are, their names and most of their attributes. Must never know
which they are (``spans``) nor how they are written (``chain_wire``): a form that is known is written faster than its
spans one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from embedserve.telemetry.span_data import NO_ATTRIBUTES, Child, LinkData, Value

__all__ = ["Chain", "ChainForm"]


class ChainForm:
    """What chains of one kind share. Made once: it is known again by its identity."""

    __slots__ = ("attributed", "linked", "names", "shared")

    def __init__(
        self,
        spans: Sequence[tuple[str, Mapping[str, Value]]],
        *,
        attributed: str | None = None,
        linked: str | None = None,
    ) -> None:
        """``spans`` are names and attributes; the one named ``attributed`` has its own in place of them each time.

        The one named ``linked``, which is another, has links. Each of the two names is there once.
        """
        self.names = tuple(name for name, _ in spans)
        self.shared = tuple(attributes for _, attributes in spans)
        self.attributed = None if attributed is None else self.names.index(attributed)
        self.linked = None if linked is None else self.names.index(linked)

    def after(self, name: str) -> ChainForm:
        """This form with a span ``name``, which has no attributes, before it."""
        longer = ChainForm([(name, NO_ATTRIBUTES), *zip(self.names, self.shared, strict=True)])
        longer.attributed = None if self.attributed is None else self.attributed + 1
        longer.linked = None if self.linked is None else self.linked + 1
        return longer


class Chain:
    """Spans of ``form``; a ``Child`` each when they are asked for one by one."""

    __slots__ = ("attributes", "borders", "form", "links")

    def __init__(
        self,
        form: ChainForm,
        borders: Sequence[int],
        attributes: Mapping[str, Value] = NO_ATTRIBUTES,
        links: Sequence[LinkData] = (),
    ) -> None:
        """``borders`` are one more than the spans, wall-clock nanoseconds: one ends where the next one begins."""
        self.form = form
        self.borders = borders
        self.attributes = attributes
        self.links = links

    def __len__(self) -> int:
        """How many spans."""
        return len(self.form.names)

    def __iter__(self) -> Iterator[Child]:
        """Each by itself."""
        form = self.form
        for place, name in enumerate(form.names):
            attributes = self.attributes if place == form.attributed else form.shared[place]
            links = self.links if place == form.linked else ()
            yield name, self.borders[place], self.borders[place + 1], attributes, links
