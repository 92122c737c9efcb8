"""What a checkpoint does with the encoder's token vectors: pooling, dense layers, normalisation, in that order.

Decides which ``modules.json`` we can serve exactly; anything else is refused by name, never approximated. Must never
know torch: these are descriptions, ``pooling.py`` and ``dense.py`` compute them.
Source: sentence-transformers 6.2 (``Transformer``, ``Pooling``, ``Dense``, ``Normalize`` and their configuration
files).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedserve.errors import ModelRefused
from embedserve.model.files import CheckpointFiles

__all__ = ["ACTIVATIONS", "DenseSpec", "Pipeline", "PoolingSpec", "read_pipeline"]

POOLING_NAMES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last_token",
}
"""sentence-transformers' word and ours, in the order in which its older booleans are concatenated."""

LEGACY_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last_token",
}

ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU", "LeakyReLU", "ELU", "Softplus")
"""``torch.nn`` modules that a Dense layer may end in: without parameters and the same for each row."""

VECTOR = "sentence_embedding"
"""The only feature that a Dense or Normalize module may read and write: one vector a text."""

WIDTH_MAX = 65_536
"""Floats in one vector: 16 times the widest embedding model in use (4,096)."""


@dataclass(frozen=True, slots=True)
class PoolingSpec:
    """How the token vectors of one text become one vector."""

    modes: tuple[str, ...]
    """Concatenated in this order: ``mean``, ``cls``, ``last_token``, ``max``, ``mean_sqrt_len``, ``weighted_mean``."""
    include_prompt: bool = True
    """Whether a prompt's tokens are pooled too."""
    width: int | None = None
    """Floats of one token's vector, as the checkpoint says; ``None`` where it does not."""

    @property
    def name(self) -> str:
        """As ``ModelIdentity.pooling`` says it."""
        return "+".join(self.modes)


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """One linear layer with its activation: ``[rows, in_features]`` to ``[rows, out_features]``."""

    folder: str
    in_features: int
    out_features: int
    bias: bool
    activation: str
    residual: bool


@dataclass(frozen=True, slots=True)
class Pipeline:
    """All that comes after the encoder."""

    pooling: PoolingSpec
    dense: tuple[DenseSpec, ...]
    normalize: bool
    transformer_folder: str = ""
    """Where the encoder's own files lie in the checkpoint: the root, or ``0_Transformer`` in older ones."""

    def dimension(self, hidden_size: int) -> int:
        """Floats in one vector."""
        return self.dense[-1].out_features if self.dense else hidden_size * len(self.pooling.modes)


def read_pipeline(files: CheckpointFiles) -> Pipeline | None:
    """The modules after the encoder, or ``None`` for a checkpoint without ``modules.json``. Raises ``ModelRefused``."""
    entries = files.json("modules.json")
    if entries is None:
        return None
    where = files.directory / "modules.json"
    if not isinstance(entries, list) or not entries:
        raise ModelRefused(f"{where} does not hold a list of modules")
    modules = [_module(where, entry) for entry in entries]
    kinds = [kind for kind, _ in modules]
    expected = ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense")]
    if kinds not in (expected, [*expected, "Normalize"]):
        raise ModelRefused(
            f"{where} lists the modules {', '.join(kinds)}; "
            "served are Transformer, Pooling, any number of Dense, and Normalize at the end, in this order"
        )
    if kinds[-1] == "Normalize":
        _check_feature(files, modules[-1][1], files.json_object(f"{modules[-1][1]}/config.json") or {})
    return Pipeline(
        pooling=_pooling(files, modules[1][1]),
        dense=tuple(_dense(files, folder) for kind, folder in modules if kind == "Dense"),
        normalize=kinds[-1] == "Normalize",
        transformer_folder=modules[0][1],
    )


def _module(where: Path, entry: object) -> tuple[str, str]:
    """The kind and the folder of one entry of ``modules.json``."""
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str) or not isinstance(entry.get("path"), str):
        raise ModelRefused(f"{where} has an entry without a type and a path: {entry!r}")
    kind: str = entry["type"]
    if not kind.startswith("sentence_transformers."):
        raise ModelRefused(f"{where} needs the module {kind!r}: code that comes with a checkpoint is never run")
    return kind.rpartition(".")[2], entry["path"]


def _pooling(files: CheckpointFiles, folder: str) -> PoolingSpec:
    config = files.json_object(f"{folder}/config.json")
    if config is None:
        raise ModelRefused(f"{files.directory / folder / 'config.json'} is missing: how this model pools is not known")
    given = config.get("pooling_mode")
    if given is None:
        modes = [mode for key, mode in LEGACY_POOLING_KEYS.items() if config.get(key)]
        if not modes and any(key in config for key in LEGACY_POOLING_KEYS):
            raise ModelRefused(f"{files.directory / folder / 'config.json'}: every pooling_mode is off, one must be on")
        modes = modes or ["mean"]
    else:
        names = [given] if isinstance(given, str) else given
        if not isinstance(names, list) or not names or any(name not in POOLING_NAMES for name in names):
            raise ModelRefused(
                f"{files.directory / folder / 'config.json'}: pooling_mode {given!r} is not known; "
                f"known are {', '.join(POOLING_NAMES)}"
            )
        modes = [POOLING_NAMES[name] for name in names]
    width = config.get("word_embedding_dimension", config.get("embedding_dimension"))
    return PoolingSpec(
        tuple(modes),
        include_prompt=bool(config.get("include_prompt", True)),
        width=width if isinstance(width, int) else None,
    )


def _dense(files: CheckpointFiles, folder: str) -> DenseSpec:
    where = files.directory / folder / "config.json"
    config = files.json_object(f"{folder}/config.json")
    if config is None:
        raise ModelRefused(f"{where} is missing")
    _check_feature(files, folder, config)
    # sentence-transformers takes Tanh where the file says nothing.
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    name = activation.rpartition(".")[2]
    if not activation.startswith("torch.nn.modules.") or name not in ACTIVATIONS:
        raise ModelRefused(
            f"{where}: activation_function {activation!r} is not served; known are {', '.join(ACTIVATIONS)}"
        )
    return DenseSpec(
        folder=folder,
        in_features=_width(where, config, "in_features"),
        out_features=_width(where, config, "out_features"),
        bias=bool(config.get("bias", True)),
        activation=name,
        residual=bool(config.get("use_residual", False)),
    )


def _width(where: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= WIDTH_MAX:
        raise ModelRefused(f"{where}: {key} is {value!r}, which is not a width between 1 and {WIDTH_MAX}")
    return value


def _check_feature(files: CheckpointFiles, folder: str, config: dict[str, Any]) -> None:
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, VECTOR):
            raise ModelRefused(
                f"{files.directory / folder / 'config.json'}: {key} is {config[key]!r}; only {VECTOR!r} is served"
            )
