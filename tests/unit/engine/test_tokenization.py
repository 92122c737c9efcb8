"""The pool: same ids in a thread and on the loop, bounded, and nothing lost on cancellation."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest

from embedserve.engine.tokenization import Meter, TokenizerPool, TokenizerSettings
from embedserve.errors import DeadlineExpired, Overloaded
from embedserve.model.tokenizer import TextTokenizer, TokenizedTexts, Truncation
from embedserve.testing import ManualClock, tiny_tokenizer

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


class Costly(Gated):
    """A tokenizer whose clones work for 25 ms a piece, by a clock that is moved by hand."""

    def __init__(self, inner: TextTokenizer, clock: ManualClock, pieces: list[list[str]]) -> None:
        self._inner, self._clock, self._pieces = inner, clock, pieces

    def clone(self) -> Costly:
        return Costly(self._inner.clone(), self._clock, self._pieces)

    def encode(self, texts: list[str], *, truncation: Truncation, prompt: str = "") -> TokenizedTexts:
        self._clock.advance(ms=25)
        self._pieces.append(list(texts))
        return self._inner.encode(texts, truncation=truncation, prompt=prompt)


class TestTime:
    """What one request may cost the threads is bounded, in a piece and in all."""

    @staticmethod
    def costly(**limits: int) -> tuple[TokenizerPool, list[list[str]]]:
        clock, pieces = ManualClock(), []
        settings = TokenizerSettings(threads=1, max_pending=8, inline_chars=0, chunk_texts=2, **limits)
        tokenizer = Costly(tiny_tokenizer(), clock, pieces)
        return TokenizerPool(tokenizer, settings, lambda *_: None, work_clock=clock), pieces  # type: ignore[arg-type]

    @pytest.mark.parametrize(("limit_ms", "passes"), [(76, True), (75, False)])
    async def test_a_request_may_begin_a_piece_within_its_time_and_none_after_it(
        self, limit_ms: int, passes: bool
    ) -> None:
        """Four pieces of 25 ms: the last begins after 75 ms."""
        pool, pieces = self.costly(max_request_ns=limit_ms * 1_000_000)
        texts = ["hello world"] * 8
        try:
            if passes:
                assert len((await pool.encode(texts, 88, truncation=Truncation.NONE)).lengths) == 8
            else:
                with pytest.raises(Overloaded) as caught:
                    await pool.encode(texts, 88, truncation=Truncation.NONE)
                assert (caught.value.policy, caught.value.reason) == ("tokenizer", "TOKENIZER_TIME_EXCEEDED")
                assert caught.value.retry_after_ms is None
        finally:
            pool.close()

        assert len(pieces) == (4 if passes else 3)

    async def test_the_time_is_that_of_the_whole_request_whatever_calls_it_makes(self) -> None:
        pool, _ = self.costly(max_request_ns=50_000_000)
        meter = Meter()
        try:
            for _ in range(2):
                await pool.encode(["hello"] * 2, 10, truncation=Truncation.NONE, meter=meter)
            with pytest.raises(Overloaded):
                await pool.encode(["hello"] * 2, 10, truncation=Truncation.NONE, meter=meter)
            await pool.encode(["hello"] * 2, 10, truncation=Truncation.NONE, meter=Meter())
        finally:
            pool.close()

    async def test_pieces_are_bounded_in_characters_as_in_texts(self) -> None:
        pool, pieces = self.costly(chunk_chars=300)
        texts = ["a" * 200, "b" * 90, "c" * 20, "d" * 1000, "e", "f"]
        tokenized = await pool.encode(texts, sum(map(len, texts)), truncation=Truncation.END)
        pool.close()

        assert [[text[0] for text in piece] for piece in pieces] == [["a", "b"], ["c"], ["d"], ["e", "f"]]
        assert np.array_equal(tokenized.ids, tiny_tokenizer().encode(texts, truncation=Truncation.END).ids)

    async def test_a_text_of_a_megabyte_is_counted_in_pieces_and_rightly(self) -> None:
        waited: list[int] = []
        settings = TokenizerSettings(threads=1, max_pending=8, inline_chars=0, chunk_texts=4, chunk_chars=4096)
        pool = TokenizerPool(tiny_tokenizer(), settings, lambda texts, *_: waited.append(texts))
        text = "hello world, a-b. [SEP] " * 2000
        counts = await pool.count(["hello", text, "the text"], prompt="a ")
        pool.close()

        assert counts.tolist() == tiny_tokenizer().count(["hello", text, "the text"], prompt="a ").tolist()
        assert len(waited) > 10

    async def test_texts_past_their_deadline_are_not_tokenised(self) -> None:
        pool, pieces = self.costly()
        with pytest.raises(DeadlineExpired):
            await pool.encode(["hello"], 5, truncation=Truncation.NONE, deadline_ns=1)
        pool.close()

        assert pieces == []


class TestLimit:
    """Requests that wait for a thread are bounded."""

    async def test_one_more_than_max_pending_is_refused_with_a_hint(self, bench: Bench) -> None:
        bench.gate.clear()
        waiting = [asyncio.ensure_future(bench.encode("hello world the text")) for _ in range(SETTINGS.max_pending)]
        await asyncio.sleep(0)
        use = bench.pool.use
        with pytest.raises(Overloaded) as caught:
            await bench.encode("hello world the text")
        bench.gate.set()
        await asyncio.gather(*waiting)

        assert use == (2, 2, 0)
        assert (caught.value.policy, caught.value.reason) == ("tokenizer", "TOKENIZER_QUEUE_FULL")
        assert caught.value.retry_after_ms
        assert bench.pool.use.pending == 0

    async def test_a_cancelled_request_gives_its_place_back_at_once(self, bench: Bench) -> None:
        bench.gate.clear()
        task = asyncio.ensure_future(bench.encode("hello world the text"))
        await asyncio.sleep(0)
        pending = bench.pool.use.pending
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

        assert (pending, bench.pool.use.pending) == (1, 0)

    async def test_who_waits_is_told_from_who_is_at_work(self) -> None:
        gate = threading.Event()
        settings = TokenizerSettings(threads=1, max_pending=8, inline_chars=0, chunk_texts=4)
        pool = TokenizerPool(Gated(tiny_tokenizer(), gate, []), settings, lambda *_: None)
        idle = pool.use
        tasks = [asyncio.ensure_future(pool.encode(["hello"], 5, truncation=Truncation.NONE)) for _ in range(3)]
        await asyncio.sleep(0)
        busy = pool.use
        gate.set()
        await asyncio.gather(*tasks)
        pool.close()

        assert [idle, busy, pool.use] == [(1, 0, 0), (1, 1, 2), (1, 0, 0)]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
class TestPriority:
    """Whose core it is while passes are computed."""

    async def priorities(self, nice: int) -> tuple[list[int], int]:
        """Of the pool's threads over this thread's, before and after; and how this thread's own has moved."""
        settings = TokenizerSettings(threads=2, max_pending=8, inline_chars=0, chunk_texts=4, nice=nice)
        own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        pool = TokenizerPool(tiny_tokenizer(), settings, lambda *_: None)
        threads = [t.native_id for t in threading.enumerate() if t.name.startswith("embedserve-tokenizer")]
        before = [os.getpriority(os.PRIO_PROCESS, thread) - own for thread in threads if thread is not None]
        pool.yield_to_the_loop()
        after = [os.getpriority(os.PRIO_PROCESS, thread) - own for thread in threads if thread is not None]
        pool.close()
        return before + after, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) - own

    async def test_it_is_lower_where_passes_are_computed_at_a_lower_one(self) -> None:
        assert await self.priorities(5) == ([0, 0, 5, 5], 0)

    async def test_it_is_the_same_where_theirs_is(self) -> None:
        assert await self.priorities(0) == ([0, 0, 0, 0], 0)
