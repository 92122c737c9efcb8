"""The whole service on the device: 64 texts a call at saturation, and one caller with one short text.

Decides the two loads. It is ``python -m loadtest run`` against a server that it starts, so it needs all that a server
needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["MISSING", "measure"]

NEEDED = (
    "aiohttp", "click", "grpc", "grpc_health", "grpc_reflection", "grpc_status", "hpack", "opentelemetry.sdk", "orjson",
    "pydantic", "rich", "structlog",
)  # fmt: skip
"""Packages without which there is no service, or no load test."""


def _missing() -> list[str]:
    found = []
    for name in NEEDED:
        try:
            spec = find_spec(name)
        except ModuleNotFoundError:
            spec = None
        if spec is None:
            found.append(name)
    return found


MISSING = _missing()
"""Those that are not here."""


def measure(folder: Path, device: str, dtype: str, seconds: float, frontends: int) -> dict[str, Any]:
    """Texts a second with 50-token texts, 64 a call, 32 callers; and the p50 of one caller in milliseconds."""
    settings = ["--model.source", str(folder), "--model.device", device, "--model.dtype", dtype]
    settings += ["--admission.policies", "none"]
    lasting = ["--seconds", str(seconds)]
    many = ["--callers", "32", "--set", "texts.words=[48, 48]", "--set", "texts.per_call=64", *lasting]
    (phase,) = _run(many, [*settings, "--server.frontends", str(frontends)])["phases"]
    (alone,) = _run(["--callers", "1", *lasting], settings)["phases"]
    return {
        "texts_per_s": phase["texts_per_s"],
        "p50_ms": phase["latency_ms"]["p50"],
        "statuses": phase["statuses"],
        "one_caller_p50_ms": alone["latency_ms"]["p50"],
        "frontends": frontends,
    }


def _run(load: list[str], settings: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "loadtest", "run", "short", "--target", "serve:", "--out", out, *load]
        done = subprocess.run([*command, "--", *settings], capture_output=True, text=True, timeout=240, check=False)
        path = Path(out) / "result.json"
        if not path.is_file():
            raise SystemExit(f"the service was not measured (exit {done.returncode}): {done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    (run,) = result["repetitions"]
    return dict(run)
