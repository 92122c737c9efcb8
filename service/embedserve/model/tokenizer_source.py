"""The text of ``tokenizer.json`` that a checkpoint means, with what its other files change in it.

Decides which file a tokenizer is read from and applies the rules that transformers and sentence-transformers apply
after reading it. Must never tokenise: ``tokenizer.py`` does, with the text that is returned here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embedserve.errors import ModelRefused
from embedserve.model.files import TOKENIZER_BYTES_MAX, CheckpointFiles

__all__ = ["read_tokenizer_json"]

VOCABULARY_FILES = (
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
)
"""What transformers can convert to a fast tokenizer where there is no ``tokenizer.json``."""

BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MPNetTokenizer")
"""Classes whose options win over the file's BERT normaliser, ``do_lower_case`` being true unless it is said."""


def read_tokenizer_json(files: CheckpointFiles, folder: str, *, lowercase: bool) -> str:
    """The text of ``tokenizer.json`` in ``folder``, changed only where another file of the checkpoint says so.

    ``lowercase`` is ``do_lower_case`` of ``sentence_bert_config.json``. Without a ``tokenizer.json`` the vocabulary
    files are converted by transformers, which is slow (it imports torch). Raises ``ModelRefused``.
    """
    prefix = f"{folder}/" if folder else ""
    text = files.text(f"{prefix}tokenizer.json", TOKENIZER_BYTES_MAX)
    if text is None:
        text = _converted(files, files.directory / folder)
    config = files.json_object(f"{prefix}tokenizer_config.json") or {}
    if config.get("auto_map"):
        raise ModelRefused(f"{files.directory / folder}: tokenizer_config.json has auto_map, code that is never run")
    try:
        definition = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelRefused(f"{files.directory / folder / 'tokenizer.json'} is not JSON: {error}") from error
    if not isinstance(definition, dict):
        raise ModelRefused(f"{files.directory / folder / 'tokenizer.json'} is not a JSON object")
    bert_changed = _apply_bert_options(definition.get("normalizer"), config)
    lower_changed = lowercase and _apply_lowercase(definition)
    # Unchanged text stays byte for byte, so that its digest is that of the file.
    return json.dumps(definition, ensure_ascii=False) if bert_changed or lower_changed else text


def _apply_bert_options(normalizer: Any, config: dict[str, Any]) -> bool:
    """Whether ``tokenizer_config.json`` changed the ``BertNormalizer``: transformers lets it decide."""
    if not isinstance(normalizer, dict) or normalizer.get("type") != "BertNormalizer":
        return False
    if str(config.get("tokenizer_class", "")).removesuffix("Fast") not in BERT_CLASSES:
        return False
    wanted = {
        "lowercase": config.get("do_lower_case", True),
        "strip_accents": config.get("strip_accents"),
        "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
    }
    changed = any(normalizer.get(key) != value for key, value in wanted.items())
    normalizer.update(wanted)
    return changed


def _apply_lowercase(definition: dict[str, Any]) -> bool:
    """Whether a Lowercase was put first, as sentence-transformers does for ``do_lower_case`` unless there is one."""
    normalizer = definition.get("normalizer")
    steps: list[Any] = []
    if isinstance(normalizer, dict):
        steps = list(normalizer.get("normalizers", [])) if normalizer.get("type") == "Sequence" else [normalizer]
    if any(isinstance(step, dict) and step.get("type") == "Lowercase" for step in steps):
        return False
    definition["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *steps]}
    return True


def _converted(files: CheckpointFiles, directory: Path) -> str:
    """The fast tokenizer that transformers makes of the vocabulary files in ``directory``, as JSON."""
    if not any((directory / name).is_file() for name in VOCABULARY_FILES):
        raise ModelRefused(
            f"{directory} has no tokenizer: neither tokenizer.json nor any of {', '.join(VOCABULARY_FILES)}"
        )
    for name in VOCABULARY_FILES:
        files.path(str((directory / name).relative_to(files.directory)))
    from transformers import AutoTokenizer  # noqa: PLC0415 - 3 s and torch, only for such checkpoints

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelRefused(f"{directory}: transformers cannot convert the tokenizer: {error}") from error
    if not tokenizer.is_fast:
        raise ModelRefused(
            f"{directory}: {type(tokenizer).__name__} has no fast form, and only fast tokenizers are served"
        )
    converted: str = tokenizer.backend_tokenizer.to_str()
    return converted
