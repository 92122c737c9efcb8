"""A transformers encoder with the checkpoint's weights, each of them accounted for.

Decides which tensors of a checkpoint belong to the encoder, which may be left aside, and that nothing is made up: a
tensor that is missing, unexpected or misshapen is refused by name. (A loader that only warns serves random vectors.)
Must never know batches or devices.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import logging

from embedserve.errors import ModelRefused
from embedserve.model.checkpoint import Checkpoint

__all__ = ["load_encoder"]

LEGACY_NAMES = (
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)
"""Names from TensorFlow days that transformers renames too."""

SET_ASIDE = {
    r"pooler\.": "a tanh layer over the first token that no pooling mode reads",
    r"(.*\.)?position_ids": "a buffer that counts upwards, saved by old versions",
    r"(.*\.)?token_type_ids": "a buffer of zeros, saved by old versions",
    r"(.*\.)?(original_)?inv_freq": "rotary frequencies, which follow from the configuration",
    r"cls\.": "the masked-language head of BERT and Nomic",
    r"lm_head\.": "the masked-language head of RoBERTa and MPNet",
    r"vocab_(transform|layer_norm|projector)\.": "the masked-language head of DistilBERT",
    r"(discriminator|generator)_predictions\.": "the pre-training heads of ELECTRA",
    r"generator_lm_head\.": "the pre-training heads of ELECTRA",
    r"(predictions|sop_classifier)\.": "the pre-training heads of ALBERT",
    r"(head|decoder)\.": "the masked-language head of ModernBERT",
}
"""Tensors that an encoder does not read, with the reason; matched from the start of the name."""

CONVERTED_BY_TRANSFORMERS = frozenset({"nomic_bert"})
"""Architectures whose files keep the names and fused tensors of code from before transformers had them. Only its loader
knows that conversion; what it reports as missing or unexpected is refused here all the same."""

NAMED_MAX = 8
"""Tensors that a refusal lists by name before it counts the rest."""


DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers and torch raise where a configuration holds a value of a wrong kind: neither checks first."""


def load_encoder(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The encoder in ``dtype`` on the CPU, in evaluation mode, without gradients. Raises ``ModelRefused``."""
    try:
        return _load(checkpoint, dtype)
    except DAMAGE as error:
        raise ModelRefused(
            f"{checkpoint.files.directory}: config.json describes no encoder: {type(error).__name__}: {error}"
        ) from error


def _load(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    directory = checkpoint.files.directory
    try:
        config = AutoConfig.from_pretrained(
            directory / checkpoint.pipeline.transformer_folder, local_files_only=True, trust_remote_code=False
        )
        model_class: Any = MODEL_MAPPING[type(config)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelRefused(
            f"{directory}: transformers has no encoder for {checkpoint.architecture!r}: {error}"
        ) from error
    if checkpoint.architecture in CONVERTED_BY_TRANSFORMERS:
        model = _load_converted(directory / checkpoint.pipeline.transformer_folder, model_class, config)
    else:
        model = _load_exactly(checkpoint, model_class, config)
    for module in model.modules():
        if getattr(module, "is_causal", False):
            raise ModelRefused(
                f"{directory}: {checkpoint.architecture} attends to earlier tokens only; encoders are served"
            )
    # Only the weights: buffers hold rotary frequencies, which bfloat16 would round to other positions.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(requires_grad=False)
    return model


def _load_exactly(checkpoint: Checkpoint, model_class: Any, config: Any) -> PreTrainedModel:
    # Shapes are compared on the meta device first: a configuration that lies about a size must not make us allocate it.
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in _build(model_class, config).state_dict().items()}
    names = _check_names(checkpoint.files.directory, model_class, wanted, _shapes(checkpoint.weight_files))
    with no_init_weights():
        model = _build(model_class, config)
    _fill(model, checkpoint.weight_files, names)
    return model


def _load_converted(directory: Path, model_class: Any, config: Any) -> PreTrainedModel:
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: PreTrainedModel
    model, report = model_class.from_pretrained(
        directory,
        config=config,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        dtype=torch.float32,
        **_without_pooler(model_class),
    )
    unexpected = [name for name in report["unexpected_keys"] if not _is_set_aside(name)]
    _refuse(
        directory,
        model_class,
        missing=sorted(report["missing_keys"]),
        unexpected=sorted(unexpected),
        misshapen=sorted(map(str, report["mismatched_keys"])) + list(report["error_msgs"]),
    )
    return model


def _build(model_class: Any, config: Any) -> PreTrainedModel:
    arguments = _without_pooler(model_class)
    model: PreTrainedModel = model_class._from_config(config, dtype=torch.float32, **arguments)  # noqa: SLF001
    return model


def _without_pooler(model_class: Any) -> dict[str, bool]:
    takes_it = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes_it else {}


def _shapes(paths: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelRefused(f"{path} cannot be read: {error}") from error
    return shapes


def _check_names(
    directory: Path,
    model_class: Any,
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    """The checkpoint's name of each tensor that the encoder wants, by the encoder's name."""
    prefix = f"{model_class.base_model_prefix}."
    # Saved with a head, every tensor of the encoder has the prefix; never strip it from a part of them.
    strip = prefix if any(name.startswith(prefix) for name in found) and not _is_own_prefix(prefix, wanted) else ""
    names: dict[str, str] = {}
    unexpected: list[str] = []
    for name in found:
        own = name.removeprefix(strip)
        for pattern, replacement in LEGACY_NAMES:
            own = pattern.sub(replacement, own)
        if own in wanted and name.startswith(strip):
            names[own] = name
        elif not _is_set_aside(own):
            unexpected.append(name)
    misshapen = [
        f"{own} is {found[name]} and must be {wanted[own]}" for own, name in names.items() if found[name] != wanted[own]
    ]
    missing = [name for name in wanted if name not in names]
    _refuse(directory, model_class, missing=missing, unexpected=unexpected, misshapen=misshapen)
    return names


def _refuse(directory: Path, model_class: Any, **problems: list[str]) -> None:
    """Raise ``ModelRefused`` naming the tensors of each problem that there is."""
    found = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise ModelRefused(f"{directory}: the weights are not those of {model_class.__name__}; {'; '.join(found)}")


def _is_set_aside(name: str) -> bool:
    return any(re.match(pattern, name) for pattern in SET_ASIDE)


def _is_own_prefix(prefix: str, wanted: Iterable[str]) -> bool:
    """Whether the encoder's own names begin with ``prefix``, so that it must not be stripped."""
    return any(name.startswith(prefix) for name in wanted)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return ", ".join(names[:NAMED_MAX]) + more


def _fill(model: PreTrainedModel, paths: Iterable[Path], names: Mapping[str, str]) -> None:
    """Copy every tensor: memory of our own cannot change under us when the file does."""
    own: dict[str, Tensor] = dict(model.state_dict())
    by_file_name = {name: target for target, name in names.items()}
    with torch.no_grad():
        for path in paths:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if name in by_file_name:
                        own[by_file_name[name]].copy_(tensors.get_tensor(name))
