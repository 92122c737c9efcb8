"""What the engine asks of a model: tokens in, vectors out, on one device.

Decides the shapes that cross the border between engine and model. Must never know requests, deadlines, queues or gRPC:
a backend sees a batch of token ids and the row count, nothing about who asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = [
    "Backend",
    "BackendFactory",
    "BatchResult",
    "DeviceLost",
    "DeviceOutOfMemory",
    "DeviceReport",
    "GraphReport",
    "ModelIdentity",
    "PassTimes",
    "TokenBatch",
    "WarmPass",
]


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What a client may pin, and what every answer says of the model behind it."""

    name: str
    """As clients name it, such as ``sentence-transformers/all-MiniLM-L6-v2``."""
    revision: str
    """Commit or package version where one is known, otherwise the first 12 hex digits of the weights digest."""
    weights_digest: str
    """``sha256:`` and 64 hex digits over the weight files."""
    tokenizer_digest: str
    """``sha256:`` and 64 hex digits over ``tokenizer.json`` as loaded."""
    architecture: str
    """``config.json``'s ``model_type``, such as ``bert``."""
    dimension: int
    """Floats in one vector before any ``dimensions`` option."""
    max_input_length: int
    """Tokens in one text, special tokens included."""
    pooling: str
    """``mean``, ``cls``, ``last_token``, ``max``, ``mean_sqrt_len``, ``weighted_mean``; several are joined by ``+``."""
    normalize: bool
    """Whether the checkpoint's own ``modules.json`` ends in a Normalize module."""
    dtype: str
    """Of the weights in the forward pass: ``float32``, ``bfloat16`` or ``float16``."""
    device: str
    """Such as ``cpu`` or ``cuda:0``."""
    prompts: tuple[tuple[str, str], ...] = ()
    """Name and text of every prompt, in the checkpoint's order."""
    default_prompt_name: str | None = None
    vocab_size: int = 0
    """Token ids from a client must be below this."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One forward pass. Row ``r`` is ``ids[offsets[r]:offsets[r + 1]]``."""

    ids: npt.NDArray[np.int32]
    """Shape ``[tokens]``: all rows end to end, no padding."""
    offsets: npt.NDArray[np.int32]
    """Shape ``[rows + 1]``, first 0, last ``tokens``."""
    normalize: npt.NDArray[np.bool_]
    """Shape ``[rows]``: rows to scale to unit length on the device."""
    pad_to: int | None
    """Bucket edge that rows are padded to; ``None`` asks for the packed form."""
    skip: npt.NDArray[np.int32] | None = None
    """Shape ``[rows]``: leading tokens that pooling leaves out (a prompt, where ``include_prompt`` is false)."""

    def rows(self, chosen: npt.NDArray[np.int64]) -> TokenBatch:
        """The batch of the ``chosen`` rows alone, in their order."""
        starts, ends = self.offsets[chosen], self.offsets[chosen + 1]
        offsets = np.zeros(chosen.size + 1, np.int32)
        np.cumsum(ends - starts, out=offsets[1:])
        ids = [self.ids[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        return TokenBatch(
            np.concatenate(ids),
            offsets,
            self.normalize[chosen],
            self.pad_to,
            None if self.skip is None else self.skip[chosen],
        )


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Monotonic nanoseconds (``time.monotonic_ns``) at the borders of a pass's stages; each at least the one before."""

    start_ns: int
    assembled_ns: int
    copied_in_ns: int
    forward_ns: int
    pooled_ns: int
    copied_out_ns: int


@dataclass(frozen=True, slots=True)
class WarmPass:
    """What one pass cost when nothing was being made ready any more: where the cost model begins."""

    tokens: int
    padded_tokens: int
    """Tokens that were computed; ``tokens`` where nothing is padded."""
    elapsed_ns: int


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The vectors of one pass."""

    vectors: npt.NDArray[np.float32]
    """Shape ``[rows, dimension]``, C-contiguous, owned by the receiver (never reused by the backend)."""
    times: PassTimes


@dataclass(frozen=True, slots=True)
class GraphReport:
    """CUDA graphs: what there are, what they cost, and how many passes found one. All 0 where there are none."""

    planned: int = 0
    captured: int = 0
    capture_s: float = 0.0
    """How long their capture took, all together."""
    memory_bytes: int = 0
    """Device memory that they share."""
    hits: int = 0
    """Passes that replayed one."""
    misses: int = 0
    """Passes that no graph fitted."""
    failure: str = ""
    """Why some are missing for good, in a sentence; empty where none is."""


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What the device looks like now; sizes in bytes, 0 where unknown."""

    device: str
    memory_used_bytes: int
    memory_total_bytes: int
    compiled: bool
    """Whether passes run through a compiled model."""
    packed: bool
    """Whether ``TokenBatch.pad_to=None`` is honoured without padding."""
    compile_s: float = 0.0
    """How long the compiled model took to make, or the attempt that failed; 0 where none has ended."""
    compile_cached: bool = False
    """Whether the compiled code was there already."""
    compiling: bool = False
    """Whether a compiled model is being made: how it went will show in a later report."""
    compile_failure: str = ""
    """Why there is no compiled model, in a sentence; empty where there is one, or none was asked for, or not yet."""
    batch_tokens_max: int = 0
    """Tokens of the largest pass that fitted the device's memory at warm-up; 0 where that was not tried."""
    graphs: GraphReport = field(default_factory=GraphReport)


class DeviceOutOfMemory(Exception):
    """The pass did not fit; nothing was computed and the backend is still good."""


class DeviceLost(Exception):
    """The device or its context is unusable; nothing more can run in this process."""


class Backend(Protocol):
    """A loaded model on one device.

    ``embed`` is called by as many threads at once as ``passes_at_once`` says; every other method by one at a time,
    maybe beside passes.
    """

    @property
    def identity(self) -> ModelIdentity:
        """Who this is; complete once the constructor has returned."""

    @property
    def passes_at_once(self) -> int:
        """Passes that may be in ``embed`` together, so that the next one begins where one leaves cores or copies idle.

        They share the device: what one takes is counted from the end of the one before it. May grow, never shrinks.
        """

    def warm_up(self, max_batch_tokens: int) -> Sequence[WarmPass]:
        """Run passes of the sizes that serving will use and check their shape and finiteness.

        Raises ``StartupError`` with a sentence when a pass fails or gives a wrong shape or a value that is not finite.
        """

    def embed(self, batch: TokenBatch) -> BatchResult:
        """One pass: assemble, copy in, forward, pool (with Dense, Normalize), copy out.

        Rows that are not finite are returned as they are: the caller checks. Raises ``DeviceOutOfMemory`` when the pass
        did not fit, ``DeviceLost`` when the device is gone, and anything else where an item may have caused it.
        """

    def release_memory(self) -> None:
        """Give cached device memory back; called after ``DeviceOutOfMemory``, never on the hot path."""

    def report(self) -> DeviceReport:
        """The device's state, cheaply."""


BackendFactory = Callable[[], Backend]
"""Called in the worker thread, which then owns the backend. Raises ``StartupError``."""
