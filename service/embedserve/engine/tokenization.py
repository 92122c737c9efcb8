"""A bounded pool of tokenizer threads.

Decides how many threads tokenise, how much may wait for them, and which requests are so short that handing them to a
thread would cost more than tokenising them. Must never know policies, batches or transports. The Rust tokenizer
releases the GIL and is not thread-safe, so each thread owns a clone.

The threads are our own, over one queue: a hand-over through ``ThreadPoolExecutor`` and ``wrap_future`` costs the event
loop 26 to 53 us, one through ``SimpleQueue`` and ``call_soon_threadsafe`` 15 to 17.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from embedserve.errors import Overloaded
from embedserve.model.tokenizer import TextTokenizer, TokenizedTexts, Truncation

__all__ = ["TokenizerPool", "TokenizerSettings"]

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


class _Job(NamedTuple):
    """Work for a thread, and who waits for it."""

    work: Callable[[TextTokenizer], Any]
    done: asyncio.Future[tuple[int, int, Any]]
    """Begin and end in monotonic nanoseconds, and the result."""


class TokenizerPool:
    """Tokenises texts off the event loop. Used from one event loop only."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        settings: TokenizerSettings,
        on_tokenized: Callable[[int, int, int, int], None],
    ) -> None:
        """``on_tokenized(texts, tokens, waited_ns, elapsed_ns)`` is called on the event loop for each piece of work."""
        self._inline = tokenizer
        self._settings = settings
        self._on_tokenized = on_tokenized
        self._pending = 0
        self._closed = False
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, args=(tokenizer.clone(),), name=f"embedserve-tokenizer_{n}", daemon=True)
            for n in range(settings.threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pending(self) -> int:
        """Requests that wait for a thread or are in one."""
        return self._pending

    async def encode(
        self, texts: Sequence[str], chars: int, *, truncation: Truncation, prompt: str = ""
    ) -> TokenizedTexts:
        """Token ids of ``texts``, which hold ``chars`` characters in all.

        Raises ``Overloaded`` when ``max_pending`` requests are waiting already.
        """
        step = self._settings.chunk_texts
        if chars + len(prompt) * len(texts) <= self._settings.inline_chars:
            begun = time.monotonic_ns()
            result = self._inline.encode(texts, truncation=truncation, prompt=prompt)
            self._on_tokenized(len(texts), len(result.ids), 0, time.monotonic_ns() - begun)
            return result
        if len(texts) <= step:
            return await self._in_thread(
                len(texts), lambda t: t.encode(texts, truncation=truncation, prompt=prompt), lambda r: len(r.ids)
            )
        pieces = [
            await self._in_thread(
                len(part),
                lambda t, part=part: t.encode(part, truncation=truncation, prompt=prompt),  # type: ignore[misc]
                lambda r: len(r.ids),
            )
            for part in (texts[i : i + step] for i in range(0, len(texts), step))
        ]
        return TokenizedTexts(
            ids=np.concatenate([piece.ids for piece in pieces]),
            lengths=np.concatenate([piece.lengths for piece in pieces]),
            truncated=np.concatenate([piece.truncated for piece in pieces]),
            prompt_tokens=pieces[0].prompt_tokens,
        )

    async def count(self, texts: Sequence[str], *, prompt: str = "") -> npt.NDArray[np.int32]:
        """Full token counts, shape ``[n]``. Raises ``Overloaded`` as ``encode`` does."""
        step = self._settings.chunk_texts
        counts = [
            await self._in_thread(
                len(part),
                lambda t, part=part: t.count(part, prompt=prompt),  # type: ignore[misc]
                lambda r: int(r.sum()),
            )
            for part in (texts[i : i + step] for i in range(0, len(texts), step))
        ]
        return np.concatenate(counts)

    async def _in_thread(self, texts: int, work: Callable[[TextTokenizer], _T], tokens: Callable[[_T], int]) -> _T:
        if self._pending >= self._settings.max_pending:
            raise Overloaded(
                f"{self._pending} requests wait for a tokenizer thread (tokenizer.max_pending)",
                reason="TOKENIZER_QUEUE_FULL",
                policy="tokenizer",
                retry_after_ms=50,
                figures={"pending": float(self._pending)},
            )
        self._pending += 1
        asked = time.monotonic_ns()
        try:
            begun, ended, result = await self._hand_over(work)
        finally:
            self._pending -= 1
        self._on_tokenized(texts, tokens(result), begun - asked, ended - begun)
        return result

    def _hand_over(self, work: Callable[[TextTokenizer], _T]) -> asyncio.Future[tuple[int, int, _T]]:
        done: asyncio.Future[tuple[int, int, _T]] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(work, done))
        return done

    def _run(self, tokenizer: TextTokenizer) -> None:
        while (job := self._jobs.get()) is not None:
            if self._closed or job.done.cancelled():
                continue
            begun = time.monotonic_ns()
            try:
                result = job.work(tokenizer)
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for, as an executor would
                _post(job.done, _fail, error)
            else:
                _post(job.done, _succeed, (begun, time.monotonic_ns(), result))
                del result
            del job  # the texts, and who waits, must not live until the next job

    def close(self) -> None:
        """End the threads; work that has not begun is dropped."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()


def _post(done: asyncio.Future[Any], settle: Callable[[asyncio.Future[Any], Any], None], outcome: Any) -> None:
    loop = done.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(settle, done, outcome)


def _succeed(done: asyncio.Future[Any], outcome: Any) -> None:
    if not done.done():  # the caller has gone
        done.set_result(outcome)


def _fail(done: asyncio.Future[Any], error: BaseException) -> None:
    if not done.done():
        done.set_exception(error)
