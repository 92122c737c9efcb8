"""The engine as a front end has it: tokenises here, and asks the engine process for the rest.

Decides what is refused before anything crosses, and what becomes of calls when the engine process has gone. Must never
know gRPC, policies or the device. Meets ``engine.surface.EngineSurface``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import orjson

from embedserve.engine.call import Call, Embedded, Portion
from embedserve.engine.engine import verdict_of
from embedserve.engine.intake import cut_tokens, not_serving, stalled
from embedserve.engine.load import NO_LOAD, LoadReport
from embedserve.engine.observer import EngineObserver
from embedserve.engine.tokenization import TokenizerPool, TokenizerSettings, TokenizerUse
from embedserve.engine.watchdog import StallLimits
from embedserve.errors import EngineFailed, Overloaded, StartupError
from embedserve.frontends import frames
from embedserve.frontends.calls import RemoteCalls
from embedserve.frontends.host import Ends
from embedserve.frontends.link import Link, connect_link
from embedserve.frontends.marks import Traces
from embedserve.frontends.memory import SharedMemory, rows_bytes, tokens_bytes
from embedserve.frontends.slots import Slot, SlotAllocator
from embedserve.frontends.stream import RemoteStream, estimate_chars, estimate_tokens
from embedserve.model.backend import ModelIdentity
from embedserve.model.tokenizer import TextTokenizer, TokenizedTexts
from embedserve.scheduling.item import Rejection

__all__ = ["RemoteEngine", "RemoteSettings"]

LOOKS: Final = 4
"""Times in ``stall.stall_ns`` that the engine process's silence is looked at."""
LATE_NS: Final = 100_000_000
"""A look that comes later than this says that this process was stopped, or its loop was: it proves nothing."""
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
    stall: StallLimits
    """How long the engine process may say nothing; it tells its load in ``host.BEATS`` parts of ``stall_ns``."""


class RemoteEngine:
    """The engine process's work, as if it were here. Lives on one event loop."""

    def __init__(
        self,
        ends: Ends,
        *,
        tokenizer: TextTokenizer,
        settings: RemoteSettings,
        observer: EngineObserver,
        traces: Traces,
        on_fatal: Callable[[str], None],
        on_stall: Callable[[int], None] = lambda _age_ns: None,
        on_recovery: Callable[[int], None] = lambda _lasted_ns: None,
    ) -> None:
        """``ends`` are this process's own. The callbacks are ``engine.engine.Engine``'s."""
        self._ends = ends
        self._settings = settings
        self._observer = observer
        self.traces = traces
        """How traces cross; for the streams too."""
        self._on_fatal = on_fatal
        self._on_stall = on_stall
        self._on_recovery = on_recovery
        self._pool = TokenizerPool(tokenizer, settings.tokenizer, observer.tokenized, self._lose_tokenizer)
        self._memory = SharedMemory(ends.memory)
        self._slots = SlotAllocator(settings.memory_bytes)
        self._link: Link | None = None
        self._calls = RemoteCalls(self.send, self._memory, self._slots, traces)
        self.render_metrics: Callable[[str], tuple[str, bytes]] | None = None
        """This process's metrics, for the engine process to show."""
        self.recall: Callable[[], bytes] | None = None
        """What this process remembers of its calls, for the page of the engine process."""
        self._scrapes: set[asyncio.Task[None]] = set()
        self._requests = 0
        self._draining = False
        self._failure: str | None = None
        self._identity: ModelIdentity | None = None
        self._welcome: asyncio.Future[ModelIdentity] | None = None
        self._load: LoadReport | None = None
        self._started_ns = 0
        self._stalled_ns = 0
        self._stalled_since = 0
        self._heard_ns = 0
        self._look: asyncio.TimerHandle | None = None

    # ---------------------------------------------------------------------------------------------------- lifecycle

    async def start(self) -> ModelIdentity:
        """Wait until the engine process is ready. Raises ``StartupError`` when it ends before that."""
        self._welcome = asyncio.get_running_loop().create_future()
        self._link = await connect_link(self._ends.link, self._take, self._lose)
        return await self._welcome

    def drain(self) -> None:
        """Take nothing more; what was taken goes on."""
        self._draining = True

    async def stop(self, timeout_s: float) -> bool:  # noqa: ARG002 - no thread here computes
        """Leave the engine process and end the tokenizer's threads."""
        self.drain()
        if self._look is not None:
            self._look.cancel()
        link, self._link = self._link, None
        if link is not None:
            link.close()
        return await asyncio.get_running_loop().run_in_executor(None, self._pool.close)

    @property
    def stalled(self) -> bool:
        """Whether the device is silent for longer than a pass may take, as was said last."""
        return self._stalled_ns > 0

    @property
    def tokenizer_use(self) -> TokenizerUse:
        """How busy the tokenizer threads are."""
        return self._pool.use

    @property
    def memory_used(self) -> int:
        """Bytes of shared memory that calls hold."""
        return self._slots.used

    @property
    def identity(self) -> ModelIdentity:
        """The model that is served; only after ``start``."""
        assert self._identity is not None
        return self._identity

    def load(self) -> LoadReport:
        """The load as the engine process told it last, which is at most some 50 ms ago while there is work."""
        if self._load is None:
            return NO_LOAD
        uptime = (time.monotonic_ns() - self._started_ns) // 1_000_000_000
        if self._draining or self.stalled or self._failure is not None:
            return replace(self._load, state="not_serving", accepting_requests=False, uptime_seconds=uptime)
        return replace(self._load, uptime_seconds=uptime)

    def _lose_tokenizer(self, death: BaseException) -> None:
        self._fail(f"a tokenizer thread died: {type(death).__name__}: {death}")

    def _lose(self) -> None:
        """The engine process has gone, or we have."""
        if self._link is not None:
            self._fail("the engine process has gone")

    def _fail(self, why: str) -> None:
        """Nothing more will run. Health says so before anybody is told."""
        if self._failure is not None:
            return
        self._failure = why
        self.drain()
        if self._welcome is not None and not self._welcome.done():
            self._welcome.set_exception(StartupError(f"{why} before its model was ready"))
        else:
            self._on_fatal(why)
        error = EngineFailed(why)
        self._calls.fail(error)
        self._pool.fail(error)

    # ------------------------------------------------------------------------------------------------------- frames

    def _take(self, kind: int, call_id: int, body: bytes) -> None:
        """One frame of the engine process."""
        self._heard_ns = time.monotonic_ns()
        if kind == frames.LOAD:
            facts = orjson.loads(body)
            self._load = LoadReport(**facts["load"])
            self._see_stall(facts["stalled_ns"])
        elif kind == frames.SCRAPE:
            task = asyncio.get_running_loop().create_task(self._scrape(call_id, body.decode(errors="surrogateescape")))
            self._scrapes.add(task)
            task.add_done_callback(self._scrapes.discard)
        elif kind == frames.RECALL:
            self.send(frames.RECALLED, call_id, b"" if self.recall is None else self.recall())
        elif kind == frames.WELCOME:
            self._be_welcome(orjson.loads(body))
        elif kind == frames.BROKEN:
            self._fail(body.decode())
        else:
            self._calls.take(kind, call_id, body)

    def _be_welcome(self, facts: dict[str, dict[str, object]]) -> None:
        told = facts["identity"]
        prompts = tuple(tuple(prompt) for prompt in told["prompts"])  # type: ignore[attr-defined]
        self._identity = ModelIdentity(**{**told, "prompts": prompts})  # type: ignore[arg-type]
        self._load = LoadReport(**facts["load"])  # type: ignore[arg-type]
        self._started_ns = time.monotonic_ns()
        self._arm()
        assert self._welcome is not None
        if not self._welcome.done():
            self._welcome.set_result(self._identity)

    def _see_stall(self, stalled_ns: int) -> None:
        before, self._stalled_ns = self._stalled_ns, stalled_ns
        now = time.monotonic_ns()
        if stalled_ns and not before:
            self._stalled_since = now - stalled_ns
            self._on_stall(stalled_ns)
        elif before and not stalled_ns:
            self._on_recovery(now - self._stalled_since)

    def send(self, kind: int, call_id: int, body: bytes = b"") -> None:
        """Send a frame; nothing once the engine process has gone."""
        if self._link is not None:
            self._link.send(kind, call_id, body)

    def _arm(self) -> None:
        """The engine process tells its load again and again, or it is stopped or stuck."""
        pause_ns = self._settings.stall.stall_ns // LOOKS
        due_ns = time.monotonic_ns() + pause_ns
        self._look = asyncio.get_running_loop().call_later(pause_ns / 1e9, self._look_now, due_ns)

    def _look_now(self, due_ns: int) -> None:
        self._look = None
        if self._failure is not None:
            return
        now, stall = time.monotonic_ns(), self._settings.stall
        silent_ns = now - self._heard_ns
        if now - due_ns < LATE_NS:
            if silent_ns >= stall.hang_ns:
                self._fail(f"the engine process has said nothing for {silent_ns / 1e9:.1f} s (health.hang_ms)")
                return
            if silent_ns >= stall.stall_ns and not self.stalled:
                self._see_stall(silent_ns)  # what it says of its load next ends it
        self._arm()

    async def _scrape(self, scrape: int, accept_header: str) -> None:
        """Rendering takes milliseconds: not in the event loop's turn."""
        if self.render_metrics is not None:
            loop = asyncio.get_running_loop()
            _, text = await loop.run_in_executor(None, self.render_metrics, accept_header)
            self.send(frames.SCRAPED, scrape, text)

    # ----------------------------------------------------------------------------------------------------- requests

    async def embed(self, call: Call) -> Embedded:
        """All vectors of one request, in its order. Raises and is cancelled as ``engine.engine.Engine.embed``."""
        self._requests += 1
        crossed, verdict = False, "failed"
        try:
            self._admit(call)
            if call.texts is not None and estimate_chars(call) > self._settings.tokenizer.inline_chars:
                # A call that will be refused must not cost a tokenizer thread's time. What is tokenised on the event
                # loop (some 40 us) costs less than to ask, and is judged when it is tokenised.
                await self._calls.ask(call, estimate_tokens(call))
            tokenized = await self.tokenize(call)
            call.stages.tokenized_ns = time.monotonic_ns()
            call.stages.tokens = len(tokenized.ids)
            slot = self._slot_for(call, tokenized)
            crossed = True
            return await self._calls.embed(call, tokenized, slot)
        except BaseException as error:
            verdict = verdict_of(error)
            raise
        finally:
            self._requests -= 1
            if not crossed:  # otherwise the engine process tells
                self._observer.request_finished(call.stages, verdict=verdict)

    async def embed_stream(self, call: Call) -> AsyncGenerator[Portion, None]:
        """Portions of one request as their batches finish. As ``engine.engine.Engine.embed_stream``."""
        self._requests += 1
        crossed, verdict = False, "failed"
        try:
            self._admit(call)
            items = min(self._settings.piece_items, call.count)
            slot = self._take_slot(rows_bytes(items, call.dimensions or self.identity.dimension))
            call_id = self._calls.new_id()
            stream = RemoteStream(self, call_id, call, slot, self._memory, self._slots)
            self._calls.open_stream(call_id, stream, estimate_tokens(call, items))
            crossed = True
            try:
                async with aclosing(stream.portions()) as portions:
                    async for portion in portions:
                        yield portion
            finally:
                self._calls.close_stream(call_id, stream)
        except BaseException as error:
            verdict = verdict_of(error)
            raise
        finally:
            self._requests -= 1
            if not crossed:
                self._observer.request_finished(call.stages, verdict=verdict)

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

    def _slot_for(self, call: Call, tokenized: TokenizedTexts) -> Slot:
        texts = len(tokenized.lengths)
        out = rows_bytes(texts, call.dimensions or self.identity.dimension)
        return self._take_slot(max(tokens_bytes(len(tokenized.ids), texts), out))

    def _take_slot(self, size: int) -> Slot:
        """Room for one call. Raises ``Overloaded``, or ``EngineFailed`` where the engine process has gone meanwhile."""
        if self._failure is not None:
            raise EngineFailed(self._failure)
        slot = self._slots.take(size)
        if slot is not None:
            return slot
        why = f"{size} bytes of ids and vectors have no room beside the calls in flight"
        retry: int | None = ROOM_RETRY_MS
        if size > self._slots.size:
            why, retry = f"{size} bytes of ids and vectors are more than there is room for", None
        raise self.refusal("memory", "FRONTEND_MEMORY_FULL", f"{why} (server.frontend_memory_bytes)", retry)
