"""A tiny BERT checkpoint written file by file, for tests of what is read and what is refused; no torch needed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s", "a", "b", "c"]

CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"],
    "hidden_size": 8,
    "max_position_embeddings": 64,
    "model_type": "bert",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "pad_token_id": 0,
    "vocab_size": len(VOCAB),
}

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def tokenizer_json(**changes: Any) -> str:
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(VOCAB)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(VOCAB[:5])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return json.dumps(json.loads(tokenizer.to_str()) | changes)


def safetensors(**shapes: tuple[int, ...]) -> bytes:
    """A file of zeros in float32: 8 bytes of header length, the header, the data."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in (shapes or {"weight": (2,)}).items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def write(folder: Path, relative: str, content: Any) -> None:
    """JSON of ``content``, or its bytes or text as they are; ``None`` removes the file."""
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.unlink(missing_ok=True)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_checkpoint(folder: Path, **files: Any) -> Path:
    """The whole checkpoint; ``files`` replace or remove single ones, with ``__`` for ``/`` and ``_json`` at the end."""
    whole: dict[str, Any] = {
        "config.json": CONFIG,
        "modules.json": MODULES,
        "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True},
        "tokenizer.json": tokenizer_json(),
        "model.safetensors": safetensors(),
    }
    for relative, content in whole.items():
        write(folder, relative, content)
    for relative, content in files.items():
        write(folder, relative, content)
    return folder
