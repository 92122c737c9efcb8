"""What every result says of itself: machine, versions, commit, command, and how busy the machine was.

Decides the place and the form of ``results/*.json``, and how repetitions become one figure: their median, with the
range beside it. Must never know what was measured.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

__all__ = ["Run", "percentiles", "spread"]

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "embedserve",
    "grpcio",
    "protobuf",
    "numpy",
    "tokenizers",
    "torch",
    "transformers",
    "uvloop",
    "opentelemetry-sdk",
)
BUSY_LOAD = 0.5
"""Load average at the start, a core, above which figures are called preliminary."""


class Run:
    """One run of one measurement, from its beginning to its file."""

    def __init__(self, name: str) -> None:
        """Note the machine as it is before the measurement loads it."""
        self._name = name
        self._load_before = os.getloadavg()
        self._commit = _git("rev-parse", "--short", "HEAD")
        self._changes = bool(_git("status", "--porcelain", "--untracked-files=no", "--", "service"))
        self._begun = dt.datetime.now(dt.UTC)

    @property
    def quiet(self) -> bool:
        """Whether the machine had little else to do when the run began."""
        return self._load_before[0] / (os.cpu_count() or 1) < BUSY_LOAD

    def facts(self, command: str | None = None) -> dict[str, Any]:
        """What every result says of itself; ``command`` where it is not ``python -m loadtest.NAME``."""
        took = dt.datetime.now(dt.UTC) - self._begun
        return {
            "measurement": self._name,
            "command": command or "python -m " + " ".join([f"loadtest.{self._name}", *sys.argv[1:]]),
            "begun": self._begun.isoformat(timespec="seconds"),
            "took_s": round(took.total_seconds(), 1),
            "commit": self._commit,
            "uncommitted_changes": self._changes,
            "machine": _machine(),
            "load_average_before": [round(x, 2) for x in self._load_before],
            "preliminary": not self.quiet,
            "versions": {"python": platform.python_version(), **_versions()},
        }

    def write(self, measured: Mapping[str, Any], name: str | None = None) -> Path:
        """Write ``results/NAME.json`` and say where it is."""
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name or self._name}.json"
        path.write_bytes(orjson.dumps({**self.facts(), **measured}, option=orjson.OPT_INDENT_2) + b"\n")
        if not self.quiet:
            print(f"preliminary: the load average was {self._load_before[0]:.2f} before the run began")
        print(f"written: loadtest/results/{path.name}")
        return path


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99."""
    p50, p90, p99 = np.percentile(np.asarray(values, dtype=np.float64), (50, 90, 99)).tolist()
    return {"p50": p50, "p90": p90, "p99": p99}


def spread(values: Sequence[float], digits: int = 1) -> dict[str, float]:
    """Median and range of one figure's repetitions."""
    found = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=RESULTS.parent.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _machine() -> dict[str, Any]:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    models = [line for line in lines if line.startswith("model name")]
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages * size / (1 << 30), 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
