"""What can be chosen of packed passes on a GPU. Plain values: no torch is imported for them."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CudaSettings", "GraphSettings"]


@dataclass(frozen=True, slots=True)
class GraphSettings:
    """Which graphs there shall be; defaults are ``cuda.py``'s."""

    enabled: bool = True
    growth: float = 1.25
    """Factor between token budgets."""
    tokens_max: int | None = None
    """Largest budget that is captured; ``None``: the largest batch."""
    rows_max: int = 512
    """Rows of the largest batch."""
    before_ready: bool = True
    """Whether all are captured before the first text is served."""


@dataclass(frozen=True, slots=True)
class CudaSettings:
    """How packed passes run on a GPU; defaults are ``cuda.py``'s."""

    graphs: GraphSettings = field(default_factory=GraphSettings)
    tiles_length_max: int = 0
    """Passes whose rows have no more tokens attend by tiles with a mask, in graphs of their own; 0: none."""
    compiled: bool = False
    """Whether inductor fuses what lies between the matrix products."""
