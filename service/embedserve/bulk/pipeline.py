"""Reads, embeds and writes at the same time, in order, within bounds.

Decides how much is in flight and what a text that fails does to the run. Must never know a file format or a transport.
At most ``2 * concurrency + 3`` groups of texts are in memory, of which ``concurrency`` are being embedded: a slow group
holds up the writing of those behind it, but not their embedding, and a slow reader of the results holds up everything.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeVar

from embedserve.bulk.outcome import BulkError, Embedder, Failure
from embedserve.bulk.sink import Row, Sink
from embedserve.bulk.source import Text

__all__ = ["OnError", "Tally", "embed_all"]

OnError = Literal["fail", "skip", "null"]
Result = TypeVar("Result")


@dataclass(slots=True)
class Tally:
    """How a run went."""

    embedded: int = 0
    failed: int = 0


async def embed_all(
    chunks: Iterator[Sequence[Text]],
    embedder: Embedder,
    sink: Sink,
    *,
    concurrency: int,
    on_error: OnError,
    progress: Callable[[int], object],
) -> Tally:
    """Embed every text of ``chunks`` into ``sink``; ``progress`` is told how many more texts are done.

    ``on_error``: ``fail`` ends the run at the first text that fails, in input order; ``skip`` leaves it out; ``null``
    writes a row without a vector. Raises ``BulkError``, and ``OSError`` where the sink or the source does.
    """
    run = _Run(chunks, embedder, sink, on_error=on_error, progress=progress, concurrency=concurrency)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(run.read(group))
            group.create_task(run.write())
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    return run.tally


class _Run:
    """The state that reading and writing share."""

    def __init__(
        self,
        chunks: Iterator[Sequence[Text]],
        embedder: Embedder,
        sink: Sink,
        *,
        on_error: OnError,
        progress: Callable[[int], object],
        concurrency: int,
    ) -> None:
        self._chunks = chunks
        self._embedder = embedder
        self._sink = sink
        self._on_error = on_error
        self._progress = progress
        self._slots = asyncio.Semaphore(concurrency)
        self._in_order: asyncio.Queue[tuple[Sequence[Text], asyncio.Task[list[Row]]] | None]
        self._in_order = asyncio.Queue(2 * concurrency)
        self.tally = Tally()

    async def read(self, group: asyncio.TaskGroup) -> None:
        """Start a task for each group of texts, in order, as slots and room for results become free."""
        while (chunk := await off_loop(lambda: next(self._chunks, None))) is not None:
            await self._slots.acquire()
            await self._in_order.put((chunk, group.create_task(self._embed(chunk))))
        await self._in_order.put(None)

    async def _embed(self, chunk: Sequence[Text]) -> list[Row]:
        try:
            readable = [text.text for text in chunk if text.problem is None]
            outcomes = iter(await self._embedder.embed(readable) if readable else ())
        finally:
            self._slots.release()
        return [
            Row(text.index, text.id, next(outcomes) if text.problem is None else Failure("UNREADABLE", text.problem))
            for text in chunk
        ]

    async def write(self) -> None:
        """Write each group's rows as soon as its turn has come."""
        while (entry := await self._in_order.get()) is not None:
            chunk, task = entry
            rows = self._judge(chunk, await task)
            await off_loop(lambda rows=rows: self._sink.write(rows))  # type: ignore[misc]
            self._progress(len(chunk))

    def _judge(self, chunk: Sequence[Text], rows: list[Row]) -> list[Row]:
        failed = [
            (text, row.outcome) for text, row in zip(chunk, rows, strict=True) if isinstance(row.outcome, Failure)
        ]
        if failed and self._on_error == "fail":
            text, failure = failed[0]
            raise BulkError(f"{text.place}: {failure.reason}: {failure.message}")
        self.tally.failed += len(failed)
        self.tally.embedded += len(rows) - len(failed)
        return rows if self._on_error == "null" else [row for row in rows if not isinstance(row.outcome, Failure)]


async def off_loop(function: Callable[[], Result]) -> Result:
    """Run ``function`` in a thread that never keeps the process alive.

    Reading a terminal or a pipe may block for ever: asyncio's own threads would be waited for at exit, this one is not.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def settle(set_outcome: Callable[[], None]) -> None:
        if not done.done():
            set_outcome()

    def work() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 (handed on to the loop, which raises it)
            report(lambda error=error: done.set_exception(error))  # type: ignore[misc]
        else:
            report(lambda: done.set_result(result))

    def report(set_outcome: Callable[[], None]) -> None:
        # RuntimeError: the loop is closed, since the run has ended before the read did. Then nobody waits.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, set_outcome)

    threading.Thread(target=work, daemon=True).start()
    return await done


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first single exception of a group: one of ours where there is one."""
    singles = list(_flatten(failures))
    return next((failure for failure in singles if isinstance(failure, BulkError)), singles[0])


def _flatten(failure: BaseException) -> Iterator[BaseException]:
    if isinstance(failure, BaseExceptionGroup):
        for inner in failure.exceptions:
            yield from _flatten(inner)
    else:
        yield failure
