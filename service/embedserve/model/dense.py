"""What follows pooling: the checkpoint's Dense layers and the scaling to unit length.

Decides how those modules are loaded and computed. Must never know tokens: it sees one vector a row.
Source: sentence-transformers 6.2, ``Dense`` and ``Normalize``.
"""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from embedserve.errors import ModelRefused
from embedserve.model.files import CheckpointFiles
from embedserve.model.pipeline import DenseSpec

__all__ = ["Dense", "load_dense", "scale_to_unit_length"]


class Dense(nn.Module):
    """``activation(linear(x))``, with the input added where the checkpoint says so; float32."""

    def __init__(self, spec: DenseSpec) -> None:
        """Layers with the names that a checkpoint's weights have."""
        super().__init__()
        self.linear = nn.Linear(spec.in_features, spec.out_features, bias=spec.bias)
        self.activation: nn.Module = getattr(nn, spec.activation)()
        self.has_residual = spec.residual
        if spec.residual and spec.in_features != spec.out_features:
            self.residual = nn.Linear(spec.in_features, spec.out_features, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """``[rows, in_features]`` to ``[rows, out_features]``."""
        result: Tensor = self.activation(self.linear(vectors))
        if not self.has_residual:
            return result
        return result + (self.residual(vectors) if hasattr(self, "residual") else vectors)


def load_dense(spec: DenseSpec, files: CheckpointFiles) -> Dense:
    """The layer with its weights.

    Raises ``ModelRefused`` naming each tensor that is missing, unexpected or misshapen.
    """
    weights = files.weights(spec.folder)[0]
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise ModelRefused(f"{weights} cannot be read: {error}") from error
    layer = Dense(spec)
    try:
        layer.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelRefused(f"{weights} does not hold this Dense layer: {error}") from error
    return layer.requires_grad_(requires_grad=False)


def scale_to_unit_length(vectors: Tensor, chosen: Tensor) -> Tensor:
    """Rows of ``vectors`` at length 1 where ``chosen`` (bool, ``[rows]``), the others as they are."""
    return functional.normalize(vectors, p=2, dim=-1).where(chosen[:, None], vectors)
