"""The engine as a front end has it: tokenises here, and asks an engine process for the rest.

Decides what is refused before anything crosses, and what becomes of calls when the engine processes have gone. Must
never know gRPC, policies or the device, nor how an engine is chosen. Meets ``engine.surface.EngineSurface``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from embedserve.engine.call import Call, Embedded, Portion
from embedserve.engine.engine import verdict_of
from embedserve.engine.intake import cut_tokens, not_serving, stalled
from embedserve.engine.load import NO_LOAD, LoadReport
from embedserve.engine.observer import EngineObserver
from embedserve.engine.tokenization import TokenizerPool, TokenizerSettings, TokenizerUse
from embedserve.engine.watchdog import StallLimits
from embedserve.errors import EngineFailed, Overloaded
from embedserve.frontends import frames
from embedserve.frontends.engines import ALONE, EnginePeer, Engines, Place
from embedserve.frontends.host import Ends
from embedserve.frontends.marks import Traces
from embedserve.frontends.memory import rows_bytes, tokens_bytes
from embedserve.frontends.slots import Slot
from embedserve.frontends.stream import RemoteStream, estimate_chars, estimate_tokens
from embedserve.model.backend import ModelIdentity
from embedserve.model.tokenizer import TextTokenizer, TokenizedTexts
from embedserve.scheduling.item import Rejection

__all__ = ["RemoteEngine", "RemoteSettings"]

ROOM_RETRY_MS: Final = 100
"""When slots or calls in flight have run out: a few batches later there is room."""


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """Limits of a front end; each is a setting of the configuration."""

    tokenizer: TokenizerSettings
    max_requests_in_flight: int
    piece_items: int
    """Texts that the engine asks of a stream at a time, at most."""
    memory_bytes: int
    """Shared with each engine process."""
    stall: StallLimits
    """How long an engine process may say nothing; it tells its load in ``host.BEATS`` parts of ``stall_ns``."""
    place: Place = ALONE


class RemoteEngine:
    """The engine processes' work, as if it were here. Lives on one event loop."""

    def __init__(
        self,
        ends: Sequence[Ends],
        *,
        tokenizer: TextTokenizer,
        settings: RemoteSettings,
        observer: EngineObserver,
        traces: Traces,
        on_fatal: Callable[[str], None],
        on_stall: Callable[[int], None] = lambda _age_ns: None,
        on_recovery: Callable[[int], None] = lambda _lasted_ns: None,
        on_engine: Callable[[str, Mapping[str, object]], None] = lambda _event, _facts: None,
    ) -> None:
        """``ends`` are this process's own, one for each engine process.

        The callbacks are ``engine.engine.Engine``'s, of all engines together: ``on_stall`` when none is left that
        takes calls. ``on_engine`` is told of each where there are several, for the log: ``engine_silent``,
        ``engine_back`` or ``engine_lost``, after which this front end is to drain and end.
        """
        self._settings = settings
        self._observer = observer
        self.traces = traces
        """How traces cross; for the streams too."""
        self._on_fatal = on_fatal
        self._on_stall = on_stall
        self._on_recovery = on_recovery
        self._on_engine = on_engine
        self._pool = TokenizerPool(tokenizer, settings.tokenizer, observer.tokenized, self._lose_tokenizer)
        self.engines = Engines(
            ends,
            memory_bytes=settings.memory_bytes,
            stall=settings.stall,
            traces=traces,
            side=self,
            place=settings.place,
        )
        """Who takes the calls."""
        self.render_metrics: Callable[[str], tuple[str, bytes]] | None = None
        """This process's metrics, for an engine process to show."""
        self.recall: Callable[[], bytes] | None = None
        """What this process remembers of its calls, for the page of an engine process."""
        self._scrapes: set[asyncio.Task[None]] = set()
        self._requests = 0
        self._draining = False
        self._failure: str | None = None
        self._identity: ModelIdentity | None = None
        self._silent_since = 0
        """When the last engine that took calls fell silent; 0 while one does."""

    unread: Final = None
    """The engines judge, and they are in other processes: a call is read before it is known."""

    # ---------------------------------------------------------------------------------------------------- lifecycle

    async def start(self) -> ModelIdentity:
        """Wait until every engine process is ready. Raises ``StartupError`` when one ends before that."""
        self._identity = await self.engines.start()
        return self._identity

    def drain(self) -> None:
        """Take nothing more; what was taken goes on."""
        self._draining = True

    async def stop(self, timeout_s: float) -> bool:  # noqa: ARG002 - no thread here computes
        """Leave the engine processes and end the tokenizer's threads."""
        self.drain()
        self.engines.stop()
        return await asyncio.get_running_loop().run_in_executor(None, self._pool.close)

    @property
    def stalled(self) -> bool:
        """Whether every device is silent for longer than a pass may take, as was said last."""
        return self.engines.stalled

    @property
    def tokenizer_use(self) -> TokenizerUse:
        """How busy the tokenizer threads are."""
        return self._pool.use

    @property
    def memory_used(self) -> int:
        """Bytes of shared memory that calls hold."""
        return self.engines.memory_used

    @property
    def identity(self) -> ModelIdentity:
        """The model that is served; only after ``start``."""
        assert self._identity is not None
        return self._identity

    def load(self) -> LoadReport:
        """The load of all engines as they told it last, which is at most some 50 ms ago while there is work."""
        if self._identity is None:
            return NO_LOAD
        load = self.engines.load()
        if self._draining or self._failure is not None:
            return replace(load, state="not_serving", accepting_requests=False)
        return load

    def _lose_tokenizer(self, death: BaseException) -> None:
        self._fail(f"a tokenizer thread died: {type(death).__name__}: {death}")
        for engine in self.engines.all:
            engine.calls.fail(EngineFailed(self._failure or ""))

    def _fail(self, why: str) -> None:
        """Nothing more will run. Health says so before anybody is told."""
        if self._failure is None:
            self._failure = why
            self.drain()
            if self._identity is not None:  # otherwise ``start`` says so
                self._on_fatal(why)
            self._pool.fail(EngineFailed(why))

    # ----------------------------------------------------------------------------------- as the engines' ``EngineSide``

    def ask(self, engine: EnginePeer, kind: int, question: int, body: bytes) -> None:
        """An engine process wants to show what this one knows."""
        if kind == frames.RECALL:
            engine.send(frames.RECALLED, question, b"" if self.recall is None else self.recall())
            return
        accept_header = body.decode(errors="surrogateescape")
        task = asyncio.get_running_loop().create_task(self._scrape(engine, question, accept_header))
        self._scrapes.add(task)
        task.add_done_callback(self._scrapes.discard)

    async def _scrape(self, engine: EnginePeer, scrape: int, accept_header: str) -> None:
        """Rendering takes milliseconds: not in the event loop's turn."""
        if self.render_metrics is not None:
            loop = asyncio.get_running_loop()
            _, text = await loop.run_in_executor(None, self.render_metrics, accept_header)
            engine.send(frames.SCRAPED, scrape, text)

    def silent(self, engine: EnginePeer, age_ns: int) -> None:
        """It gets nothing new. Where no other takes calls, this process takes none either."""
        if len(self.engines.all) > 1:
            self._on_engine("engine_silent", {"engine": engine.name, "silent_ms": round(age_ns / 1e6)})
        self._see_whether_stalled(age_ns)

    def back(self, engine: EnginePeer, lasted_ns: int) -> None:
        """It gets calls again."""
        if len(self.engines.all) > 1:
            self._on_engine("engine_back", {"engine": engine.name, "silent_ms": round(lasted_ns / 1e6)})
        self._see_whether_stalled(lasted_ns)

    def lost(self, engine: EnginePeer, why: str) -> None:
        """It gets nothing any more. While another is there this process drains; without one it ends at once."""
        if self.engines.failure is not None:
            self._fail(why)
        elif self._identity is not None:
            self._on_engine("engine_lost", {"engine": engine.name, "reason": why})
            self._see_whether_stalled(0)

    def _see_whether_stalled(self, ns: int) -> None:
        now = time.monotonic_ns()
        if self.stalled and not self._silent_since:
            self._silent_since = now - ns
            self._on_stall(ns)
        elif self.engines.usable and self._silent_since:
            lasted_ns, self._silent_since = now - self._silent_since, 0
            self._on_recovery(lasted_ns)

    # ----------------------------------------------------------------------------------------------------- requests

    async def embed(self, call: Call) -> Embedded:
        """All vectors of one request, in its order. Raises and is cancelled as ``engine.engine.Engine.embed``."""
        self._requests += 1
        crossed, verdict = False, "failed"
        try:
            self._admit(call)
            engine: EnginePeer | None = None
            if call.texts is not None and estimate_chars(call) > self._settings.tokenizer.inline_chars:
                # A call that will be refused must not cost a tokenizer thread's time. What is tokenised on the event
                # loop (some 40 us) costs less than to ask, and is judged when it is tokenised.
                tokens = estimate_tokens(call)
                engine = self._choose(tokens)
                with self._counted(engine, tokens):
                    await engine.calls.ask(call, tokens)
                    tokenized = await self.tokenize(call)
            else:
                tokenized = await self.tokenize(call)
            call.stages.tokenized_ns = time.monotonic_ns()
            call.stages.tokens = tokens = len(tokenized.ids)
            if engine is None or not engine.watch.usable:
                engine = self._choose(tokens)
            slot = self._slot_for(engine, call, tokenized)
            crossed = True
            with self._counted(engine, tokens):
                return await engine.calls.embed(call, tokenized, slot)
        except BaseException as error:
            verdict = verdict_of(error)
            raise
        finally:
            self._requests -= 1
            if not crossed:  # otherwise the engine process tells
                self._observer.request_finished(call.stages, verdict=verdict)

    async def embed_stream(self, call: Call) -> AsyncGenerator[Portion, None]:
        """Portions of one request as their batches finish. As ``engine.engine.Engine.embed_stream``.

        All of it is one engine's: one window, one place in the fair order, one summary.
        """
        self._requests += 1
        crossed, verdict = False, "failed"
        try:
            self._admit(call)
            items = min(self._settings.piece_items, call.count)
            tokens = estimate_tokens(call, items)
            engine = self._choose(tokens)
            slot = self._take_slot(engine, rows_bytes(items, call.dimensions or self.identity.dimension))
            call_id = engine.calls.new_id()
            stream = RemoteStream(self, engine, call_id, call, slot)
            engine.calls.open_stream(call_id, stream, tokens)
            crossed = True
            try:
                with self._counted(engine, tokens):
                    async with aclosing(stream.portions()) as portions:
                        async for portion in portions:
                            yield portion
            finally:
                engine.calls.close_stream(call_id, stream)
        except BaseException as error:
            verdict = verdict_of(error)
            raise
        finally:
            self._requests -= 1
            if not crossed:
                self._observer.request_finished(call.stages, verdict=verdict)

    def _choose(self, tokens: int) -> EnginePeer:
        """Who takes a call of so many tokens. Raises what its caller is told where nobody does."""
        engine = self.engines.choose(tokens)
        if engine is not None:
            return engine
        if self._failure is not None:
            raise EngineFailed(self._failure)
        raise stalled()

    @contextmanager
    def _counted(self, engine: EnginePeer, tokens: int) -> Iterator[None]:
        """So many tokens are with ``engine``, or on their way."""
        engine.ours += tokens
        try:
            yield
        finally:
            engine.ours -= tokens

    async def count_tokens(self, texts: Sequence[str], *, prompt: str = "") -> npt.NDArray[np.int32]:
        """Full token counts, shape ``[n]``. Raises ``Overloaded`` or ``NotServing``."""
        if self._draining:
            raise not_serving()
        self._requests += 1
        try:
            self._refuse_beyond_room()
            return await self._pool.count(texts, prompt=prompt)
        finally:
            self._requests -= 1

    def _admit(self, call: Call) -> None:
        if self._failure is not None:
            raise EngineFailed(self._failure)
        if self._draining or self._identity is None:
            raise not_serving()
        if self.stalled:
            raise stalled()
        self._refuse_beyond_room()
        call.stages.texts = call.count
        call.stages.admitted_ns = time.monotonic_ns()

    def _refuse_beyond_room(self) -> None:
        limit = self._settings.max_requests_in_flight
        if self._requests > limit:
            raise self.refusal(
                "in_flight",
                "TOO_MANY_REQUESTS_IN_FLIGHT",
                f"more than {limit} calls in flight, by limits.max_requests_in_flight",
            )

    def refusal(self, policy: str, reason: str, message: str, retry_after_ms: int | None = ROOM_RETRY_MS) -> Overloaded:
        """What a caller is told whom this process refuses; counted."""
        self._observer.rejected(Rejection(policy, reason, retry_after_ms), stage="estimate")
        return Overloaded(message, reason=reason, policy=policy, retry_after_ms=retry_after_ms)

    async def tokenize(self, call: Call, first: int = 0, stop: int | None = None) -> TokenizedTexts:
        """Token ids of a call's texts from ``first`` to before ``stop``, or of the caller's own."""
        if call.texts is None:
            assert call.tokens is not None
            return call.tokens if stop is None else cut_tokens(call.tokens, first, stop)
        texts = call.texts if stop is None else call.texts[first:stop]
        try:
            return await self._pool.encode(
                texts,
                sum(map(len, texts)),
                truncation=call.truncation,
                prompt=call.prompt,
                deadline_ns=call.deadline_ns,
                meter=call.meter,
            )
        except Overloaded as full:
            self._observer.rejected(
                Rejection(full.policy, full.reason, full.retry_after_ms, full.figures), stage="estimate"
            )
            raise

    def _slot_for(self, engine: EnginePeer, call: Call, tokenized: TokenizedTexts) -> Slot:
        texts = len(tokenized.lengths)
        out = rows_bytes(texts, call.dimensions or self.identity.dimension)
        return self._take_slot(engine, max(tokens_bytes(len(tokenized.ids), texts), out))

    def _take_slot(self, engine: EnginePeer, size: int) -> Slot:
        """Room for one call in what is shared with ``engine``. Raises ``Overloaded``."""
        slot = engine.slots.take(size)
        if slot is not None:
            return slot
        why = f"{size} bytes of ids and vectors have no room beside the calls in flight"
        retry: int | None = ROOM_RETRY_MS
        if size > engine.slots.size:
            why, retry = f"{size} bytes of ids and vectors are more than there is room for", None
        raise self.refusal("memory", "FRONTEND_MEMORY_FULL", f"{why} (server.frontend_memory_bytes)", retry)
