"""A shared library from a C++ file, made once for this processor, this compiler and this torch.

Decides which compiler, which flags, where the result is kept and whether a kept one may be trusted: code is loaded only
from a folder that nobody else can write. Must never know what the code computes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["CannotCompile", "Compiled", "compile_library", "default_cache"]

COMPILERS = ("c++", "g++", "clang++")
"""Looked for in this order where ``CXX`` names none."""
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-pthread",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
)
"""No ``-ffast-math``: a NaN must stay one, since rows that are not finite are never sent."""
X86_FLAGS = ("-mprefer-vector-width=512",)
"""Compilers prefer 256 bits for the sake of old processors that slowed down."""
COMPILE_MAX_S = 120.0
"""It takes 3 s; a machine that swaps must not wait for ever."""
KEPT_MAX = 16
"""Libraries in the cache, 60 KiB each: the oldest go."""


class CannotCompile(Exception):
    """There will be no compiled library; the sentence says why and what would help."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A library that can be loaded."""

    path: Path
    cached: bool
    """Whether it was there already."""


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/embedserve``, or the same under ``~/.cache`` (XDG Base Directory Specification)."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "embedserve"


def compile_library(source: Path, cache: Path) -> Compiled:
    """Build ``source`` against this torch, or take what ``cache`` has of it. Raises ``CannotCompile``.

    The name of a kept library holds a digest of everything that its code depends on: source, flags, compiler, processor
    and torch. Several processes may build at once: the last to finish wins, and all are the same.
    """
    compiler = _compiler()
    flags = [*FLAGS, *(X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())]
    name = f"{source.stem}-{_digest(source, compiler, flags)}.so"
    _make_private(cache)
    kept = cache / name
    if kept.is_file():
        _check_owner(kept)
        os.utime(kept)
        return Compiled(kept, cached=True)
    _build(source, compiler, flags, kept)
    _drop_oldest(cache, source.stem)
    return Compiled(kept, cached=False)


def _compiler() -> list[str]:
    """The compiler's command, as ``CXX`` may give it with arguments."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [[name] for name in COMPILERS]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    names = wanted[0] if wanted else ", ".join(COMPILERS)
    raise CannotCompile(f"no C++ compiler was found ({names}); install g++ to have passes compiled for this processor")


def _digest(source: Path, compiler: Sequence[str], flags: Sequence[str]) -> str:
    try:
        version = subprocess.run(  # noqa: S603 - the machine's own compiler
            [*compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_MAX_S, start_new_session=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotCompile(f"{compiler[0]} does not run: {error}") from error
    parts = [source.read_bytes(), version, " ".join([*compiler, *flags]).encode(), _processor().encode()]
    parts += [torch.__version__.encode(), str(_torch_folder()).encode(), sys.platform.encode()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What ``-march=native`` depends on: a cache may lie on a disk that several kinds of machines share."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor()
    told = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU implementer", "CPU part", "Features")
    first = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    return "\n".join(line for line in first.splitlines() if line.partition(":")[0].strip() in told)


def _torch_folder() -> Path:
    return Path(torch.__file__).parent / "lib"


def _make_private(folder: Path) -> None:
    """Make sure that ``folder`` is there, ours, and writable by nobody else: its content is run."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CannotCompile(f"{folder} cannot be made: {error.strerror}; set model.compile_cache") from error
    _check_owner(folder)


def _check_owner(path: Path) -> None:
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CannotCompile(f"{path} can be written by others, and what it holds is run; make it yours alone (0700)")


def _build(source: Path, compiler: Sequence[str], flags: Sequence[str], result: Path) -> None:
    libraries = _torch_folder()
    try:
        descriptor, fresh = tempfile.mkstemp(".so", f".{source.stem}-", result.parent)
    except OSError as error:
        raise CannotCompile(f"{result.parent} cannot be written: {error.strerror}; set model.compile_cache") from error
    os.close(descriptor)
    command = [*compiler, *flags, str(source), "-o", fresh]
    command += [f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
    begun = time.monotonic()
    try:
        # A session of its own: Ctrl-C in the server's terminal must not end it half-way.
        done = subprocess.run(  # noqa: S603 - the machine's own compiler
            command, capture_output=True, timeout=COMPILE_MAX_S, check=False, start_new_session=True
        )
        if done.returncode != 0:
            told = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            first = next((line for line in told if "error" in line), told[0])
            raise CannotCompile(f"{compiler[0]} ended with {done.returncode}: {first}")
        Path(fresh).chmod(0o700)
        Path(fresh).replace(result)
    except subprocess.TimeoutExpired as error:
        raise CannotCompile(f"{compiler[0]} had not ended after {time.monotonic() - begun:.0f} s") from error
    except OSError as error:
        raise CannotCompile(f"{compiler[0]} could not be run: {error}") from error
    finally:
        Path(fresh).unlink(missing_ok=True)


def _drop_oldest(cache: Path, stem: str) -> None:
    kept = sorted(cache.glob(f"{stem}-*.so"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in kept[KEPT_MAX:]:
        old.unlink(missing_ok=True)
