"""A checkpoint's metadata, read and checked: what is served, under which identity, and how long a text may be.

Decides whether we can serve a checkpoint exactly as sentence-transformers would; whatever is missing, unsafe or unknown
is refused with a sentence. Must never import torch or transformers, so that checking a configuration takes a moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedserve.errors import ModelRefused, StartupError
from embedserve.model.backend import ModelIdentity
from embedserve.model.files import CheckpointFiles, digest_files, digest_text
from embedserve.model.pipeline import WIDTH_MAX, Pipeline, PoolingSpec, read_pipeline
from embedserve.model.source import CheckpointSource, locate
from embedserve.model.tokenizer import TextTokenizer
from embedserve.model.tokenizer_source import read_tokenizer_json

__all__ = ["Checkpoint", "load_checkpoint"]

VOCAB_SIZE_MAX = 4_000_000
"""Rows of a token embedding: 16 times the largest vocabulary of a multilingual encoder (250,000)."""
POSITIONS_MAX = 1_048_576
"""Tokens in one text that a configuration may claim; beyond it the claim is an error, not a model."""
LAYERS_MAX = 1024
"""Layers that a configuration may ask for: building a thousand takes a second, two thousand million an age."""
LAYER_KEYS = ("num_hidden_layers", "n_layers", "num_layers", "num_hidden_groups", "inner_group_num")
INPUT_LENGTH_MIN = 4
"""Two special tokens and two of text: less embeds nothing."""

OFFSET_POSITIONS = frozenset(
    {"camembert", "data2vec-text", "ibert", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"}
)
"""Architectures whose positions start at ``pad_token_id + 1``, so that a table of 514 rows takes 512 tokens."""

PACKED_ARCHITECTURES = frozenset(
    {"albert", "bert", "camembert", "distilbert", "electra", "modernbert", "nomic_bert", "roberta", "xlm-roberta"}
)
"""Architectures that hand ``packing`` down to the attention and take explicit positions. MPNet and DeBERTa do not:
their attention adds a bias made from the positions of a padded batch."""

SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names under which sentence-transformers looks for the encoder's settings, in its order."""

TEXT_MODALITY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
"""The one way of using an encoder that is served: text in, the last layer's vectors out."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that can be served. Made by ``load_checkpoint``; holds no weights."""

    files: CheckpointFiles
    name: str
    revision: str
    config: dict[str, Any]
    """``config.json``, as it is."""
    architecture: str
    """``model_type``, such as ``bert``."""
    pipeline: Pipeline
    vocab_size: int
    hidden_size: int
    position_limit: int
    """Tokens in one text that the position embeddings can tell apart."""
    max_input_length: int
    weight_files: tuple[Path, ...]
    weights_digest: str
    tokenizer_json: str = field(repr=False)
    tokenizer_digest: str
    prompts: tuple[tuple[str, str], ...]
    default_prompt_name: str | None
    notes: tuple[str, ...]
    """Sentences for the log: what was assumed where the checkpoint is silent."""

    @property
    def include_prompt(self) -> bool:
        """Whether a prompt's tokens are pooled; where not, ``TokenBatch.skip`` leaves them out."""
        return self.pipeline.pooling.include_prompt

    @property
    def packs(self) -> bool:
        """Whether rows of different lengths can share a pass without padding."""
        return self.architecture in PACKED_ARCHITECTURES

    @property
    def dimension(self) -> int:
        """Floats in one vector."""
        return self.pipeline.dimension(self.hidden_size)

    def tokenizer(self) -> TextTokenizer:
        """A tokenizer for one thread; takes 10 to 300 ms, so clone it for the next."""
        try:
            return TextTokenizer(self.tokenizer_json, self.max_input_length)
        except ValueError as error:
            raise ModelRefused(f"{self.files.directory}: {error}") from error

    @property
    def offset_pad_id(self) -> int | None:
        """The padding id that positions start after, or ``None`` where they start at 0."""
        if self.architecture not in OFFSET_POSITIONS:
            return None
        pad = self.config.get("pad_token_id")
        # MPNet fixes its padding index at 1, whatever the configuration says; 1 is also the family's default.
        return 1 if self.architecture == "mpnet" or not isinstance(pad, int) else pad

    def token_ids(self, tokens: Sequence[str]) -> tuple[int, ...]:
        """The ids of ``tokens``. Raises ``StartupError`` naming those that the vocabulary does not have."""
        if not tokens:
            return ()
        tokenizer = self.tokenizer()
        ids = {token: tokenizer.token_id(token) for token in tokens}
        if unknown := [token for token, token_id in ids.items() if token_id is None]:
            raise StartupError(f"{self.name} has no token {', '.join(map(repr, unknown))} in its vocabulary")
        return tuple(token_id for token_id in ids.values() if token_id is not None)

    def identity_for(self, device: str, dtype: str) -> ModelIdentity:
        """The identity of this checkpoint when it runs on ``device`` with weights of ``dtype``."""
        return ModelIdentity(
            name=self.name,
            revision=self.revision,
            weights_digest=self.weights_digest,
            tokenizer_digest=self.tokenizer_digest,
            architecture=self.architecture,
            dimension=self.dimension,
            max_input_length=self.max_input_length,
            pooling=self.pipeline.pooling.name,
            normalize=self.pipeline.normalize,
            dtype=dtype,
            device=device,
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
            vocab_size=self.vocab_size,
        )


def load_checkpoint(
    source: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    max_input_length: int | None = None,
    allow_download: bool = False,
) -> Checkpoint:
    """Find, read and check a checkpoint: metadata, tokenizer and digests, no weights, no torch.

    ``source`` as in ``source.locate``. ``max_input_length`` overrides the checkpoint's own, up to what its positions
    allow. Raises ``StartupError`` where there is nothing, ``ModelRefused`` where it cannot be served.
    """
    found = locate(source, name=name, revision=revision, allow_download=allow_download)
    try:
        return _read(found, CheckpointFiles(found.directory, found.confined_to), max_input_length)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        # A list where a name belongs, NaN where a length does: JSON that nobody writes on purpose, in too many places
        # to check each before it is used.
        raise ModelRefused(
            f"{found.directory}: a file holds a value of a wrong kind: {type(error).__name__}: {error}"
        ) from error


def _read(found: CheckpointSource, files: CheckpointFiles, max_input_length: int | None) -> Checkpoint:
    notes: list[str] = []
    pipeline = read_pipeline(files)
    if pipeline is None:
        pipeline = Pipeline(PoolingSpec(("mean",)), dense=(), normalize=False)
        notes.append("the checkpoint has no modules.json: mean pooling without normalisation, as sentence-transformers")
    folder = pipeline.transformer_folder
    config = _encoder_config(files, folder)
    hidden_size = _size(files, config, ("hidden_size", "dim", "d_model"), WIDTH_MAX)
    _check_widths(files, pipeline, hidden_size)
    settings = _sentence_config(files, folder)
    position_limit = _position_limit(files, config)
    prompts, default_prompt_name = _prompts(files)
    weight_files = files.weights(folder)
    weights_digest = digest_files(
        [*weight_files, *(path for spec in pipeline.dense for path in files.weights(spec.folder))]
    )
    tokenizer_json = read_tokenizer_json(files, folder, lowercase=bool(settings.get("do_lower_case")))
    return Checkpoint(
        files=files,
        name=found.name,
        revision=found.revision or weights_digest.removeprefix("sha256:")[:12],
        config=config,
        architecture=config["model_type"],
        pipeline=pipeline,
        vocab_size=_size(files, config, ("vocab_size",), VOCAB_SIZE_MAX),
        hidden_size=hidden_size,
        position_limit=position_limit,
        max_input_length=_input_length(files, folder, settings, position_limit, max_input_length),
        weight_files=weight_files,
        weights_digest=weights_digest,
        tokenizer_json=tokenizer_json,
        tokenizer_digest=digest_text(tokenizer_json),
        prompts=prompts,
        default_prompt_name=default_prompt_name,
        notes=tuple(notes),
    )


def _encoder_config(files: CheckpointFiles, folder: str) -> dict[str, Any]:
    """``config.json``, of an encoder that needs no code of its own."""
    relative = f"{folder}/config.json" if folder else "config.json"
    where = files.directory / relative
    config = files.json_object(relative)
    if config is None:
        raise ModelRefused(f"{where} does not exist: this is not a transformers checkpoint")
    if not isinstance(config.get("model_type"), str):
        raise ModelRefused(f"{where} has no model_type")
    if config.get("auto_map"):
        raise ModelRefused(f"{where} has auto_map: this checkpoint needs code of its own, which is never run")
    _check_encoder(where, config)
    for key in LAYER_KEYS:
        if config.get(key) is not None:
            _size(files, config, (key,), LAYERS_MAX)
    if config.get("position_embedding_type") not in (None, "absolute", "rotary"):
        # transformers 5 dropped relative positions for BERT without an error; the vectors would be wrong.
        raise ModelRefused(f"{where}: position_embedding_type {config['position_embedding_type']!r} is not served")
    if config.get("quantization_config"):
        raise ModelRefused(f"{where} has quantization_config: quantised weights are not served")
    return config


def _check_encoder(where: Path, config: dict[str, Any]) -> None:
    """Refuse a decoder: its tokens do not see what comes after them."""
    if config.get("is_encoder_decoder"):
        raise ModelRefused(f"{where}: {config['model_type']} is an encoder-decoder model; encoders are served")
    bidirectional = bool(config.get("use_bidirectional_attention")) or config.get("is_causal") is False
    architectures = config.get("architectures") or []
    causal = [name for name in architectures if str(name).endswith(("ForCausalLM", "LMHeadModel"))]
    if config.get("is_decoder") or config.get("is_causal") or (causal and not bidirectional):
        reason = ", ".join(map(str, causal)) or "is_decoder"
        raise ModelRefused(f"{where}: {config['model_type']} is a decoder ({reason}); encoders are served")


def _sentence_config(files: CheckpointFiles, folder: str) -> dict[str, Any]:
    """The encoder's settings for sentence-transformers, or an empty object.

    Settings that we do not honour are refused.
    """
    prefix = f"{folder}/" if folder else ""
    for file_name in SENTENCE_CONFIGS:
        settings = files.json_object(prefix + file_name)
        if settings:
            break
    else:
        return {}
    where = files.directory / prefix / file_name
    if settings.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise ModelRefused(f"{where}: transformer_task {settings['transformer_task']!r} makes no text vectors")
    if settings.get("modality_config", TEXT_MODALITY) != TEXT_MODALITY:
        raise ModelRefused(
            f"{where}: modality_config {settings['modality_config']!r} is not text through the last layer"
        )
    for key in (
        "query_length",
        "document_length",
        "query_expansion",
        "processing_kwargs",
        "config_args",
        "config_kwargs",
    ):
        if settings.get(key):
            raise ModelRefused(f"{where}: {key} is set to {settings[key]!r}, which is not served")
    return settings


def _check_widths(files: CheckpointFiles, pipeline: Pipeline, hidden_size: int) -> None:
    said = pipeline.pooling.width
    if said is not None and said != hidden_size:
        raise ModelRefused(
            f"{files.directory}: the pooling's word_embedding_dimension is {said}, the encoder gives {hidden_size}"
        )
    width = hidden_size * len(pipeline.pooling.modes)
    for spec in pipeline.dense:
        if spec.in_features != width:
            raise ModelRefused(
                f"{files.directory / spec.folder}: this Dense layer takes {spec.in_features} floats, "
                f"the module before it gives {width}"
            )
        width = spec.out_features


def _position_limit(files: CheckpointFiles, config: dict[str, Any]) -> int:
    positions = _size(files, config, ("max_position_embeddings", "n_positions"), POSITIONS_MAX)
    if config["model_type"] not in OFFSET_POSITIONS:
        return positions
    pad = config.get("pad_token_id")
    return positions - (2 if config["model_type"] == "mpnet" or not isinstance(pad, int) else pad + 1)


def _input_length(
    files: CheckpointFiles, folder: str, settings: dict[str, Any], position_limit: int, override: int | None
) -> int:
    """Tokens in one text, as sentence-transformers decides it, within what the positions allow."""
    if override is not None:
        if not INPUT_LENGTH_MIN <= override <= position_limit:
            raise StartupError(
                f"max_input_length is {override}; this checkpoint takes {INPUT_LENGTH_MIN} to {position_limit} tokens"
            )
        return override
    prefix = f"{folder}/" if folder else ""
    arguments = settings.get("tokenizer_args") or settings.get("processor_kwargs") or {}
    tokenizer_config = files.json_object(f"{prefix}tokenizer_config.json") or {}
    # Its own setting wins over the tokenizer's, even where that is shorter.
    own = [settings.get("max_seq_length"), arguments.get("model_max_length"), tokenizer_config.get("model_max_length")]
    length = next((value for value in own if isinstance(value, int | float)), position_limit)
    length = int(min(length, position_limit))
    if length < INPUT_LENGTH_MIN:
        raise ModelRefused(f"{files.directory}: its maximum length is {length} tokens, which leaves no room for a text")
    return length


def _prompts(files: CheckpointFiles) -> tuple[tuple[tuple[str, str], ...], str | None]:
    where = files.directory / "config_sentence_transformers.json"
    config = files.json_object(where.name) or {}
    if config.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise ModelRefused(f"{where}: {config['model_type']!r} is not a model that gives one vector a text")
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise ModelRefused(f"{where}: prompts is not an object of texts")
    for text in (*prompts, *prompts.values()):
        (text or "").encode()  # half a surrogate pair, which JSON can spell, is no text: ValueError
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ModelRefused(f"{where}: default_prompt_name {default!r} is not among the prompts {list(prompts)}")
    return tuple((prompt_name, text or "") for prompt_name, text in prompts.items()), default


def _size(files: CheckpointFiles, config: dict[str, Any], keys: Sequence[str], maximum: int) -> int:
    """The first of ``keys`` in ``config``, a whole number from 1 to ``maximum``."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= maximum:
            raise ModelRefused(f"{files.directory}: config.json says {key} {value!r}, not a number from 1 to {maximum}")
        return value
    raise ModelRefused(f"{files.directory}: config.json does not say {keys[0]}")
