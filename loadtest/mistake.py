"""What is wrong with a scenario, in words: which key, and what it may be.

Decides the sentence of each mistake that pydantic finds. What is allowed comes from the schema, so that both ends of a
range are told and not only the one that was overstepped. Must never know what a key is for.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

__all__ = ["mistakes_of", "place_of"]

Schema = Mapping[str, Any]
SHOWN_MAX = 60
"""Characters of a wrong value that are shown: it may be a whole table."""
SET_BY_US = ("name",)
"""Of the whole scenario: its name is the file's."""


def mistakes_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """A sentence for each mistake, which begins with its place in the file."""
    whole = model.model_json_schema()
    found = error.errors()
    # A list with a wrong entry is called too short as well, for its right entries are counted.
    inner = {one["loc"][:n] for one in found for n in range(len(one["loc"]))}
    return [
        place_of(one["loc"]) + _sentence(one, whole)
        for one in found
        if not (one["type"] == "too_short" and one["loc"] in inner)
    ]


def place_of(parts: Sequence[int | str]) -> str:
    """As a reader of the file would say it: ``phases[2].rate``; phases are counted from 1."""
    place = ""
    for part in parts:
        place += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if place else part
    return place or "the file"


def _sentence(found: Any, whole: Schema) -> str:
    *table, key = found["loc"]
    if found["type"] == "extra_forbidden":
        known = [name for name in _at(whole, table)["properties"] if table or name not in SET_BY_US]
        near = difflib.get_close_matches(str(key), known, n=1)
        return f": no such key; did you mean {near[0]}?" if near else f": no such key; there are {', '.join(known)}"
    if found["type"] == "value_error":
        return ": " + str(found["msg"]).removeprefix("Value error, ")
    must = _allowed(_at(whole, found["loc"]), whole)
    if found["type"] == "missing":
        return f" must be given: {must}"
    shown = json.dumps(found["input"], ensure_ascii=False, default=str)
    return f" must be {must}, not {shown if len(shown) <= SHOWN_MAX else shown[:SHOWN_MAX] + '...'}"


def _at(whole: Schema, place: Sequence[int | str]) -> Schema:
    """The schema of what lies at ``place``."""
    here = whole
    for part in place:
        if isinstance(part, int):
            entries = here.get("prefixItems")
            here = entries[part] if entries else here["items"]
        else:
            here = here["properties"][part]
        here = _plain(here, whole)
    return here


def _plain(schema: Schema, whole: Schema) -> Schema:
    """Without references, and without the ``null`` of a key that may be left out."""
    schema = next((one for one in schema.get("anyOf", ()) if one.get("type") != "null"), schema)
    return whole["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _allowed(schema: Schema, whole: Schema) -> str:
    if "enum" in schema:
        return " or ".join(json.dumps(one) for one in schema["enum"])
    kind = schema["type"]
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(schema)
    if kind == "string":
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        return f"text of {low} to {high} characters" if high else "text that is not empty" if low else "text"
    if kind == "array":
        return _list(schema, whole)
    return f"a table with any of {', '.join(schema['properties'])}"


def _range(schema: Schema) -> str:
    low, above, high, below = (
        schema.get(name) for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    )
    if low is not None and high is not None:
        return f" from {_plain_number(low)} to {_plain_number(high)}"
    words = [("at least", low), ("above", above), ("at most", high), ("below", below)]
    return " and".join(f" {word} {_plain_number(value)}" for word, value in words if value is not None)


def _plain_number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _list(schema: Schema, whole: Schema) -> str:
    if "prefixItems" in schema:
        return f"a list [{', '.join(_allowed(_plain(one, whole), whole) for one in schema['prefixItems'])}]"
    return f"a list of {schema['minItems']} to {schema['maxItems']} tables ([[phases]])"
