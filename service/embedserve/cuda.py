"""The settings of passes on a GPU.

Decides what can be set. Must never know how a pass runs; that is in ``model/cuda``. ``config.py`` is where all settings
are read from; this part of the tree has a file of its own because the other is long.
"""

from __future__ import annotations

from typing import Annotated

from embedserve.kinds import MIB, Section, Switch, between
from embedserve.model.cuda.settings import CudaSettings, GraphSettings

__all__ = ["Cuda"]


class Cuda(Section):
    """Packed passes on a GPU. Without one none of it matters."""

    graphs: Switch = True
    """Capture passes as CUDA graphs. Off: the host launches each kernel anew, and a short pass waits for it."""
    graph_padding: Annotated[float, between(0.05, 0.75)] = 0.2
    """Largest part of a captured pass that is filled up in vain, over 320 tokens: budgets are 1.25 times apart, 170
    graphs for texts of up to 512 tokens. 0.33 needs 100."""
    max_graph_tokens: Annotated[int, between(64, 16 * MIB)] | None = None
    """Largest budget that is captured. none: the largest batch. Kernels of large ones hide their own launches."""
    ready_before_graphs: Switch = False
    """Serve before all are captured, so that a start is some 10 s shorter; each is compared with a pass without it
    before it is used. Off: no caller waits for a capture."""
    max_tile_tokens: Annotated[int, between(0, 512)] = 0
    """Where all texts of a pass have no more tokens, they attend in tiles with a mask, in graphs of their own. 0:
    never, since what it is to save on short texts has not been measured."""
    compile: Switch = False
    """Fuse what lies between matrix products (torch.compile). Off: it needs minutes at a first start, and what it
    brings has not been measured."""

    def settings(self, rows_max: int) -> CudaSettings:
        """For the backend; ``rows_max`` is the most texts of a batch."""
        return CudaSettings(
            graphs=GraphSettings(
                enabled=self.graphs,
                growth=1 / (1 - self.graph_padding),
                tokens_max=self.max_graph_tokens,
                rows_max=rows_max,
                before_ready=not self.ready_before_graphs,
            ),
            tiles_length_max=self.max_tile_tokens,
            compiled=self.compile,
        )
