"""Checkpoints with the sizes of real models and random weights: how fast a model runs does not hang on what it learnt.

Decides the sizes. The tokenizer knows the words of ``words.txt``, one token each, so that our side and
sentence-transformers read the same texts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

__all__ = ["BERT_BASE", "MINILM", "TINY", "WORDS", "Size", "save"]

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
WORDS = (Path(__file__).parents[1] / "words.txt").read_text(encoding="utf-8").split()
VOCABULARY = 30_522
"""Tokens; BERT's number, so that the embedding is as large."""
SPREAD = 0.05
"""Of the weights. Wide enough that vectors of different texts differ, as with BERT's own 0.02 they hardly do."""


@dataclass(frozen=True, slots=True)
class Size:
    """A BERT of some size."""

    name: str
    hidden: int
    layers: int
    heads: int
    inner: int


MINILM = Size("minilm", hidden=384, layers=6, heads=12, inner=1536)
BERT_BASE = Size("bert_base", hidden=768, layers=12, heads=12, inner=3072)
TINY = Size("tiny", hidden=32, layers=2, heads=2, inner=64)
"""To try the command itself."""


def save(folder: Path, size: Size) -> Path:
    """A checkpoint in sentence-transformers' layout: mean pooling, normalised."""
    torch.manual_seed(17)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.inner,
        max_position_embeddings=512,
        initializer_range=SPREAD,
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(),
        model_max_length=512,
        **SPECIAL,  # type: ignore[arg-type]
    )
    tokenizer.save_pretrained(folder)
    modules = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    listed = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(modules)
    ]
    for path, _ in modules[1:]:
        (folder / path).mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": size.hidden, "pooling_mode_mean_tokens": True}
    _write(folder / "modules.json", listed)
    _write(folder / "1_Pooling" / "config.json", pooling)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})
    return folder


def _tokenizer() -> Tokenizer:
    tokens = dict.fromkeys([*SPECIAL.values(), *WORDS])
    filler = (f"[unused{number}]" for number in range(VOCABULARY))
    vocabulary = {token: place for place, token in enumerate([*tokens, *filler][:VOCABULARY])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
