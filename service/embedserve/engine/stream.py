"""One stream: windows of a large request, fed as its reader takes results.

Decides how much of a stream is in flight: admitted items and finished ones that nobody has taken yet are bounded
together, so that a reader that stalls stops its own work and keeps a bounded number of rows alive. Must never know a
transport.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence

import numpy as np

from embedserve.engine.call import Call, Portion, Refused
from embedserve.engine.driver import Driver
from embedserve.engine.intake import Intake
from embedserve.engine.pending import Portions
from embedserve.errors import EmbedServeError, EngineFailed, InvalidRequest
from embedserve.scheduling.item import Rejection

__all__ = ["Window", "piece_items", "stream_portions"]

PIECES_PER_WINDOW = 4
"""A window is fed in so many pieces: results begin to flow when the first piece is done, not the whole window."""
WINDOW_PASSES = 4
"""Full passes that a window holds at most: one runs, one is closed, one waits while a piece for another is tokenised.
Admission counts what waits: 512 texts of 232 tokens were 3 s of work, and one stream had everybody else refused."""
MEAN_WEIGHT = 0.3
"""Of the last piece, in how long a stream's texts are."""


def piece_items(window: int) -> int:
    """Items that a stream with a window of so many submits at a time, at most."""
    return max(1, window // PIECES_PER_WINDOW)


class Window:
    """How much of one stream is admitted at a time: by number, and by tokens as its texts have been so far."""

    def __init__(self, call: Call, intake: Intake, items: int) -> None:
        """``items`` is ``server.stream_window_items``."""
        self._intake = intake
        self._items = items
        first = min(piece_items(items), call.count)
        self._mean = max(intake.estimate(call, first) / first, 1.0)

    def saw(self, items: int, tokens: int) -> None:
        """So many of its texts had so many tokens."""
        self._mean += MEAN_WEIGHT * (max(tokens / items, 1.0) - self._mean)

    @property
    def piece(self) -> int:
        """Texts of the next piece: no more than fill a pass. The first piece is judged like any request."""
        return min(piece_items(self._items), self._of_a_pass)

    @property
    def limit(self) -> int:
        """Texts that are admitted and not yet taken."""
        return min(self._items, WINDOW_PASSES * self._of_a_pass)

    @property
    def _of_a_pass(self) -> int:
        return max(int(self._intake.pass_tokens / self._mean), 1)


class _Stream:
    """The state that the feeder and the reader share."""

    def __init__(self, call: Call, intake: Intake, driver: Driver, window: Window) -> None:
        self.call = call
        self.intake = intake
        self.driver = driver
        self.window = window
        self.outbox: deque[Portion] = deque()
        self.unsettled: list[Portions] = []
        self.outstanding = 0
        """Items that are submitted, or finished and not yet taken."""
        self.wake_reader = asyncio.Event()
        self.wake_feeder = asyncio.Event()
        self.error: EmbedServeError | None = None

    def post(self, portion: Portion) -> None:
        self.outbox.append(portion)
        self.wake_reader.set()

    def taken(self, portion: Portion) -> None:
        self.outstanding -= len(portion.indexes) + len(portion.refused)
        self.wake_feeder.set()

    async def feed(self) -> None:
        """Submit piece after piece while the window has room."""
        flow = self.intake.new_flow()
        first = 0
        while first < self.call.count:
            indexes = range(first, min(first + self.window.piece, self.call.count))
            while self.outstanding + len(indexes) > max(self.window.limit, len(indexes)):
                self.wake_feeder.clear()
                await self.wake_feeder.wait()
            self.outstanding += len(indexes)
            await self._submit(indexes, flow, continuation=first > 0)
            first = indexes.stop

    async def _submit(self, indexes: range, flow: int, *, continuation: bool) -> None:
        call, stages = self.call, self.call.stages
        tokenized = await self.intake.tokenize(call, indexes.start, indexes.stop)
        stages.tokenized_ns = time.monotonic_ns()
        self.window.saw(len(indexes), len(tokenized.ids))
        over = self.intake.unusable(call, tokenized.lengths.tolist())
        ids, lengths, truncated = tokenized.ids, tokenized.lengths, tokenized.truncated
        kept: Sequence[int] = indexes
        if over:
            self.post(Portion(refused=[self._refusal(indexes[i], int(lengths[i])) for i in over]))
            good = np.ones(len(lengths), dtype=np.bool_)
            good[over] = False
            ids = ids[np.repeat(good, lengths)]
            lengths, truncated = lengths[good], truncated[good]
            kept = [indexes[i] for i in np.flatnonzero(good)]
            if not kept:
                return
        stages.tokens += len(ids)
        submission = self.intake.submission(call, lengths.tolist(), flow, continuation=continuation)
        pending = Portions(submission, call, ids, truncated, self.intake.skip(tokenized), kept, self)
        while (rejection := self.driver.submit(pending)) is not None:
            await self._wait_for_room(rejection, continuation=continuation)
        self.unsettled = [p for p in self.unsettled if p.remaining]
        self.unsettled.append(pending)

    async def _wait_for_room(self, rejection: Rejection, *, continuation: bool) -> None:
        """A stream that was admitted waits when the queue is full; a new one is refused."""
        if not continuation or rejection.retry_after_ms is None or rejection.policy == "draining":
            self.intake.refuse(rejection, "exact")
        await self.driver.change()

    def _refusal(self, index: int, length: int) -> Refused:
        return Refused(index, InvalidRequest([self.intake.violation(index, length)]))

    def fed(self, feeder: asyncio.Task[None]) -> None:
        """The feeder has ended, well or not."""
        if not feeder.cancelled():
            feeder.exception()  # marks it as seen: a reader that is told of a broken engine first does not ask
        self.wake_reader.set()

    def break_off(self) -> None:
        """Nothing more will run."""
        self.end(EngineFailed("the engine failed while this stream was in flight"))

    def end(self, error: EmbedServeError) -> None:
        """The stream as a whole is over, whatever is left of it."""
        self.error = self.error or error
        self.wake_reader.set()

    def cancel(self) -> None:
        for pending in self.unsettled:
            self.driver.cancel(pending)


async def stream_portions(call: Call, intake: Intake, driver: Driver, window: Window) -> AsyncGenerator[Portion, None]:
    """Yield each portion as its batch finishes, until every item of the call has had its portion."""
    stream = _Stream(call, intake, driver, window)
    feeder = asyncio.get_running_loop().create_task(stream.feed())
    feeder.add_done_callback(stream.fed)
    left = call.count
    driver.streams.add(stream.break_off)
    try:
        while left:
            if stream.error is not None:
                raise stream.error
            while stream.outbox and stream.error is None:
                portion = stream.outbox.popleft()
                left -= len(portion.indexes) + len(portion.refused)
                yield portion
                stream.taken(portion)
            if feeder.done() and (error := feeder.exception()) is not None:
                raise error
            if left and not stream.outbox and stream.error is None:
                stream.wake_reader.clear()
                await stream.wake_reader.wait()
    finally:
        driver.streams.discard(stream.break_off)
        feeder.cancel()
        stream.cancel()
