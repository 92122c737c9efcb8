"""Settings as text: their names everywhere, their sources by precedence, and the sentences about what is wrong.

Decides how a tree of pydantic models is spelled in TOML, environment and flags, and how problems are told: all at once,
each with the setting, the value, where it came from and what is allowed. Must never know a single setting by name: the
tree is an argument.

A path such as ``admission.latency_p95.slo_ms`` is ``[admission.latency_p95] slo_ms = ...`` in TOML,
``EMBEDSERVE_ADMISSION_LATENCY_P95_SLO_MS`` in the environment and ``--admission.latency_p95.slo_ms`` as a flag. The
environment's name is read by looking it up, never by splitting it, so underscores in names are no trouble.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from embedserve.errors import ConfigError, InvariantBroken

__all__ = ["CONFIG_FILE_ENV", "ENV_PREFIX", "Allowed", "Origin", "Setting", "read_settings", "render", "settings_of"]

ENV_PREFIX = "EMBEDSERVE_"
CONFIG_FILE_ENV = "EMBEDSERVE_CONFIG"

SERVICE_LINK = re.compile(
    r"EMBEDSERVE_(\w+_)?(SERVICE_HOST=[\d.:a-f]+|SERVICE_PORT(_\w+)?=\d+|PORT(_\d+_(TCP|UDP|SCTP))?=(tcp|udp|sctp)://\S+"
    r"|PORT_\d+_(TCP|UDP|SCTP)_(PROTO=(tcp|udp|sctp)|PORT=\d+|ADDR=[\d.:a-f]+))"
)
"""``NAME=VALUE`` of variables that Kubernetes puts into every pod beside a Service called ``embedserve`` or similar."""
SWITCH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
SEPARATOR = re.compile(r"[._]")
SHOWN_CHARACTERS_MAX = 120
"""Of a wrong value in a sentence: enough to recognise it."""

Tree = TypeVar("Tree", bound=BaseModel)
Kind = Literal["text", "integer", "number", "switch", "list", "table"]


@dataclass(frozen=True, slots=True)
class Allowed:
    """Annotation of a setting: what may be given, where its type does not say it. The end of "must be ..."."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from."""

    source: Literal["default", "file", "environment", "flag"]
    name: str = ""
    """``FILE: KEY``, the variable's or the flag's name."""

    def __str__(self) -> str:
        return f"{self.source} {self.name}".strip()


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the tree, and its names."""

    path: str
    kind: Kind
    default: Any
    allowed: str
    """What may be given, as the end of "must be ...", such as ``an integer from 1 to 1024``."""
    meaning: str
    optional: bool
    """Whether ``none`` may be given."""
    numeric: bool = False
    """With kind ``list``: whether its members are integers."""

    @property
    def env(self) -> str:
        """Its environment variable."""
        return ENV_PREFIX + self.path.upper().replace(".", "_")

    @property
    def flag(self) -> str:
        """Its flag."""
        return f"--{self.path}"


@dataclass(frozen=True, slots=True)
class Given:
    """A value that some source gives."""

    value: Any
    origin: Origin


# ---------------------------------------------------------------------------------------------------------------- names


@cache
def settings_of(tree: type[BaseModel]) -> tuple[Setting, ...]:
    """Every setting of ``tree``, in order."""
    settings = tuple(_walk(tree, tree(), ""))
    if len({setting.env for setting in settings}) < len(settings):
        raise InvariantBroken("two settings share one environment variable")
    return settings


def _walk(tree: type[BaseModel], defaults: BaseModel, prefix: str) -> Iterator[Setting]:
    for name, field in tree.model_fields.items():
        value = getattr(defaults, name)
        if isinstance(value, BaseModel):
            yield from _walk(type(value), value, f"{prefix}{name}.")
        else:
            yield _setting(prefix + name, field, value)


def _setting(path: str, field: FieldInfo, default: Any) -> Setting:
    base, metadata, optional = _unwrap(field.annotation, tuple(field.metadata))
    origin = get_origin(base)
    if origin is Literal:
        kind: Kind = "text"
    elif origin in (tuple, dict):
        kind = "list" if origin is tuple else "table"
    else:
        kind = {str: "text", int: "integer", float: "number", bool: "switch"}[base]  # type: ignore[assignment]
    numeric = origin is tuple and _unwrap(get_args(base)[0], ())[0] is int
    allowed = _allowed(kind, base, metadata)
    return Setting(
        path, kind, default, allowed + (", or none" if optional else ""), field.description or "", optional, numeric
    )


def _unwrap(annotation: Any, metadata: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], bool]:
    """Peel ``Annotated`` and ``| None`` off."""
    optional = False
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            metadata += tuple(more)
        elif get_origin(annotation) in (Union, types.UnionType):
            members = [member for member in get_args(annotation) if member is not type(None)]
            if len(members) != 1:
                raise InvariantBroken(f"a setting of type {annotation} has no single spelling")
            annotation, optional = members[0], True
        else:
            return annotation, metadata, optional


def _allowed(kind: Kind, base: Any, metadata: Sequence[Any]) -> str:
    flat = [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]
    known = {type(item): item for item in flat}
    if Allowed in known:
        return str(known[Allowed].sentence)
    if get_origin(base) is Literal:
        return "one of " + ", ".join(get_args(base))
    low, high = known.get(annotated_types.Ge), known.get(annotated_types.Le)
    shortest, longest = known.get(annotated_types.MinLen), known.get(annotated_types.MaxLen)
    within = f" from {low.ge} to {high.le}" if low and high else ""
    length = f" of {shortest.min_length} to {longest.max_length} characters" if shortest and longest else ""
    if kind == "table":
        return "NAME=VALUE by commas, each value one of " + ", ".join(get_args(_unwrap(get_args(base)[1], ())[0]))
    return {
        "text": f"text{length}",
        "integer": f"an integer{within}",
        "number": f"a number{within}",
        "switch": "true or false",
        "list": "a list, by commas or as JSON",
    }[kind]


# -------------------------------------------------------------------------------------------------------------- sources


def read_settings(
    tree: type[Tree],
    flags: Mapping[str, str],
    env: Mapping[str, str],
    *,
    file: str | None = None,
    on_this_machine: bool = False,
) -> tuple[Tree, dict[str, Origin]]:
    """Build ``tree`` from defaults, TOML ``file`` (or the one that the environment names), ``env`` and ``flags``.

    Returns it with the origin of every setting by path. Raises ``ConfigError`` with every problem found.
    """
    settings = {setting.path: setting for setting in settings_of(tree)}
    problems: list[str] = []
    given: dict[str, Given] = {}
    file = file if file is not None else env.get(CONFIG_FILE_ENV) or None
    if file is not None:
        given |= _from_file(file, settings, problems)
    given |= _from_environment(env, settings, problems)
    for path, text in flags.items():
        setting = settings[path]
        given[path] = Given(parse(setting, text), Origin("flag", setting.flag))
    built = _build(tree, settings, given, problems, on_this_machine=on_this_machine)
    if problems or built is None:
        raise ConfigError(problems)
    default = Origin("default")
    return built, {path: given[path].origin if path in given else default for path in settings}


def _from_file(file: str, settings: Mapping[str, Setting], problems: list[str]) -> dict[str, Given]:
    shown = file if file.isprintable() else ascii(file)
    try:
        text = Path(file).read_bytes()
    except OSError as error:
        problems.append(f"{shown}: cannot be read: {error.strerror or error}")
        return {}
    except ValueError:
        problems.append(f"{shown}: is not the name of a file")
        return {}
    try:
        table = tomllib.loads(text.decode())
    except UnicodeDecodeError as error:
        problems.append(f"{shown}: is not UTF-8 text: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, lists in lists in lists
        problems.append(f"{shown}: is not TOML: {error}")
    else:
        return dict(_leaves(table, "", file, settings, problems))
    return {}


def _leaves(
    table: Mapping[str, Any], prefix: str, file: str, settings: Mapping[str, Setting], problems: list[str]
) -> Iterator[tuple[str, Given]]:
    sections = {path.rpartition(".")[0] for path in settings}
    known = [*settings, *sorted(sections)]
    for key, value in table.items():
        path = prefix + key
        is_section = any(known.startswith(f"{path}.") for known in settings)
        if path in settings:
            yield path, Given(value, Origin("file", f"{file}: {path}"))
        elif is_section and isinstance(value, dict):
            yield from _leaves(value, f"{path}.", file, settings, problems)
        elif is_section:
            given = render(value)
            given = given if given.isprintable() else ascii(given)
            problems.append(f"{path} = {given} (file {file}): is a table of settings, not a setting")
        else:
            shown = path if path.isprintable() else ascii(path)
            problems.append(f"{shown} (file {file}): there is no such setting{_nearest(path, known)}")


def _from_environment(env: Mapping[str, str], settings: Mapping[str, Setting], problems: list[str]) -> dict[str, Given]:
    by_env = {setting.env: setting for setting in settings.values()}
    given = {}
    for name in sorted(name for name in env if name.startswith(ENV_PREFIX) and name != CONFIG_FILE_ENV):
        setting = by_env.get(name)
        if setting is not None:
            given[setting.path] = Given(parse(setting, env[name]), Origin("environment", name))
        elif not SERVICE_LINK.fullmatch(f"{name}={env[name]}"):
            problems.append(
                f"{name} (environment): there is no such setting{_nearest(name, [*by_env, CONFIG_FILE_ENV])}"
            )
    return given


def _nearest(name: str, known: Sequence[str]) -> str:
    """The known name that is most like ``name``, as a question; empty where none is.

    Names that begin alike are compared by the rest alone: a long beginning in common says nothing about a setting.
    """
    beginnings = {match.string[: match.end()] for one in known for match in SEPARATOR.finditer(one)}
    beginning = max((one for one in beginnings if name.startswith(one)), key=len, default="")
    rests = {one.removeprefix(beginning): one for one in known if one.startswith(beginning)}
    nearest = difflib.get_close_matches(name.removeprefix(beginning), list(rests), n=1, cutoff=0.6)
    return f"; did you mean {rests[nearest[0]]}?" if nearest else ""


def parse(setting: Setting, text: str) -> Any:
    """The value that ``text`` spells; ``text`` itself where it spells none, for validation to refuse."""
    text = text.strip()
    if setting.optional and text.lower() in ("", "none"):
        return None
    try:
        match setting.kind:
            case "integer":
                return int(text)
            case "number":
                return float(text)
            case "switch":
                return SWITCH[text.lower()]
            case "list":
                return _parse_list(setting, text)
            case "table":
                return json.loads(text) if text.startswith("{") else _parse_table(text)
            case _:
                return text
    except (ValueError, KeyError, RecursionError):
        return text


def _parse_list(setting: Setting, text: str) -> tuple[Any, ...]:
    if text.startswith("["):
        return tuple(json.loads(text))
    parts = [part.strip() for part in text.split(",")] if text else []
    return tuple(int(part) for part in parts) if setting.numeric else tuple(parts)


def _parse_table(text: str) -> dict[str, str]:
    pairs = [part.split("=") for part in text.split(",")] if text else []
    return {key.strip(): value.strip() for key, value in pairs}


# ----------------------------------------------------------------------------------------------------------- validation


def _build(
    tree: type[Tree],
    settings: Mapping[str, Setting],
    given: Mapping[str, Given],
    problems: list[str],
    *,
    on_this_machine: bool,
) -> Tree | None:
    """Validate; where single values are wrong, once more with defaults in their place, to judge the rest together."""
    wrong: set[str] = set()
    for _attempt in range(2):
        context = {"wrong": wrong, "on_this_machine": on_this_machine}
        values = {path: entry.value for path, entry in given.items() if path not in wrong}
        try:
            # Defaults are passed too, so that what depends on this machine is judged for them as well.
            return tree.model_validate(
                _nest({p: s.default for p, s in settings.items() if p not in wrong} | values), context=context
            )
        except ValidationError as error:
            found = _problems(error, settings, given)
            problems.extend(sentence for _, sentence in found)
            if not (fresh := {path for path, _ in found if path} - wrong):
                return None
            wrong |= fresh
    return None


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in values.items():
        *parents, leaf = path.split(".")
        table = nested
        for parent in parents:
            table = table.setdefault(parent, {})
        table[leaf] = value
    return nested


def _problems(
    error: ValidationError, settings: Mapping[str, Setting], given: Mapping[str, Given]
) -> list[tuple[str, str]]:
    """Path (empty for a rule between settings) and sentence of each problem; one a path."""
    found: dict[str, str] = {}
    rules: list[tuple[str, str]] = []
    for problem in error.errors(include_url=False):
        if problem["type"] == "rules":
            rules += [("", _rule_sentence(paths, why, settings, given)) for paths, why in problem["ctx"]["broken"]]
            continue
        path = next(p for p in _prefixes(problem["loc"]) if p in settings)
        if path not in found:
            because = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else ""
            must = f"must be {settings[path].allowed}"
            found[path] = f"{_value(path, settings, given)}: {because + '; ' if because else ''}{must}"
    return [*found.items(), *rules]


def _prefixes(loc: Sequence[str | int]) -> Iterator[str]:
    for end in range(len(loc), 0, -1):
        yield ".".join(str(part) for part in loc[:end])


def _value(path: str, settings: Mapping[str, Setting], given: Mapping[str, Given]) -> str:
    entry = given.get(path) or Given(settings[path].default, Origin("default"))
    shown = render(entry.value)
    shown = shown if len(shown) <= SHOWN_CHARACTERS_MAX else f"{shown[:SHOWN_CHARACTERS_MAX]}..."
    return f"{path} = {shown if shown.isprintable() and shown else repr(shown)} ({entry.origin})"


def _rule_sentence(paths: Sequence[str], why: str, settings: Mapping[str, Setting], given: Mapping[str, Given]) -> str:
    return " and ".join(_value(path, settings, given) for path in paths) + f": {why}"


def render(value: Any) -> str:
    """A value as it could be given: lists by commas, ``none``, ``true``."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(render(member) for member in value)
    if isinstance(value, dict):
        return ",".join(f"{key}={render(member)}" for key, member in value.items())
    return str(value)
