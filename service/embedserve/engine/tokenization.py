"""A bounded pool of tokenizer threads.

Decides how many threads tokenise, how much may wait for them, and which requests are so short that handing them to a
thread would cost more than tokenising them. Must never know policies, batches or transports. The Rust tokenizer
releases the GIL and is not thread-safe, so each thread owns a clone.

The threads are our own, over one queue: a hand-over through ``ThreadPoolExecutor`` and ``wrap_future`` costs the event
loop 26 to 53 us, one through ``SimpleQueue`` and ``call_soon_threadsafe`` 15 to 17.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from embedserve.engine.wall import post, settle
from embedserve.errors import DeadlineExpired, EmbedServeError, EngineFailed, Overloaded
from embedserve.model.tokenizer import TextTokenizer, TokenizedTexts, Truncation

__all__ = ["Meter", "TokenizerPool", "TokenizerSettings", "TokenizerUse"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """Limits of the pool; defaults are ``config.py``'s."""

    threads: int
    max_pending: int
    """Requests that wait for a thread; one more is refused."""
    inline_chars: int
    """Requests with at most so many characters are tokenised on the event loop: a hand-over costs about 100 us, 256
    characters about as much."""
    chunk_texts: int
    """Texts of one request that a thread takes at a time, so that a large request leaves room for small ones."""
    chunk_chars: int = 32768
    """Characters of one request that a thread takes at a time, or one text."""
    max_request_ns: int = 30_000_000_000
    """Processor time of the threads for one request; by wall time a busy or a stopped machine would refuse callers."""
    nice: int = 0
    """By how much the threads' priority is under the event loop's once ``yield_to_the_loop`` is called."""


class Meter:
    """What one request has used of the tokenizer, over all its pieces."""

    __slots__ = ("spent_ns",)

    def __init__(self) -> None:
        self.spent_ns = 0


class TokenizerUse(NamedTuple):
    """How busy the threads of a pool are."""

    threads: int
    busy: int
    waiting: int
    """Requests that wait for a thread."""

    @property
    def pending(self) -> int:
        """Requests that wait for a thread or are in one."""
        return self.busy + self.waiting


class _Done(NamedTuple):
    """What a thread gives back."""

    begun_ns: int
    ended_ns: int
    worked_ns: int
    """Processor time."""
    result: Any


class _Job(NamedTuple):
    """Work for a thread, and who waits for it."""

    work: Callable[[TextTokenizer], Any]
    done: asyncio.Future[_Done]
    deadline_ns: int | None


class TokenizerPool:
    """Tokenises texts off the event loop. Used from one event loop only."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        settings: TokenizerSettings,
        on_tokenized: Callable[[int, int, int, int], None],
        on_death: Callable[[BaseException], None] = lambda _death: None,
        *,
        work_clock: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        """``on_tokenized(texts, tokens, waited_ns, elapsed_ns)`` is called on the event loop for each piece of work.

        ``on_death`` is called there once a thread has ended of itself: nothing more may be expected of this pool then.
        ``work_clock`` reads the processor time of the thread that calls it.
        """
        self._inline = tokenizer
        self._settings = settings
        self._on_tokenized = on_tokenized
        self._on_death = on_death
        self._work_clock = work_clock
        self._waiting: set[asyncio.Future[Any]] = set()
        self._failure: EmbedServeError | None = None
        self._pending = 0
        self._closed = False
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, args=(tokenizer.clone(),), name=f"embedserve-tokenizer_{n}", daemon=True)
            for n in range(settings.threads)
        ]
        for thread in self._threads:
            thread.start()

    def yield_to_the_loop(self) -> None:
        """Lower the threads' priority by ``nice``: whoever computes passes does so too.

        Above it a piece of a bulk job takes a core for milliseconds from a pass that an interactive call rides in.
        """
        if sys.platform != "linux":  # elsewhere it is the whole process whose priority is set
            return
        for thread in self._threads:
            if thread.native_id is not None and thread.is_alive():
                with contextlib.suppress(OSError):  # where it may not be, it stays as it is; or it ends just now
                    now = os.getpriority(os.PRIO_PROCESS, thread.native_id)
                    os.setpriority(os.PRIO_PROCESS, thread.native_id, now + self._settings.nice)

    @property
    def use(self) -> TokenizerUse:
        """How busy the threads are now."""
        busy = min(self._pending, self._settings.threads)  # none is idle while somebody waits
        return TokenizerUse(self._settings.threads, busy, self._pending - busy)

    async def encode(
        self,
        texts: Sequence[str],
        chars: int,
        *,
        truncation: Truncation,
        prompt: str = "",
        deadline_ns: int | None = None,
        meter: Meter | None = None,
    ) -> TokenizedTexts:
        """Token ids of ``texts``, which hold ``chars`` characters in all.

        Raises ``Overloaded`` when ``max_pending`` requests are waiting already or ``meter`` is over ``max_request_ns``,
        ``DeadlineExpired`` when ``deadline_ns`` comes before a piece was begun.
        """
        chars += len(prompt) * len(texts)
        if chars <= self._settings.inline_chars:
            begun = time.monotonic_ns()
            result = self._inline.encode(texts, truncation=truncation, prompt=prompt)
            self._on_tokenized(len(texts), len(result.ids), 0, time.monotonic_ns() - begun)
            return result
        meter = meter or Meter()
        pieces = [
            await self._in_thread(
                len(part),
                lambda t, part=part: t.encode(part, truncation=truncation, prompt=prompt),  # type: ignore[misc]
                lambda r: len(r.ids),
                deadline_ns,
                meter,
            )
            for part in self._parts(texts, chars, len(prompt))
        ]
        if len(pieces) == 1:
            only: TokenizedTexts = pieces[0]
            return only
        return TokenizedTexts(
            ids=np.concatenate([piece.ids for piece in pieces]),
            lengths=np.concatenate([piece.lengths for piece in pieces]),
            truncated=np.concatenate([piece.truncated for piece in pieces]),
            prompt_tokens=pieces[0].prompt_tokens,
        )

    async def count(self, texts: Sequence[str], *, prompt: str = "") -> npt.NDArray[np.int32]:
        """Full token counts, shape ``[n]``. Raises ``Overloaded`` as ``encode`` does.

        A count needs every character, so that a long text is taken in pieces too, where its tokenizer allows.
        """
        meter = Meter()
        most = self._settings.chunk_chars
        pieces: list[str] = []
        owners: list[int] = []
        for index, text in enumerate(texts):
            whole = prompt + text
            of_text = [whole] if len(whole) <= most else self._inline.pieces(whole, most)
            pieces += of_text
            owners += [index] * len(of_text)
        counts = [
            await self._in_thread(
                len(part),
                lambda t, part=part: t.count(part),  # type: ignore[misc]
                lambda r: int(r.sum()),
                None,
                meter,
            )
            for part in self._parts(pieces, sum(map(len, pieces)), 0)
        ]
        totals = np.bincount(owners, np.concatenate(counts), minlength=len(texts)).astype(np.int32)
        if len(pieces) > len(texts):
            totals -= ((np.bincount(owners) - 1) * self._inline.special_tokens).astype(np.int32)
        return totals

    async def probe(self, text: str) -> TokenizedTexts:
        """Token ids of one text from a thread, past the limit and past every figure: to see whether one answers."""
        done = await self._hand_over(lambda t: t.encode([text], truncation=Truncation.END), None)
        tokenized: TokenizedTexts = done.result
        return tokenized

    def fail(self, error: EmbedServeError) -> None:
        """Everybody who waits, and who comes from now on, is told ``error``."""
        self._failure = error
        for done in tuple(self._waiting):
            _fail(done, error)

    def _parts(self, texts: Sequence[str], chars: int, prompt_chars: int) -> Iterator[Sequence[str]]:
        """``texts`` in pieces of at most ``chunk_texts`` and ``chunk_chars``, or of one text."""
        step, most = self._settings.chunk_texts, self._settings.chunk_chars
        if len(texts) <= step and chars <= most:
            yield texts
            return
        first = held = 0
        for place, text in enumerate(texts):
            size = len(text) + prompt_chars
            if place > first and (place - first >= step or held + size > most):
                yield texts[first:place]
                first, held = place, 0
            held += size
        yield texts[first:]

    async def _in_thread(
        self,
        texts: int,
        work: Callable[[TextTokenizer], _T],
        tokens: Callable[[_T], int],
        deadline_ns: int | None,
        meter: Meter,
    ) -> _T:
        if self._pending >= self._settings.max_pending:
            raise Overloaded(
                f"{self._pending} requests wait for a tokenizer thread (tokenizer.max_pending)",
                reason="TOKENIZER_QUEUE_FULL",
                policy="tokenizer",
                retry_after_ms=50,
                figures={"pending": float(self._pending)},
            )
        if meter.spent_ns >= self._settings.max_request_ns:
            # Not INVALID_ARGUMENT: the same request may pass on a faster machine. Nor worth a retry on this one.
            raise Overloaded(
                f"the request has used {meter.spent_ns // 1_000_000} ms of the tokenizer and has texts left "
                "(tokenizer.max_request_ms); send them in several requests",
                reason="TOKENIZER_TIME_EXCEEDED",
                policy="tokenizer",
                retry_after_ms=None,
                figures={"spent_ms": meter.spent_ns / 1e6},
            )
        self._pending += 1
        asked = time.monotonic_ns()
        try:
            done = await self._hand_over(work, deadline_ns)
        finally:
            self._pending -= 1
        meter.spent_ns += done.worked_ns
        self._on_tokenized(texts, tokens(done.result), done.begun_ns - asked, done.ended_ns - done.begun_ns)
        result: _T = done.result
        return result

    async def _hand_over(self, work: Callable[[TextTokenizer], Any], deadline_ns: int | None) -> _Done:
        if self._failure is not None:
            raise self._failure
        done: asyncio.Future[_Done] = asyncio.get_running_loop().create_future()
        self._waiting.add(done)
        self._jobs.put(_Job(work, done, deadline_ns))
        try:
            return await done
        finally:
            self._waiting.discard(done)

    def _run(self, tokenizer: TextTokenizer) -> None:
        while (job := self._jobs.get()) is not None:
            if self._closed or job.done.cancelled():
                continue
            begun = time.monotonic_ns()
            if job.deadline_ns is not None and begun >= job.deadline_ns:
                late = DeadlineExpired("the deadline passed before the texts were tokenised")
                post(job.done.get_loop(), _fail, job.done, late)
                continue
            work_begun = self._work_clock()
            try:
                result = job.work(tokenizer)
            except Exception as error:  # noqa: BLE001 - raised where it is waited for, as an executor would
                post(job.done.get_loop(), _fail, job.done, error)
            except BaseException as death:  # noqa: BLE001 - the outermost frame of the thread: its death must be loud
                post(job.done.get_loop(), self._on_death, death)
                post(job.done.get_loop(), _fail, job.done, EngineFailed(f"a tokenizer thread died: {death}"))
                return
            else:
                worked = self._work_clock() - work_begun
                post(job.done.get_loop(), settle, job.done, _Done(begun, time.monotonic_ns(), worked, result))
                del result
            del job  # the texts, and who waits, must not live until the next job

    def close(self, timeout_s: float = 1.0) -> bool:
        """End the threads; work that has not begun is dropped. Whether they ended in time."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        ends = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def _fail(done: asyncio.Future[Any], error: BaseException) -> None:
    if not done.done():
        done.set_exception(error)
