"""The buffers of one pass: its integers on the host and on the device, its vectors on the device and on the host.

Decides their sizes. There are as many slots as passes at once, so that the next batch is written and copied in while
the device computes this one. Must never know a model or a stream.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedserve.model.cuda.accelerator import Accelerator

__all__ = ["Slot"]


class Slot:
    """Used by one pass at a time."""

    def __init__(self, accelerator: Accelerator, dimension: int) -> None:
        """Empty: ``reserve`` makes room."""
        self._accelerator = accelerator
        self._dimension = dimension
        self._reserve_inputs(0)
        self._reserve_vectors(0)

    def reserve(self, inputs: int, rows: int) -> None:
        """Room for so many integers and rows. Costs nothing where there is; otherwise the slot must not be in use."""
        if inputs > self.host_inputs.shape[0]:
            self._reserve_inputs(inputs)
        if rows > self.host_vectors.shape[0]:
            self._reserve_vectors(rows)

    def written(self) -> npt.NDArray[np.int32]:
        """The integers on the host, as numpy sees them."""
        array: npt.NDArray[Any] = self.host_inputs.numpy()
        return array

    def _reserve_inputs(self, count: int) -> None:
        with torch.inference_mode():
            self.host_inputs: Tensor = self._accelerator.host_memory((count,), torch.int32)
            self.device_inputs: Tensor = torch.zeros(count, dtype=torch.int32, device=self._accelerator.device)

    def _reserve_vectors(self, rows: int) -> None:
        shape = rows, self._dimension
        with torch.inference_mode():
            self.device_vectors: Tensor = torch.zeros(shape, dtype=torch.float32, device=self._accelerator.device)
            self.host_vectors: Tensor = self._accelerator.host_memory(shape, torch.float32)
