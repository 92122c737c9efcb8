"""A checkpoint without files: what the composition root needs to know of a fake model.

Decides nothing: it says what the backend's identity and the tiny tokenizer say.
"""

from __future__ import annotations

from pathlib import Path

from embedserve.model.backend import ModelIdentity
from embedserve.model.checkpoint import Checkpoint
from embedserve.model.files import CheckpointFiles
from embedserve.model.pipeline import Pipeline, PoolingSpec
from embedserve.testing.backends import fake_identity
from embedserve.testing.tokenizer import tiny_tokenizer_json

__all__ = ["fake_checkpoint"]


def fake_checkpoint(identity: ModelIdentity | None = None) -> Checkpoint:
    """The checkpoint that ``identity`` would have been loaded from. Its directory does not exist; it has no weights."""
    identity = identity or fake_identity()
    nowhere = Path("/nonexistent")
    return Checkpoint(
        files=CheckpointFiles(nowhere, nowhere),
        name=identity.name,
        revision=identity.revision,
        config={"model_type": identity.architecture},
        architecture=identity.architecture,
        pipeline=Pipeline(PoolingSpec(tuple(identity.pooling.split("+"))), (), identity.normalize),
        vocab_size=identity.vocab_size,
        hidden_size=identity.dimension,
        position_limit=identity.max_input_length,
        max_input_length=identity.max_input_length,
        weight_files=(),
        weights_digest=identity.weights_digest,
        tokenizer_json=tiny_tokenizer_json(),
        tokenizer_digest=identity.tokenizer_digest,
        prompts=identity.prompts,
        default_prompt_name=identity.default_prompt_name,
        notes=(),
    )
