"""Submissions that wait for their rows, and how rows come back to them.

Decides how a batch's buffer becomes one caller's vectors, and that each submission ends exactly once. Must never know
the event loop's driver, policies or transports.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from embedserve.engine.call import Call, Embedded, Portion, Refused
from embedserve.engine.stages import Ride
from embedserve.errors import (
    DeadlineExpired,
    EmbedServeError,
    EngineFailed,
    InvariantBroken,
    ItemFailed,
    ItemTooLarge,
    NonFiniteOutput,
)
from embedserve.scheduling.item import Settled, Submission, Verdict

__all__ = ["Pending", "Portions", "Probe", "WholeRequest", "error_of"]

_ERRORS: Final[dict[Verdict, Callable[[str], EmbedServeError]]] = {
    Verdict.EXPIRED: lambda where: DeadlineExpired(f"the deadline passed before {where} could be run"),
    Verdict.CANCELLED: lambda where: InvariantBroken(f"{where} was cancelled, yet somebody waits for it"),
    Verdict.ITEM_ERROR: lambda where: ItemFailed(f"{where} makes the model fail, alone"),
    Verdict.NON_FINITE: lambda where: NonFiniteOutput(f"{where} gives values that are not finite, also alone"),
    Verdict.OUT_OF_MEMORY: lambda where: ItemTooLarge(f"{where} alone does not fit the device's memory"),
    Verdict.ENGINE_FAILED: lambda where: EngineFailed(f"the worker ended while {where} was in flight"),
}


def error_of(verdict: Verdict, index: int) -> EmbedServeError:
    """The error that an item's verdict means to its caller."""
    return _ERRORS[verdict](f"texts[{index}]")


def finish(vectors: npt.NDArray[np.float32], call: Call) -> npt.NDArray[np.float32]:
    """Keep ``dimensions`` leading components, then scale to unit length where asked: the cut comes first, as in TEI."""
    if call.dimensions is None or call.dimensions >= vectors.shape[1]:
        return vectors
    cut = np.ascontiguousarray(vectors[:, : call.dimensions])
    if call.normalize:
        norms = np.sqrt(np.einsum("ij,ij->i", cut, cut, dtype=np.float32))
        cut /= np.maximum(norms, np.float32(1e-12))[:, None]
    return cut


class Pending:
    """Items of one submission that wait or run."""

    probe = False
    """The engine's own, to see whether all is well: it moves no figure of the callers'."""

    def __init__(
        self,
        submission: Submission,
        call: Call,
        ids: npt.NDArray[np.int32],
        truncated: npt.NDArray[np.bool_],
        skip: int,
    ) -> None:
        """``ids`` holds the token ids of all items end to end; lengths are the submission's."""
        self.submission = submission
        self.call = call
        self.ids = ids
        self.lengths = submission.tokens
        # The ufunc's own method: np.cumsum does the same behind two Python calls, 3.4 us instead of 1.5 for 32 texts.
        self.offsets: npt.NDArray[np.int64] = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.add.accumulate(self.lengths, out=self.offsets[1:])
        self.truncated = truncated
        self.skip = skip
        self.remaining = len(self.lengths)
        self.queued_ns = 0

    @property
    def normalize_on_device(self) -> bool:
        """Whether the device scales the whole vector; a vector that is cut must be scaled after the cut."""
        return self.call.normalize and self.call.dimensions is None

    def deliver(self, settled: Settled, vectors: npt.NDArray[np.float32], ride: Ride) -> None:
        """Rows of one batch are here. ``vectors`` is the whole batch's buffer."""
        raise NotImplementedError  # pragma: no cover - abstract

    def fail(self, settled: Settled) -> bool:
        """Items ended without a vector. Returns whether the rest of the submission is of no use any more."""
        raise NotImplementedError  # pragma: no cover - abstract

    def expire(self) -> bool:
        """The deadline has passed while items run: tell the caller. Returns whether the submission is over."""
        raise NotImplementedError  # pragma: no cover - abstract

    def abort(self, error: EmbedServeError) -> None:
        """Nothing more will run. A stream is told as a whole, not by its windows."""


class WholeRequest(Pending):
    """A unary request: all rows, or the first error."""

    def __init__(
        self,
        submission: Submission,
        call: Call,
        ids: npt.NDArray[np.int32],
        truncated: npt.NDArray[np.bool_],
        skip: int,
        future: asyncio.Future[Embedded],
    ) -> None:
        """``future`` gets the answer or an exception; it is never cancelled from here."""
        super().__init__(submission, call, ids, truncated, skip)
        self.future = future
        self._vectors: npt.NDArray[np.float32] | None = None
        self._batch_sizes: list[int] | None = None

    def deliver(self, settled: Settled, vectors: npt.NDArray[np.float32], ride: Ride) -> None:
        """Keep the rows; the last of them settles the future."""
        call, count = self.call, len(self.lengths)
        call.stages.rides.append(ride)
        rows = settled.rows
        if len(rows) == count and rows == tuple(range(rows[0], rows[0] + count)):
            # The common case, one batch: a view, unless it would keep a much larger buffer alive.
            whole = vectors[rows[0] : rows[-1] + 1]
            if count * 2 < len(vectors):
                whole = whole.copy()
            self._settle(whole, [ride.batch_rows] * count)
            return
        if self._vectors is None:
            self._vectors = np.empty((count, vectors.shape[1]), dtype=np.float32)
            self._batch_sizes = [0] * count
        assert self._batch_sizes is not None
        self._vectors[list(settled.indexes)] = vectors[list(rows)]
        for index in settled.indexes:
            self._batch_sizes[index] = ride.batch_rows
        self.remaining -= len(rows)
        if self.remaining == 0:
            self._settle(self._vectors, self._batch_sizes)

    def fail(self, settled: Settled) -> bool:
        """The first item that fails fails the request: it is all or nothing."""
        self.remaining -= len(settled.indexes)
        if not self.future.done():
            self.future.set_exception(error_of(settled.verdict, settled.indexes[0]))
        return True

    def expire(self) -> bool:
        """Nobody waits for the rest."""
        if not self.future.done():
            self.future.set_exception(DeadlineExpired("the deadline passed while the device was at work"))
        return True

    def abort(self, error: EmbedServeError) -> None:
        """Tell the caller."""
        if not self.future.done():
            self.future.set_exception(error)

    def _settle(self, vectors: npt.NDArray[np.float32], batch_sizes: Sequence[int]) -> None:
        self.remaining = 0
        if self.future.done():  # the caller has gone
            return
        self.future.set_result(
            Embedded(
                vectors=finish(vectors, self.call),
                token_counts=self.lengths,
                truncated=self.truncated.tolist(),
                batch_sizes=batch_sizes,
                tokens=len(self.ids),
                batches=len(self.call.stages.rides),
            )
        )


class Probe(WholeRequest):
    """The engine's own text."""

    probe = True


class Reader(Protocol):
    """Who takes a stream's portions. Neither method blocks."""

    def post(self, portion: Portion) -> None:
        """Rows, or texts that failed."""

    def end(self, error: EmbedServeError) -> None:
        """The stream as a whole has failed."""


class Portions(Pending):
    """One window of a stream: each batch's rows go out at once."""

    def __init__(
        self,
        submission: Submission,
        call: Call,
        ids: npt.NDArray[np.int32],
        truncated: npt.NDArray[np.bool_],
        skip: int,
        indexes: Sequence[int],
        reader: Reader,
    ) -> None:
        """``indexes`` are the items' places in the whole request."""
        super().__init__(submission, call, ids, truncated, skip)
        self._indexes = indexes
        self._reader = reader

    def deliver(self, settled: Settled, vectors: npt.NDArray[np.float32], ride: Ride) -> None:
        """Copy the rows out, so that a stalled reader keeps its own rows alive and no batch's buffer."""
        self.call.stages.rides.append(ride)
        self.remaining -= len(settled.rows)
        chosen = list(settled.indexes)
        rows = vectors[list(settled.rows)]
        self._reader.post(
            Portion(
                indexes=[self._indexes[i] for i in chosen],
                vectors=finish(rows, self.call),
                token_counts=[self.lengths[i] for i in chosen],
                truncated=self.truncated[chosen].tolist(),
                batch_size=ride.batch_rows,
            )
        )

    def fail(self, settled: Settled) -> bool:
        """Each item fails alone; the others go on. The deadline is everybody's."""
        self.remaining -= len(settled.indexes)
        if settled.verdict is Verdict.EXPIRED:
            return self.expire()
        refused = [Refused(self._indexes[i], error_of(settled.verdict, self._indexes[i])) for i in settled.indexes]
        self._reader.post(Portion(refused=refused))
        return False

    def expire(self) -> bool:
        """The whole stream is too late."""
        self._reader.end(DeadlineExpired("the deadline passed before the stream had ended"))
        return True
