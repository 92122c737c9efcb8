"""What one load test does: which texts, in what calls, at what rate or by how many callers, for how long.

Decides the schema of ``scenarios/*.toml`` and tells every mistake in one list. Must never know a server, a protocol or
a result. The schema is documented by the fields below; ``python -m loadtest list`` shows the scenarios that come along.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from loadtest.mistake import mistakes_of, place_of

__all__ = ["Capacity", "Marks", "Phase", "Scenario", "ScenarioError", "Texts", "load_scenario", "shipped"]

SCENARIOS = Path(__file__).resolve().parent / "scenarios"
LOADS = ("callers", "rate", "of_capacity")
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ScenarioError(Exception):
    """A scenario that cannot be run; the message is a sentence, or has a line for each of several mistakes."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Texts(_Strict):
    """What is sent. The same settings and seed give the same texts on every machine (``docs``: on the same machine)."""

    kind: Literal["words", "docs"] = "words"
    """``words``: common English words, one token each in BERT's vocabulary. ``docs``: docstrings of Python's standard
    library and paragraphs of licences as they are found on this machine, about 49 tokens each in the mean."""
    words: tuple[Annotated[int, Field(ge=1, le=100_000)], Annotated[int, Field(ge=1, le=100_000)]] = (5, 12)
    """Fewest and most words of a text; of ``words`` only."""
    spread: Literal["uniform", "log"] = "uniform"
    """How lengths lie between the two. ``log``: each doubling is equally likely, as in real traffic: mostly short."""
    per_call: Annotated[int, Field(ge=1, le=16_384)] = 1
    """Texts in one call."""
    distinct: Annotated[int, Field(ge=1, le=1_000_000)] = 8192
    """So many different texts, rounded up to whole calls; then they come again."""

    @field_validator("words")
    @classmethod
    def _ordered(cls, words: tuple[int, int]) -> tuple[int, int]:
        if words[0] > words[1]:
            raise ValueError(f"the fewest come first: [{words[1]}, {words[0]}]")
        return words


class Phase(_Strict):
    """A stretch of time with one kind of load: give exactly one of ``callers``, ``rate`` and ``of_capacity``."""

    name: Annotated[str, Field(min_length=1, max_length=40)]
    seconds: Seconds
    callers: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Closed loop: so many callers, each of which sends its next call when the last one has ended."""
    rate: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Open loop: calls a second, Poisson arrivals; nobody waits for an answer before the next call is sent."""
    of_capacity: Annotated[float, Field(gt=0, le=100)] | None = None
    """Open loop: the rate as a multiple of the capacity, which is measured first (``[capacity]``) or given."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        mistake = _mistaken_load([name for name in LOADS if getattr(self, name) is not None])
        if mistake:
            raise ValueError(mistake)
        return self

    @property
    def closed(self) -> bool:
        """Whether callers wait for their answers."""
        return self.callers is not None


def _mistaken_load(given: Sequence[str]) -> str:
    if len(given) == 1:
        return ""
    what = f"given are {' and '.join(given)}" if given else "none of them is given"
    return f"exactly one of callers, rate and of_capacity says the load; {what}"


class Capacity(_Strict):
    """How the capacity is measured before the run, where a phase refers to it: a closed loop."""

    callers: Annotated[int, Field(ge=1, le=100_000)] = 64
    seconds: Seconds = 8.0


class Marks(_Strict):
    """What a run must reach; a run that misses one ends with exit code 1. All are optional."""

    calls_per_s_at_least: Annotated[float, Field(gt=0)] | None = None
    """In the best phase."""
    texts_per_s_at_least: Annotated[float, Field(gt=0)] | None = None
    """In the best phase."""
    p50_ms_at_most: Annotated[float, Field(gt=0)] | None = None
    """In every phase."""
    p99_ms_at_most: Annotated[float, Field(gt=0)] | None = None
    """In every phase."""
    failed_share_at_most: Annotated[float, Field(ge=0, le=1)] | None = None
    """Calls that were not answered with vectors, refused ones included, over all calls."""
    goodput_of_capacity_at_least: Annotated[float, Field(gt=0, le=1)] | None = None
    """In the phase with the highest rate: answers in time a second, over the capacity."""
    recovery_s_at_most: Annotated[float, Field(ge=0)] | None = None
    """From the end of the phase with the highest rate until latency is what it was before."""
    throughput_never_falls_by: Annotated[float, Field(ge=0, lt=1)] | None = None
    """From one phase to the next, over all phases: the share of the best one so far that may be lost (noise)."""


class Scenario(_Strict):
    """One load test."""

    name: str
    """The file's name without ``.toml``."""
    about: Annotated[str, Field(min_length=1)]
    """One sentence: what it shows."""
    method: Literal["embed", "stream"] = "embed"
    """``embed``: one answer a call (Embed). ``stream``: vectors as they are ready (EmbedStream)."""
    texts: Texts = Texts()
    phases: Annotated[tuple[Phase, ...], Field(min_length=1, max_length=200)]
    """In order, without a pause. A call belongs to the phase in which it was meant to be sent."""
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Deadline of a call. An answer that comes later counts as DEADLINE_EXCEEDED."""
    warm_up_s: Annotated[float, Field(ge=0, le=3600)] = 2.0
    """Load before the first phase, not counted: as many callers as the first phase has, 8 before an open loop."""
    capacity: Capacity = Capacity()
    processes: Annotated[int, Field(ge=1, le=256)] | None = None
    """Client processes. Absent: one for each four cores of this machine, at most 4."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 17
    """Of texts and arrivals."""
    marks: Marks = Marks()

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def needs_capacity(self) -> bool:
        """Whether a phase's rate is a multiple of the capacity."""
        return any(phase.of_capacity is not None for phase in self.phases)

    def client_processes(self) -> int:
        """How many client processes it runs in."""
        return self.processes or min(4, max(1, (os.cpu_count() or 1) // 4))


def shipped() -> list[str]:
    """Names of the scenarios that come along."""
    return sorted(path.stem for path in SCENARIOS.glob("*.toml"))


def load_scenario(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Scenario:
    """Read ``source``: the name of a shipped scenario, or the path of a TOML file.

    ``overrides`` replaces values by dotted names, such as ``{"texts.per_call": 8, "marks.p99_ms_at_most": 200}``;
    ``callers``, ``rate`` and ``seconds`` replace every phase's; a phase with another load is named by it.

    Raises:
        ScenarioError: with every mistake: the file, the key, and what is allowed there.
    """
    path = SCENARIOS / f"{source}.toml" if str(source) in shipped() else Path(source)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(str(source), shipped(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"those that come along are {', '.join(shipped())}"
        raise ScenarioError(f"{source}: no such scenario and no such file; {hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read: {error.strerror}") from None
    for name, value in (overrides or {}).items():
        _override(data, name, value)
    title = f"{path} with the command's options" if overrides else str(path)
    return _checked(title, {**data, "name": path.stem})


def _override(data: dict[str, Any], name: str, value: Any) -> None:
    if name in {"callers", "rate", "seconds"}:
        phases = data.get("phases")
        for number, phase in enumerate(phases if isinstance(phases, list) else (), 1):
            if not isinstance(phase, dict):  # told as a mistake of the file
                continue
            if name != "seconds":
                for other in LOADS:
                    phase.pop(other, None)
                # "64 callers", which is what the scenario says of itself, is no name of 200 calls a second.
                phase["name"] = _load_named(name, value) + (f", {number} of {len(phases)}" if len(phases) > 1 else "")
            phase[name] = value
        return
    *tables, key = name.split(".")
    for table in tables:
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise ScenarioError(f"--set {name}: {table} is no table; what is in a list takes a scenario file")
    data[key] = value


def _load_named(kind: str, value: Any) -> str:
    if kind == "rate":
        return f"{value:g} calls/s" if isinstance(value, float) else f"{value} calls/s"
    return f"{value} caller" if value == 1 else f"{value} callers"


def _checked(title: str, data: dict[str, Any]) -> Scenario:
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        mistakes = mistakes_of(error, Scenario)
        # pydantic judges a table as a whole only when its keys are right; a reader wants to hear all at once.
        wrong = {found["loc"][1] for found in error.errors() if found["loc"][0] == "phases" and len(found["loc"]) > 2}
        for number in sorted(wrong):
            phase = data["phases"][number]
            mistake = _mistaken_load([name for name in LOADS if name in phase]) if isinstance(phase, dict) else ""
            mistakes += [f"{place_of(('phases', number))}: {mistake}"] if mistake else []
        if len(mistakes) == 1:
            raise ScenarioError(f"{title}: {mistakes[0]}") from None
        raise ScenarioError("\n  ".join((f"{title} cannot be run:", *mistakes))) from None
