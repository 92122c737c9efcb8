"""The pool: same ids in a thread and on the loop, bounded, and nothing lost on cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest

from embedserve.engine.tokenization import TokenizerPool, TokenizerSettings
from embedserve.errors import Overloaded
from embedserve.model.tokenizer import TextTokenizer, TokenizedTexts, Truncation
from embedserve.testing import tiny_tokenizer

SETTINGS = TokenizerSettings(threads=2, max_pending=2, inline_chars=16, chunk_texts=4)


class Gated:
    """A tokenizer whose clones wait for a gate; counts what is encoded in which thread."""

    def __init__(self, inner: TextTokenizer, gate: threading.Event, threads: list[str]) -> None:
        self._inner, self._gate, self._threads = inner, gate, threads

    def clone(self) -> Gated:
        return Gated(self._inner.clone(), self._gate, self._threads)

    def encode(self, texts: list[str], *, truncation: Truncation, prompt: str = "") -> TokenizedTexts:
        self._gate.wait()
        self._threads.append(threading.current_thread().name)
        return self._inner.encode(texts, truncation=truncation, prompt=prompt)


class Bench:
    def __init__(self) -> None:
        self.gate, self.threads, self.events = threading.Event(), [], []
        self.gate.set()
        gated = Gated(tiny_tokenizer(), self.gate, self.threads)
        self.pool = TokenizerPool(gated, SETTINGS, lambda *event: self.events.append(event))  # type: ignore[arg-type]

    async def encode(self, *texts: str) -> TokenizedTexts:
        return await self.pool.encode(list(texts), sum(map(len, texts)), truncation=Truncation.NONE)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    made.gate.set()
    made.pool.close()


class TestWhere:
    """A short request stays on the loop, a long one goes to a thread, a large one goes piece by piece."""

    async def test_a_short_request_is_tokenised_on_the_loop(self, bench: Bench) -> None:
        await bench.encode("hello world")

        assert bench.threads == [threading.current_thread().name]
        assert bench.events[0][:3] == (1, 4, 0)

    async def test_a_long_request_goes_to_a_thread(self, bench: Bench) -> None:
        await bench.encode("hello world the text")

        assert bench.threads[0].startswith("embedserve-tokenizer")

    async def test_a_large_request_takes_pieces_and_gives_the_same_ids(self, bench: Bench) -> None:
        texts = [f"hello {i} world" for i in range(11)]
        pieces = await bench.encode(*texts)
        whole = tiny_tokenizer().encode(texts, truncation=Truncation.NONE)

        assert [event[0] for event in bench.events] == [4, 4, 3]
        assert np.array_equal(pieces.ids, whole.ids)
        assert np.array_equal(pieces.lengths, whole.lengths)

    async def test_counts_are_the_lengths(self) -> None:
        pool = TokenizerPool(tiny_tokenizer(), SETTINGS, lambda *_event: None)
        counts = await pool.count(["hello", "hello world", "a"] * 3)
        pool.close()

        assert counts.tolist() == [3, 4, 3] * 3


class TestLimit:
    """Requests that wait for a thread are bounded."""

    async def test_one_more_than_max_pending_is_refused_with_a_hint(self, bench: Bench) -> None:
        bench.gate.clear()
        waiting = [asyncio.ensure_future(bench.encode("hello world the text")) for _ in range(SETTINGS.max_pending)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await bench.encode("hello world the text")
        bench.gate.set()
        await asyncio.gather(*waiting)

        assert (caught.value.policy, caught.value.reason) == ("tokenizer", "TOKENIZER_QUEUE_FULL")
        assert caught.value.retry_after_ms
        assert bench.pool.pending == 0

    async def test_a_cancelled_request_gives_its_place_back_at_once(self, bench: Bench) -> None:
        bench.gate.clear()
        task = asyncio.ensure_future(bench.encode("hello world the text"))
        await asyncio.sleep(0)
        pending = bench.pool.pending
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

        assert (pending, bench.pool.pending) == (1, 0)
