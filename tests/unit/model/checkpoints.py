"""Small random checkpoints of every architecture, saved in sentence-transformers' layout by sentence-transformers
itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.corpus import real_texts

VOCAB_SIZE = 600
HIDDEN = 32
ARCHITECTURES = (
    "albert",
    "bert",
    "camembert",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "roberta",
    "xlm-roberta",
)
PACKED = tuple(name for name in ARCHITECTURES if name != "mpnet")

BERT_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
ROBERTA_SPECIAL = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "mask_token": "<mask>",
}


@cache
def word_piece() -> Tokenizer:
    """BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = list(BERT_SPECIAL.values())
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(real_texts(200, 7), trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


@cache
def byte_level_bpe() -> Tokenizer:
    """RoBERTa's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(real_texts(200, 7), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


@cache
def unigram() -> Tokenizer:
    """XLM-R's kind: SentencePiece pieces, words marked with a leading space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(real_texts(200, 7), trainer)
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


def _encoder(architecture: str) -> tuple[Any, Any]:
    """A random encoder and its tokenizer."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 130,
        # Wide enough that rows differ and an error shows; transformers' own 0.02 makes all vectors alike.
        "initializer_range": 0.2,
    }
    offset = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    plain = {"pad_token_id": 0}
    fast = transformers.PreTrainedTokenizerFast
    bert_style = lambda: fast(tokenizer_object=word_piece(), **BERT_SPECIAL)
    unigram_style = lambda: fast(tokenizer_object=unigram(), **ROBERTA_SPECIAL)
    bpe_style = lambda: fast(tokenizer_object=byte_level_bpe(), **ROBERTA_SPECIAL)
    if architecture == "albert":
        config = transformers.AlbertConfig(**sizes, embedding_size=16, **offset)
        return transformers.AlbertModel(config, add_pooling_layer=False), unigram_style()
    if architecture == "bert":
        vocab = word_piece().get_vocab()
        return transformers.BertModel(transformers.BertConfig(**sizes, **plain)), transformers.BertTokenizer(
            vocab=vocab
        )
    if architecture == "camembert":
        return transformers.CamembertModel(transformers.CamembertConfig(**sizes, **offset)), unigram_style()
    if architecture == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=VOCAB_SIZE,
            dim=HIDDEN,
            n_layers=2,
            n_heads=2,
            hidden_dim=64,
            max_position_embeddings=130,
            initializer_range=0.2,
        )
        return transformers.DistilBertModel(config), bert_style()
    if architecture == "electra":
        return transformers.ElectraModel(transformers.ElectraConfig(**sizes, embedding_size=16, **plain)), bert_style()
    if architecture == "modernbert":
        special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
        config = transformers.ModernBertConfig(
            **sizes | {"num_hidden_layers": 4}, **special, local_attention=16, global_attn_every_n_layers=3
        )
        return transformers.ModernBertModel(config), bpe_style()
    if architecture == "mpnet":
        config = transformers.MPNetConfig(**sizes, **offset)
        return transformers.MPNetModel(config), bpe_style()
    if architecture == "nomic_bert":
        return transformers.NomicBertModel(transformers.NomicBertConfig(**sizes, **plain)), bert_style()
    if architecture == "roberta":
        return transformers.RobertaModel(transformers.RobertaConfig(**sizes, **offset)), bpe_style()
    if architecture == "xlm-roberta":
        return transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**sizes, **offset)), unigram_style()
    raise AssertionError(architecture)


def save_encoder(folder: Path, architecture: str) -> Path:
    """A plain transformers checkpoint: no ``modules.json``."""
    torch.manual_seed(sum(map(ord, architecture)))
    encoder, tokenizer = _encoder(architecture)
    tokenizer.model_max_length = 128
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1:  # biases and norms start at 0 and 1: shift them, or a lost one would not show
                parameter.add_(torch.randn_like(parameter) * 0.1)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_checkpoint(
    folder: Path,
    architecture: str = "bert",
    *,
    pooling: str | Sequence[str] = "mean",
    dense: Sequence[Dense] = (),
    normalize: bool = True,
    include_prompt: bool = True,
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
) -> Path:
    """A checkpoint in sentence-transformers' layout."""
    save_encoder(folder / "encoder", architecture)
    modules: list[Any] = [Transformer(str(folder / "encoder"))]
    modules.append(Pooling(HIDDEN, pooling_mode=pooling, include_prompt=include_prompt))
    modules += dense
    if normalize:
        modules.append(Normalize())
    model = SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name=default_prompt_name, device="cpu")
    model.save(str(folder / "checkpoint"), create_model_card=False)
    return folder / "checkpoint"
