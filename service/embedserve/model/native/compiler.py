"""A shared library from a C++ file, made once for this processor and, where it uses it, this torch.

Decides which compiler, which flags, where the result is kept and whether a kept one may be trusted: code is loaded only
from a folder that nobody else can write. Must never know what the code computes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
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

from embedserve.model.native.leash import run_on_leash

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
"""It takes 5 s; a machine that swaps must not wait for ever."""
TELLING = ("error:", "No space left", "cannot ")
"""What the line of a compiler's output holds that says why it failed."""
KEPT_MAX = 16
"""Libraries in the cache, 200 KiB each: the oldest go."""


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


def compile_library(source: Path, cache: Path, *, anew: bool = False, with_torch: bool = True) -> Compiled:
    """Build ``source``, against this torch or on its own, or take what ``cache`` has of it. Raises ``CannotCompile``.

    The name of a kept library holds a digest of everything that its code depends on but for the compiler: source and
    the headers beside it, flags, processor and torch; so a machine without a compiler can use what another has built.
    A digest of the library lies beside it: one that was cut short, as by a power failure, would end the process that
    loads it. ``anew`` builds in the place of one that is there. Several processes may build at once: the last to finish
    wins.
    """
    flags = [*FLAGS, *(X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())]
    torch_folder = _torch_folder() if with_torch else None
    kept = cache / f"{source.stem}-{_digest(source, flags, torch_folder)}.so"
    _make_private(cache)
    if not anew and _is_whole(kept):
        with contextlib.suppress(OSError):  # a cache that can only be read serves too
            os.utime(kept)
        return Compiled(kept, cached=True)
    _build(source, _compiler(), flags, kept, torch_folder)
    _drop_oldest(cache, source.stem)
    return Compiled(kept, cached=False)


def _is_whole(library: Path) -> bool:
    """Whether ``library`` is there, as it was built, and ours. Raises ``CannotCompile`` where others may write it."""
    if not library.is_file():
        return False
    _check_owner(library)
    try:
        return _seal_of(library).read_text(encoding="ascii") == _sealed(library)
    except (OSError, ValueError):
        return False


def _seal_of(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _sealed(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _compiler() -> list[str]:
    """The compiler's command, as ``CXX`` may give it with arguments."""
    try:
        wanted = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise CannotCompile(f"CXX is no command: {error}") from error
    for command in [wanted] if wanted else [[name] for name in COMPILERS]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    names = wanted[0] if wanted else ", ".join(COMPILERS)
    raise CannotCompile(f"no C++ compiler was found ({names}); install g++ to have it compiled for this processor")


def _digest(source: Path, flags: Sequence[str], torch_folder: Path | None) -> str:
    # A header that the source includes lies beside it.
    parts = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    parts += [" ".join(flags).encode(), _processor().encode()]
    parts.append(sys.platform.encode())
    if torch_folder is not None:
        parts += [importlib.metadata.version("torch").encode(), str(torch_folder).encode()]
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
    """Where torch's libraries are, without its import: that takes seconds, and who asks may have no use for it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise CannotCompile("torch is not installed")
    return Path(found.origin).parent / "lib"


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
        raise CannotCompile(
            f"{path} can be written by others, and what it holds is run; make it yours alone (0700) or set "
            "model.compile_cache"
        )


def _build(
    source: Path, compiler: Sequence[str], flags: Sequence[str], result: Path, torch_folder: Path | None
) -> None:
    try:
        descriptor, fresh = tempfile.mkstemp(".so", f".{source.stem}-", result.parent)
    except OSError as error:
        raise CannotCompile(f"{result.parent} cannot be written: {error.strerror}; set model.compile_cache") from error
    os.close(descriptor)
    command = [*compiler, *flags, str(source), "-o", fresh]
    if torch_folder is not None:
        command += [f"-L{torch_folder}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder}"]
    begun = time.monotonic()
    try:
        done = run_on_leash(command, timeout_s=COMPILE_MAX_S)
        if done.returncode != 0:
            told = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            first = next((line for line in told if any(word in line for word in TELLING)), told[0])
            raise CannotCompile(f"{compiler[0]} ended with {done.returncode}: {first}")
        _publish(Path(fresh), result)
    except subprocess.TimeoutExpired as error:
        raise CannotCompile(f"{compiler[0]} had not ended after {time.monotonic() - begun:.0f} s") from error
    except OSError as error:
        raise CannotCompile(f"{compiler[0]} could not be run: {error}") from error
    finally:
        Path(fresh).unlink(missing_ok=True)


def _publish(fresh: Path, result: Path) -> None:
    """Let ``fresh`` take its place, whole and on the disk, its seal first: a library without its seal is built anew."""
    try:
        ctypes.CDLL(str(fresh))
    except OSError as error:
        raise CannotCompile(f"what was compiled cannot be loaded: {error}") from error
    fresh.chmod(0o700)
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    seal = fresh.with_suffix(".sha256")
    try:
        seal.write_text(_sealed(fresh), encoding="ascii")
        seal.replace(_seal_of(result))
        fresh.replace(result)
    finally:
        seal.unlink(missing_ok=True)


def _drop_oldest(cache: Path, stem: str) -> None:
    """Keep the latest libraries, and nothing of builds that were killed."""
    kept = sorted(cache.glob(f"{stem}-*.so"), key=lambda path: path.stat().st_mtime, reverse=True)
    latest = kept[0].stat().st_mtime  # the one that was built now, by the file system's own clock
    for left in cache.glob(f".{stem}-*"):
        with contextlib.suppress(OSError):  # another process was quicker
            if latest - left.stat().st_mtime > COMPILE_MAX_S:
                left.unlink()
    for old in kept[KEPT_MAX:]:
        old.unlink(missing_ok=True)
        _seal_of(old).unlink(missing_ok=True)
