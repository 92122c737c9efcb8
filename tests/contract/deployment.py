"""What the tests of ``deploy/`` share: the files as data, the drain's length, and the tools that check them.

Decides how long a stop may take and which names are settings. Must never know one way of deploying from another.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedserve import app, drain
from embedserve.config import Config, load_config
from embedserve.http import operations
from embedserve.settings import CONFIG_FILE_ENV, settings_of

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
EXAMPLE = DEPLOY / "embedserve.toml"
INTERPRETER_END_S = 1.0
"""What Python needs after ``stopped`` is logged (OPERATIONS.md, Start and stop)."""
SLACK_MAX_S = 10.0
"""More time than that beyond the longest stop would only hide a server that hangs."""
SETTINGS = {setting.env for setting in settings_of(Config)} | {CONFIG_FILE_ENV}


def longest_stop_s(config: Config) -> float:
    """Seconds from SIGTERM until the process has ended, at most."""
    shutdown = config.shutdown
    steps_ms = shutdown.settle_ms + shutdown.grace_ms + shutdown.telemetry_flush_ms
    fixed_s = drain.CATCH_UP_MAX_S + drain.STRAGGLERS_S + app.WORKER_STOP_S + operations.SHUTDOWN_S
    return steps_ms / 1000 + fixed_s + INTERPRETER_END_S


def assert_time_to_stop(given_s: float, config: Config, before_s: float = 0) -> None:
    """``given_s`` is enough for the longest stop after ``before_s``, and not much more than that."""
    needed_s = before_s + longest_stop_s(config)
    assert needed_s <= given_s <= needed_s + SLACK_MAX_S, f"needed: {math.ceil(needed_s)} s"


def configured(file: Path, environment: Mapping[str, str]) -> Config:
    """The settings that a server has with ``file`` and ``environment``; what has our prefix must be a setting."""
    ours = {name: value for name, value in environment.items() if name.startswith("EMBEDSERVE_")}
    assert set(ours) <= SETTINGS, set(ours) - SETTINGS
    named = {name: value for name, value in ours.items() if name != CONFIG_FILE_ENV}
    return load_config({}, named, file=str(file), on_this_machine=False).config


def port_of(address: str) -> int:
    """The port of ``host:port``."""
    return int(address.rpartition(":")[2])


def documented_variables() -> set[str]:
    """The ``OTEL_*`` variables that OPERATIONS.md says are read."""
    page = (ROOT / "OPERATIONS.md").read_text(encoding="utf-8")
    table = page.partition("### OTEL variables")[2].partition("Not read:")[0]
    return set(re.findall(r"`(OTEL_[A-Z_]+)`", table))


def documented_metrics() -> set[str]:
    """Every series name that OPERATIONS.md has for Prometheus, histograms with their three endings."""
    page = (ROOT / "OPERATIONS.md").read_text(encoding="utf-8")
    table = page.partition("<!-- generated: metrics -->")[2].partition("<!-- end -->")[0]
    names: set[str] = set()
    for row in table.splitlines():
        cells = row.split("|")
        if len(cells) > 2 and (words := re.findall(r"`(\w+)`", cells[2])):
            names.update({words[0], *(words[0] + ending for ending in words[1:])})
    return names


def load(path: Path) -> Any:
    """The one document of a YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def tool(name: str, package: str) -> str:
    """The path of a program; the test is skipped, and says why, where it is not installed."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed ({package})")
    return found


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Standard output and standard error of ``command``, which must end with 0."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a Dockerfile."""

    stage: str
    word: str
    rest: str

    @property
    def words(self) -> list[str]:
        """In exec form the list, otherwise what a shell would see, without flags."""
        if self.rest.startswith("["):
            return list(json.loads(self.rest))
        return [word for word in shlex.split(self.rest) if not word.startswith("--")]


def dockerfile(path: Path = DEPLOY / "Dockerfile") -> list[Instruction]:
    """Its instructions in order, each with the name of its stage (empty before the first)."""
    return list(_instructions(path.read_text(encoding="utf-8")))


def _instructions(text: str) -> Iterator[Instruction]:
    stage = ""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n", " ", lines).splitlines():
        if not line.strip():
            continue
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            stage = rest.split()[-1]
        yield Instruction(stage, word, rest.strip())
