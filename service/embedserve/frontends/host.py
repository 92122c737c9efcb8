"""The engine's side: calls of all front ends, handed to the one engine.

Decides what a front end's frames ask of the engine and when its work is of no use any more. Must never know gRPC, texts
or which process a front end is. One scheduler judges all calls, so that deadlines, fairness and policies hold over all
front ends together.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, Final, NamedTuple

import orjson

from embedserve.engine.call import Call, Embedded
from embedserve.engine.engine import Engine
from embedserve.engine.stages import Stages
from embedserve.engine.wall import sentence
from embedserve.frontends import frames
from embedserve.frontends.failure import pack_failure, unpack_failure
from embedserve.frontends.frames import Order, Piece, pack_portion, unpack_order
from embedserve.frontends.link import Link, connect_link
from embedserve.frontends.marks import Traces, pack_marks
from embedserve.frontends.memory import SharedMemory
from embedserve.model.tokenizer import TokenizedTexts

__all__ = ["ASK_S", "Answers", "Ends", "EngineHost"]

LOAD_EVERY_S: Final = 0.05
"""How often front ends are told the load while there is work: a balancer asks less often than that."""
BEAT_S: Final = 1.0
"""How often they are told it without work, so that they notice an engine process that is stopped..."""
BEATS: Final = 4
"""... and at least so often in ``health.stall_ms``, after which silence counts as a stall."""
ASK_S: Final = 1.0
"""What is asked of front ends waits no longer for any of them: who is silent is named, and the others are shown."""


class Answers(NamedTuple):
    """What front ends have answered."""

    given: list[tuple[str, bytes]]
    """Name and answer."""
    silent: list[str]
    """Who has not answered."""


class Ends(NamedTuple):
    """What one front end shares with the engine process, as descriptors of this process."""

    name: str
    link: int
    memory: int | None
    """``None`` for the supervisor, which has no calls."""


class EngineHost:
    """Every front end's work in the engine. Lives on the engine's event loop."""

    def __init__(
        self, engine: Engine, traces: Traces, ends: Sequence[Ends], *, on_fatal: Callable[[str], None], stall_ns: int
    ) -> None:
        """No front end is heard before ``open``. ``on_fatal`` is told once when front ends cannot be heard.

        ``stall_ns``: how long this process may say nothing before front ends take it for stalled.
        """
        self.engine = engine
        self.traces = traces
        self._ends = ends
        self._on_fatal = on_fatal
        self._front_ends: list[_FrontEnd] = []
        self._opening: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._soon = False
        """Whether the timer is one of those while there is work."""
        self._beat_s = min(BEAT_S, stall_ns / 1e9 / BEATS)
        self._deserted = asyncio.Event()
        self._deserted.set()
        self._questions = itertools.count(1)
        self._asked: dict[int, dict[int, asyncio.Future[bytes]]] = {}
        self.show: Callable[[int, bytes], Awaitable[bytes]] | None = None
        """What the supervisor is answered to a SHOW_METRICS or a SHOW_PAGE."""
        self.silent = dict.fromkeys((end.name for end in ends if end.memory is not None), False)
        """Front ends that did not answer what they were asked last."""

    def open(self) -> None:
        """The model is ready: hear every front end, and tell it which model. Once."""
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        try:
            for end in self._ends:
                front_end = _FrontEnd(self, end.name, None if end.memory is None else SharedMemory(end.memory))
                front_end.link = await connect_link(end.link, front_end.take, front_end.lose)
                self._front_ends.append(front_end)
                self._deserted.clear()
            self._welcome()
        except Exception as broken:  # noqa: BLE001 - a task that nobody waits for: this is its wall
            self._on_fatal(f"front ends cannot be heard: {sentence(broken)}")

    def _welcome(self) -> None:
        """Tell every front end what is served."""
        facts = {"identity": dataclasses.asdict(self.engine.identity), "load": dataclasses.asdict(self.engine.load())}
        self._tell(frames.WELCOME, orjson.dumps(facts))
        self.tell_load()

    def tell_load(self) -> None:
        """Tell every front end the load, now and from time to time."""
        if self.engine.loaded:
            facts = {"load": dataclasses.asdict(self.engine.load()), "stalled_ns": self._stalled_ns}
            self._tell(frames.LOAD, orjson.dumps(facts))
        self._arm(soon=self.engine.requests > 0)

    def _arm(self, *, soon: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._soon = soon
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(min(LOAD_EVERY_S, self._beat_s) if soon else self._beat_s, self.tell_load)

    @property
    def _stalled_ns(self) -> int:
        """How long the device has been silent; 0 where that is no longer than it may be."""
        return max(1, self.engine.pass_age_ns) if self.engine.stalled else 0

    def tell_soon(self) -> None:
        """There is work: the load changes."""
        if not self._soon:
            self._arm(soon=True)

    def tell_broken(self, why: str) -> None:
        """Nothing more will run. Front ends answer their callers, whatever becomes of this process."""
        self._tell(frames.BROKEN, why.encode())
        for front_end in self._front_ends:
            front_end.flush()

    async def ask(self, kind: int, body: bytes = b"") -> Answers:
        """What each front end answers to a SCRAPE or a RECALL, within ``ASK_S``."""
        question = next(self._questions)
        front_ends = [one for one in self._front_ends if one.name in self.silent]
        waiting = self._asked[question] = {id(one): asyncio.get_running_loop().create_future() for one in front_ends}
        try:
            for one in front_ends:
                one.send(kind, question, body)
            if waiting:
                await asyncio.wait(waiting.values(), timeout=ASK_S)
        finally:
            del self._asked[question]
        given: list[tuple[str, bytes]] = []
        for one, future in zip(front_ends, waiting.values(), strict=True):
            self.silent[one.name] = not future.done()
            if future.done():
                given.append((one.name, future.result()))
        return Answers(given, [name for name, silent in self.silent.items() if silent])

    def forget_silent(self) -> None:
        """Another engine process asks front ends now, and says who is silent."""
        self.silent = dict.fromkeys(self.silent, False)

    def answered(self, front_end: _FrontEnd, question: int, answer: bytes) -> None:
        """A front end has answered, in time or not."""
        future = self._asked.get(question, {}).get(id(front_end))
        if future is not None and not future.done():
            future.set_result(answer)

    def lost(self, front_end: _FrontEnd) -> None:
        """A front end has gone."""
        if front_end in self._front_ends:
            self._front_ends.remove(front_end)
        if not self._front_ends:
            self._deserted.set()

    async def desert(self, within_s: float) -> None:
        """Take no new work, and return when no front end is left, or after ``within_s``: what was taken goes on."""
        self.engine.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._deserted.wait()

    def _tell(self, kind: int, body: bytes) -> None:
        for front_end in self._front_ends:
            front_end.send(kind, 0, body)


class _FedStream:
    """Token ids of a stream, made by its front end as the engine asks for them."""

    def __init__(self, front_end: _FrontEnd, call_id: int, order: Order) -> None:
        self.count = order.texts
        self._first_piece = order.tokens
        self._front_end = front_end
        self._call_id = call_id
        self._asked: asyncio.Future[TokenizedTexts] | None = None
        self.taken = asyncio.Event()
        """The last portion was read."""

    def estimate(self, texts: int) -> int:  # noqa: ARG002 - the front end knows how many a first piece has
        return self._first_piece

    async def tokenize(self, first: int, stop: int) -> TokenizedTexts:
        asked: asyncio.Future[TokenizedTexts] = asyncio.get_running_loop().create_future()
        self._asked = asked
        self._front_end.send(frames.FEED, self._call_id, frames.FEED_BODY.pack(first, stop))
        return await asked

    def feed(self, tokenized: TokenizedTexts) -> None:
        if self._asked is not None and not self._asked.done():
            self._asked.set_result(tokenized)

    def fail(self, error: Exception) -> None:
        if self._asked is not None and not self._asked.done():
            self._asked.set_exception(error)


class _FrontEnd:
    """One front end's calls."""

    link: Link

    def __init__(self, host: EngineHost, name: str, memory: SharedMemory | None) -> None:
        self.name = name
        self._host = host
        self._shared = memory
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._streams: dict[int, _FedStream] = {}
        self._loop = asyncio.get_running_loop()

    @property
    def _memory(self) -> SharedMemory:
        assert self._shared is not None, "the supervisor has no calls"
        return self._shared

    def send(self, kind: int, call_id: int, body: bytes = b"") -> None:
        self.link.send(kind, call_id, body)

    def flush(self) -> None:
        self.link.flush()

    def lose(self) -> None:
        """It has gone: nobody waits for its calls, and the mapping goes when the last of them lets go of it."""
        self._host.lost(self)
        for task in self._tasks.values():
            task.cancel()

    def take(self, kind: int, call_id: int, body: bytes) -> None:
        """One frame of it."""
        if kind == frames.EMBED:
            order = unpack_order(body, self._host.traces)
            tokens = self._memory.read_tokens(order.slot, order.tokens, order.texts, order.prompt_tokens)
            self._begin(call_id, self._embed(call_id, order, tokens))
        elif kind == frames.STREAM:
            order = unpack_order(body, self._host.traces)
            stream = self._streams[call_id] = _FedStream(self, call_id, order)
            self._begin(call_id, self._stream(call_id, order, stream))
        elif kind == frames.JUDGE:
            self._judge(call_id, unpack_order(body, self._host.traces))
        elif kind in (frames.SHOW_METRICS, frames.SHOW_PAGE):
            showing = self._tasks[call_id] = self._loop.create_task(self._show(kind, call_id, body))
            showing.add_done_callback(lambda _task: self._tasks.pop(call_id, None))
        elif kind in (frames.SCRAPED, frames.RECALLED):
            self._host.answered(self, call_id, body)
        elif kind == frames.CANCEL:
            if (task := self._tasks.get(call_id)) is not None:
                task.cancel()
        elif (known := self._streams.get(call_id)) is not None:
            if kind == frames.TAKEN:
                known.taken.set()
            elif kind == frames.PIECE:
                piece = Piece.unpack(body)
                known.feed(self._memory.read_tokens(piece.slot, piece.tokens, piece.texts, piece.prompt_tokens))
            elif kind == frames.UNFED:
                known.fail(unpack_failure(body))

    def _judge(self, call_id: int, order: Order) -> None:
        call = _call(order)
        call.source = _FedStream(self, call_id, order)
        try:
            self._host.engine.admit(call)
        except Exception as error:  # noqa: BLE001 - as in ``_embed``
            self._fail(call_id, call, error)
        else:
            self.send(frames.JUDGED, call_id)

    def _fail(self, call_id: int, call: Call, error: Exception) -> None:
        self.send(frames.FAILED, call_id, pack_marks(call.stages, self._host.traces) + pack_failure(error))

    def _begin(self, call_id: int, work: Coroutine[Any, Any, None]) -> None:
        task = self._tasks[call_id] = self._loop.create_task(work)
        task.add_done_callback(self._ended(call_id))
        self._host.tell_soon()

    def _ended(self, call_id: int) -> Callable[[asyncio.Task[None]], None]:
        def ended(task: asyncio.Task[None]) -> None:
            del self._tasks[call_id]
            self._streams.pop(call_id, None)
            # A task that is cancelled before its first step runs nothing: the slot's owner is told here.
            if task.cancelled():
                self.send(frames.FAILED, call_id)

        return ended

    async def _show(self, kind: int, question: int, body: bytes) -> None:
        assert self._host.show is not None, "only asked where there are several engines"
        try:
            answer = await self._host.show(kind, body)
        except Exception as error:  # noqa: BLE001 - who asks is told: the page of a service must not end it
            answer = frames.UNSHOWN + sentence(error).encode()
        self.send(frames.SHOWN, question, answer)

    async def _embed(self, call_id: int, order: Order, tokens: TokenizedTexts) -> None:
        call = _call(order)
        call.tokens = tokens
        try:
            body = self._answer(order, await self._host.engine.embed(call))
        except Exception as error:  # noqa: BLE001 - it crosses: the front end's guard is its wall
            self._fail(call_id, call, error)
        else:
            self.send(frames.DONE, call_id, body + pack_marks(call.stages, self._host.traces))

    def _answer(self, order: Order, embedded: Embedded) -> bytes:
        vectors = embedded.vectors
        self._memory.write_rows(order.slot, vectors)
        self._memory.write_batch_sizes(order.slot, vectors.nbytes, embedded.batch_sizes)
        return frames.DONE_BODY.pack(vectors.shape[1], embedded.batches)

    async def _stream(self, call_id: int, order: Order, stream: _FedStream) -> None:
        call = _call(order)
        call.source = stream
        try:
            async with aclosing(self._host.engine.embed_stream(call)) as portions:
                async for portion in portions:
                    if portion.vectors is not None:
                        self._memory.write_rows(order.slot, portion.vectors)
                    stream.taken.clear()
                    self.send(frames.PORTION, call_id, pack_portion(portion))
                    await stream.taken.wait()
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(call_id, call, error)
        else:
            self.send(frames.ENDED, call_id, pack_marks(call.stages, self._host.traces))


def _call(order: Order) -> Call:
    return Call(
        stages=Stages(order.arrived_ns, validated_ns=order.validated_ns),
        truncation=order.truncation,
        normalize=order.normalize,
        dimensions=order.dimensions,
        deadline_ns=order.deadline_ns,
        priority=order.priority,
        tenant=order.tenant,
        trace=order.trace,
    )
