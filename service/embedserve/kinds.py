"""The kinds of values that settings have: what is read, what is refused, and how a refusal names what is allowed.

Decides nothing about any one setting. Must never know the settings themselves; they are in ``config.py``.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationInfo

from embedserve.address import listens
from embedserve.settings import Allowed

__all__ = [
    "DAY_MS",
    "HOUR_MS",
    "KIB",
    "MIB",
    "Addresses",
    "Devices",
    "Edges",
    "LogLevel",
    "Policies",
    "Section",
    "Source",
    "Switch",
    "Text",
    "UvloopSwitch",
    "between",
]

DEVICES_MAX = 16
"""Engines of one service: as many GPUs as the largest hosts have."""
DEVICE = re.compile(r"cpu|cuda:(0|[1-9]\d{0,2})")
KIB, MIB, HOUR_MS, DAY_MS = 1024, 1024 * 1024, 3_600_000, 86_400_000


class Section(BaseModel):
    """A part of the tree: immutable, and nothing in it that is not a setting."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


def _is_source(value: str, info: ValidationInfo) -> str:
    """Refuse an empty source; where this machine may be asked, also one that is not on it."""
    if not value.strip():
        raise ValueError("it is empty")
    if (info.context or {}).get("on_this_machine"):
        package = value.removeprefix("package:")
        if package != value and not (package.isidentifier() and importlib.util.find_spec(package)):
            raise ValueError(f"the Python package {package!r} is not installed here")
        if value.startswith(("/", "./", "../", "~")) and not Path(value).expanduser().is_dir():
            raise ValueError("there is no such directory here")
    return value


def _ascends(value: tuple[int, ...]) -> tuple[int, ...]:
    if not value or list(value) != sorted(set(value)) or value[0] < 1 or value[-1] > MIB:
        raise ValueError("they do not ascend within the range")
    return value


def _differ(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(value)) < len(value):
        raise ValueError("one is named twice")
    return value


def _are_devices(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(value) > DEVICES_MAX:
        raise ValueError(f"they are more than {DEVICES_MAX}")
    if wrong := [name for name in value if not DEVICE.fullmatch(name)]:
        raise ValueError(f"{wrong[0]!r} is none")
    cuda = [int(name.removeprefix("cuda:")) for name in value if name != "cpu"]
    if cuda and len(cuda) < len(value):
        raise ValueError("a CPU and a GPU do not give the same vectors")
    if len(set(cuda)) < len(cuda):
        raise ValueError("a GPU is named twice")
    return value


def _is_here(value: bool, info: ValidationInfo) -> bool:
    if value and (info.context or {}).get("on_this_machine") and importlib.util.find_spec("uvloop") is None:
        raise ValueError("uvloop is not installed here; without it only asyncio's slower loop is left (false)")
    return value


def between(low: float, high: float) -> Any:
    """A number in this range, both ends included, and of the very type: a bool or a string of digits is none."""
    return Field(ge=low, le=high, strict=True)


Switch = Annotated[bool, Strict()]
Text = Annotated[str, Field(min_length=1, max_length=255)]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]
Addresses = Annotated[str, AfterValidator(listens), Allowed("host:port or unix:/path, several by commas")]
Source = Annotated[
    str, AfterValidator(_is_source), Allowed("package:NAME, a local directory, or a hub id in the local cache")
]
Devices = Annotated[
    tuple[str, ...], AfterValidator(_are_devices), Allowed("cuda:N, each once, or cpu, up to 16 by commas, or empty")
]
Edges = Annotated[
    tuple[Annotated[int, Strict()], ...],
    AfterValidator(_ascends),
    Allowed("ascending integers from 1 to 1048576, by commas"),
]
Policies = Annotated[
    tuple[Literal["throughput", "latency_p95", "gradient"], ...],
    BeforeValidator(lambda value: () if value in ("none", ("none",), ["none"]) else value),
    AfterValidator(_differ),
    Allowed("throughput, latency_p95, gradient, several by commas, or none"),
]
UvloopSwitch = Annotated[Switch, AfterValidator(_is_here)]
