"""Which files of a checkpoint are read, and why that is safe.

Decides confinement (no path and no link leads out of the checkpoint), size limits, the refusal of weights that can run
code, and digests. Must never know what the files mean: ``checkpoint.py`` and ``pipeline.py`` read them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedserve.errors import ModelRefused

__all__ = ["JSON_BYTES_MAX", "TOKENIZER_BYTES_MAX", "CheckpointFiles", "digest_files", "digest_text"]

JSON_BYTES_MAX = 16 * 1024 * 1024
"""One metadata file. The largest real one is a shard index: 150 bytes a tensor, so 16 MiB is 100,000 tensors."""
TOKENIZER_BYTES_MAX = 256 * 1024 * 1024
"""``tokenizer.json``. The largest in use (250,000 Unigram pieces, or BPE with its merges) are 17 to 35 MB."""

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.pkl")
"""Formats that can run code when they are read, or that are no PyTorch weights (CVE-2025-32434 for ``torch.load``)."""


class CheckpointFiles:
    """The files of one checkpoint, by their path inside it."""

    def __init__(self, directory: Path, confined_to: Path) -> None:
        """Read below ``directory``; links may lead into ``confined_to`` only."""
        self.directory = directory
        self.confined_to = confined_to.resolve()

    def path(self, relative: str) -> Path | None:
        """The file's real path, or ``None`` where there is none. Raises ``ModelRefused`` when it leads out."""
        parts = Path(relative).parts
        if Path(relative).is_absolute() or ".." in parts or "\\" in relative:
            raise ModelRefused(f"{self.directory}: the checkpoint names {relative!r}, a path outside it")
        path = self.directory / relative
        if not path.is_file():
            return None
        resolved = path.resolve()
        if not resolved.is_relative_to(self.confined_to):
            raise ModelRefused(f"{path} is a link to {resolved}, outside the checkpoint")
        return resolved

    def text(self, relative: str, bytes_max: int = JSON_BYTES_MAX) -> str | None:
        """The file's text, or ``None`` where there is none."""
        path = self.path(relative)
        if path is None:
            return None
        size = path.stat().st_size
        if size > bytes_max:
            raise ModelRefused(f"{self.directory / relative} has {size} bytes; at most {bytes_max} are read")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelRefused(f"{self.directory / relative} is not UTF-8 text: {error}") from error

    def json(self, relative: str) -> Any:
        """The file's JSON value, or ``None`` where there is no such file."""
        text = self.text(relative)
        if text is None:
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelRefused(f"{self.directory / relative} is not JSON: {error}") from error

    def json_object(self, relative: str) -> dict[str, Any] | None:
        """The file's JSON object, or ``None`` where there is no such file; any other JSON value is refused."""
        value = self.json(relative)
        if value is not None and not isinstance(value, dict):
            raise ModelRefused(f"{self.directory / relative} is not a JSON object")
        return value

    def weights(self, folder: str = "") -> tuple[Path, ...]:
        """The safetensors files of ``folder``: one, or the shards that its index names, in order.

        Raises ``ModelRefused`` when there is none, naming the files that are there and not read.
        """
        single = self.path(_join(folder, WEIGHTS_FILE))
        if single is not None:
            return (single,)
        index_name = _join(folder, WEIGHTS_INDEX)
        index = self.json_object(index_name)
        if index is None:
            raise ModelRefused(self._no_weights(folder))
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelRefused(f"{self.directory / index_name} has no weight_map")
        return tuple(self._shard(folder, index_name, shard) for shard in sorted(set(map(str, weight_map.values()))))

    def _shard(self, folder: str, index_name: str, shard: str) -> Path:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelRefused(
                f"{self.directory / index_name} names the shard {shard!r}; "
                "a shard is a .safetensors file beside its index"
            )
        path = self.path(_join(folder, shard))
        if path is None:
            raise ModelRefused(f"{self.directory / index_name} names the shard {shard!r}, which does not exist")
        return path

    def _no_weights(self, folder: str) -> str:
        place = self.directory / folder
        unsafe = sorted({found.name for pattern in UNSAFE_WEIGHTS for found in place.glob(pattern)})
        if unsafe:
            return (
                f"{place} has no {WEIGHTS_FILE}, only {', '.join(unsafe)}, which can run code when it is read; "
                "convert it to safetensors"
            )
        return f"{place} has no weights: neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX} exists"


def digest_files(paths: Sequence[Path]) -> str:
    r"""``sha256:`` and 64 hex digits over weight files.

    Of one file, its plain SHA-256, as ``sha256sum`` prints it. Of several, the SHA-256 of one line per file in the
    given order, ``<hex digest>  <file name>\n``: what ``sha256sum FILES | sha256sum`` prints in the checkpoint's
    directory.
    """
    if len(paths) == 1:
        return "sha256:" + _file_digest(paths[0])
    lines = "".join(f"{_file_digest(path)}  {path.name}\n" for path in paths)
    return digest_text(lines)


def digest_text(text: str) -> str:
    """``sha256:`` and 64 hex digits over the UTF-8 bytes of ``text``."""
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
