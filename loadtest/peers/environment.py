"""A peer's own virtual environment under the cache folder.

Decides where it lies and when it is made anew: when the requirements, the constraints or the Python have changed. Must
never know what a peer is for. pip's own configuration is honoured, so an index with CPU builds of torch can be named
there (``PIP_EXTRA_INDEX_URL``).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from loadtest.peers.peer import Peer

__all__ = ["CONSTRAINTS", "cache_folder", "install", "python_of", "versions"]

CONSTRAINTS = Path(__file__).parent / "constraints.txt"
CACHE = Path("~/.cache/embedserve-loadtest/peers")
CACHE_VARIABLE = "EMBEDSERVE_LOADTEST_CACHE"
STAMP = "installed.json"
INSTALL_S_MAX = 1800
"""torch alone is some hundred MB; a slow line takes minutes."""
TOLD = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy", "grpcio", "protobuf", "optimum",
        "infinity-emb", "coral-gpu-inference", "huggingface-hub", "fastapi", "uvicorn")  # fmt: skip
"""Versions that a result names."""


def cache_folder(given: str | None = None) -> Path:
    """Where peers are kept: what is ``given``, else the variable's folder, else the default."""
    return Path(given or os.environ.get(CACHE_VARIABLE) or CACHE).expanduser().absolute()


def python_of(peer: Peer, cache: Path) -> Path:
    """The interpreter that runs ``peer``: ours where it needs nothing."""
    return cache / peer.name / "venv" / "bin" / "python" if peer.requirements else Path(sys.executable)


def install(peer: Peer, cache: Path) -> Path:
    """Its interpreter, after making the environment where it is missing or not what is asked for.

    Raises ``RuntimeError`` with pip's last lines.
    """
    python = python_of(peer, cache)
    if not peer.requirements:
        return python
    folder = cache / peer.name
    stamp = folder / STAMP
    wanted = _fingerprint(peer)
    if stamp.is_file() and python.exists() and json.loads(stamp.read_text())["wanted"] == wanted:
        return python
    print(f"installing {peer.name} in {folder}: {' '.join(peer.requirements)}", flush=True)
    shutil.rmtree(folder / "venv", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder / "venv")])
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint",
          str(CONSTRAINTS), *peer.requirements])  # fmt: skip
    stamp.write_text(json.dumps({"wanted": wanted, "versions": _installed(python)}, indent=2) + "\n")
    return python


def versions(peer: Peer, cache: Path) -> dict[str, str]:
    """What was installed, of the packages that matter."""
    if not peer.requirements:
        return {}
    installed: dict[str, str] = json.loads((cache / peer.name / STAMP).read_text())["versions"]
    return {name: installed[name] for name in TOLD if name in installed}


def _fingerprint(peer: Peer) -> str:
    said = [*peer.requirements, CONSTRAINTS.read_text(), platform.python_version()]
    return hashlib.sha256("\0".join(said).encode()).hexdigest()


def _installed(python: Path) -> dict[str, str]:
    out = _run([str(python), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"])
    return {entry["name"].lower().replace("_", "-"): entry["version"] for entry in json.loads(out)}


def _run(command: list[str]) -> str:
    # Niced: an install beside other work must not disturb it.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=INSTALL_S_MAX, preexec_fn=lambda: os.nice(10)
    )
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command[:5])} ... ended with {done.returncode}:\n{last}")
    return done.stdout
