"""Calls of the compiled forward pass. Python's lock is free for the whole of each.

Decides what crosses the border, and that nothing of another shape does. The structures here and in ``encoder.cpp`` are
the same, field by field. Must never know a checkpoint or a batch's riders.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedserve.model.backend import DeviceOutOfMemory
from embedserve.model.native.compiler import CannotCompile

__all__ = ["ACTIVATIONS", "NativeEncoder", "Plan"]

ACTIVATIONS = {"gelu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "relu": 2, "silu": 3, "swish": 3}
"""transformers' names for what ``encoder.cpp`` computes, and its numbers for them."""
MESSAGE_BYTES = 512
NO_MEMORY = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """A model's shape and weights, as ``encoder.cpp`` takes them."""

    hidden: int
    heads: int
    intermediate: int
    activation: int
    eps: float
    dtype: torch.dtype
    """``bfloat16`` or ``float32``."""
    words: Tensor
    """``[vocabulary, hidden]`` in ``dtype``."""
    positions: Tensor
    """``[positions, hidden]`` in float32, the first token type's embedding added."""
    norm: tuple[Tensor, Tensor]
    """Weight and bias after the embeddings, float32 ``[hidden]``, as all norms and biases."""
    layers: tuple[tuple[Tensor, ...], ...]
    """Of each layer: weight and bias of queries, keys and values together, of the projection, of the norm, of the wide
    and the narrow linear, of the norm. Linear weights are ``[outputs, inputs]`` in ``dtype``."""

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of ``EncoderOf``'s constructor."""
        return [self.words, self.positions, *self.norm, *(tensor for layer in self.layers for tensor in layer)]


class _Shape(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("layers", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
    )


class _Pass(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("pooling", ctypes.c_void_p),
        ("modes", ctypes.c_int64),
        ("normalize", ctypes.c_void_p),
        ("vectors", ctypes.c_void_p),
        ("lanes", ctypes.c_int64),
    )


class NativeEncoder:
    """One model's weights, laid out for the compiled pass, and the threads that run it. Any thread may call it."""

    def __init__(self, library: Path, plan: Plan, lanes: int, nice: int = 0) -> None:
        """Load ``library``, copy the weights and start ``lanes`` threads, ``nice`` (2) to others.

        Raises ``CannotCompile`` where the library or the weights cannot be used.
        """
        self._handle: int | None = None
        try:
            self._library: Any = ctypes.CDLL(str(library))
            entries = [getattr(self._library, f"embedserve_{name}") for name in ("create", "run", "destroy")]
        except (OSError, AttributeError) as error:
            raise CannotCompile(f"{library} cannot be loaded: {error}") from error
        create, self._run, self._destroy = entries
        create.argtypes = [
            ctypes.POINTER(_Shape),
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_char_p,
            ctypes.c_int64,
        ]
        self._run.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Pass), ctypes.c_char_p, ctypes.c_int64]
        self._destroy.argtypes = [ctypes.c_void_p]
        self._destroy.restype = None
        self._hidden = plan.hidden
        self._lanes = lanes
        given = [tensor.contiguous() for tensor in plan.tensors()]
        # The tables, norms and biases are read where they lie; linear weights are copied into panels.
        self._kept = [*given[:2], *(tensor for tensor in given if tensor.dim() == 1)]
        pointers = (ctypes.c_void_p * len(given))(*(tensor.data_ptr() for tensor in given))
        head = plan.hidden // plan.heads
        shape = _Shape(
            plan.hidden, plan.heads, plan.intermediate, len(plan.layers), plan.activation, head**-0.5, plan.eps
        )
        made, message = ctypes.c_void_p(), ctypes.create_string_buffer(MESSAGE_BYTES)
        code = create(
            ctypes.byref(shape), pointers, lanes, nice, plan.dtype is torch.bfloat16, ctypes.byref(made),
            message, MESSAGE_BYTES,
        )  # fmt: skip
        if code != 0:
            raise CannotCompile(f"the compiled pass refused the weights: {_told(code, message)}")
        self._handle = made.value

    def run(
        self,
        ids: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int32],
        *,
        positions: npt.NDArray[np.int32] | None = None,
        pooling: npt.NDArray[np.float32] | None = None,
        normalize: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Pooled vectors ``[rows, modes * hidden]`` of rows that lie end to end.

        ``ids`` and ``positions`` are ``[tokens]``, ``offsets`` is ``[rows + 1]``; ``pooling`` is ``[modes, tokens]``,
        what each token counts in each mode; ``normalize`` is ``[rows]``, whose vectors are scaled to unit length.
        Without ``positions`` each row counts from 0, without ``pooling`` its vector is the mean of its tokens, without
        ``normalize`` none is scaled. Every id and position must be inside its table: nobody checks it after this.
        Raises ``DeviceOutOfMemory``, or ``RuntimeError`` with what the machine code says.
        """
        modes = 1 if pooling is None else pooling.shape[0]
        rows = offsets.size - 1
        assert ids.size == offsets[-1], "the offsets span the ids"
        assert positions is None or positions.size == ids.size, "one position for each token"
        assert pooling is None or pooling.shape[1] == ids.size, "one weight for each token"
        assert normalize is None or normalize.size == rows, "one word for each row"
        # Held until the pass is over: those that had to be copied are nobody else's.
        held = (
            np.ascontiguousarray(ids, np.int32),
            None if positions is None else np.ascontiguousarray(positions, np.int32),
            np.ascontiguousarray(offsets, np.int32),
            None if pooling is None else np.ascontiguousarray(pooling, np.float32),
            None if normalize is None else np.ascontiguousarray(normalize, np.bool_),
        )
        places = [None if array is None else array.ctypes.data for array in held]
        vectors = np.empty((rows, modes * self._hidden), np.float32)
        given = _Pass(rows, *places[:4], modes, places[4], vectors.ctypes.data, self._lanes)
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        code = self._run(self._handle, ctypes.byref(given), message, MESSAGE_BYTES)
        if code == NO_MEMORY:
            raise DeviceOutOfMemory("the compiled pass found no memory")
        if code != 0:
            raise RuntimeError(f"the compiled pass failed: {_told(code, message)}")
        return vectors

    def __del__(self) -> None:
        """End the threads and give the memory back; who could call has gone."""
        if self._handle is not None:
            self._destroy(self._handle)


def _told(code: int, message: Any) -> str:
    return "there is no memory" if code == NO_MEMORY else str(message.value.decode(errors="replace"))
