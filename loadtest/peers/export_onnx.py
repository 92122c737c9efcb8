"""A copy of a checkpoint with an ONNX graph beside its weights: ``export_onnx.py CHECKPOINT COPY``.

Runs in the peer's own environment, with its transformers and torch. Decides the graph's names, as optimum expects them,
and that the copy says 256 as its longest input: the ONNX engine truncates at that value where the torch engine takes
``max_seq_length``, and nobody shall have longer texts than the others.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
OUTPUT = "last_hidden_state"
TOKENS_MAX = 256
OPSET = 17
"""The newest that optimum 1.24's optimizer was made for."""


class Encoder(torch.nn.Module):
    """The model with its inputs in order and one output."""

    def __init__(self, model: Any) -> None:
        """``model`` is a BertModel or alike."""
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """The last hidden state, ``[rows, tokens, dimensions]``."""
        found: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        return found


def main() -> None:
    """The script."""
    source, copy = Path(sys.argv[1]), Path(sys.argv[2])
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    config = json.loads((copy / "config.json").read_text())
    model = AutoModel.from_pretrained(source).eval()
    example = AutoTokenizer.from_pretrained(source)(["two words", "one"], padding=True, return_tensors="pt")
    torch.onnx.export(
        Encoder(model), tuple(example[name] for name in INPUTS), str(copy / "model.onnx"), input_names=INPUTS,
        output_names=[OUTPUT], dynamic_axes={name: {0: "rows", 1: "tokens"} for name in [*INPUTS, OUTPUT]},
        opset_version=OPSET, dynamo=False,
    )  # fmt: skip
    config["max_position_embeddings"] = TOKENS_MAX
    (copy / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
