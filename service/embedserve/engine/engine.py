"""The engine: texts in, vectors out, for whatever front end sits before it.

Decides the order of a request's steps: early admission, tokenising, exact admission, waiting, answering. Must never
know a transport: no gRPC, no protobuf, no HTTP, no telemetry SDK. Its futures end with an answer or an exception; they
are never cancelled, because a CancelledError inside a gRPC handler sends the client nothing at all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from embedserve.engine.call import Call, Embedded, Portion
from embedserve.engine.canary import CANARY_TEXT, Canary, CanarySettings
from embedserve.engine.driver import Driver
from embedserve.engine.intake import Intake, not_serving, stalled
from embedserve.engine.load import LoadReport, report_load
from embedserve.engine.observer import EngineObserver, SilentObserver
from embedserve.engine.pending import WholeRequest
from embedserve.engine.probe import send_probe
from embedserve.engine.stream import Window, stream_portions
from embedserve.engine.tokenization import TokenizerPool, TokenizerSettings, TokenizerUse
from embedserve.engine.unread import UnreadAdmission
from embedserve.engine.wall import post, settle, walled
from embedserve.engine.watchdog import StallLimits, Watchdog
from embedserve.engine.worker import Worker, WorkerReady
from embedserve.errors import (
    DeadlineExpired,
    EmbedServeError,
    EngineFailed,
    NotServing,
    Overloaded,
    StartupError,
)
from embedserve.model.backend import BackendFactory, DeviceReport, ModelIdentity
from embedserve.model.tokenizer import TextTokenizer
from embedserve.scheduling.item import Rejection
from embedserve.scheduling.scheduler import Scheduler

__all__ = ["Engine", "EngineSettings", "verdict_of"]

IN_FLIGHT_RETRY_MS = 100
"""When ``max_requests_in_flight`` refuses: a few batches later there is room."""


OVERLAP_SHARE: Final = 0.25
"""Of a pass: the next one is closed no earlier before its end. With few callers passes are short, and one that is
closed while the first has hardly begun takes one or two of their texts."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Limits of the engine; defaults are ``config.py``'s."""

    tokenizer: TokenizerSettings
    max_requests_in_flight: int
    """Requests in the engine; one more is refused. The last wall, for memory."""
    batches_in_flight: int
    """Passes that the worker may have: one running, the others prepared."""
    prepare_ahead_ns: int
    """How long before the predicted end of the running pass the next one is closed, on a device that takes one."""
    overlap_ahead_ns: int
    """The most of it on a device that takes two passes at once."""
    warm_up_tokens: int
    stream_window_items: int
    """Items of one stream that are admitted and not yet taken by its reader."""
    stall: StallLimits = field(default_factory=StallLimits)
    canary: CanarySettings = field(default_factory=CanarySettings)

    def ahead_ns(self, passes_at_once: int, pass_ns: int) -> int:
        """How long before the end of a pass of ``pass_ns`` the next one is closed."""
        if passes_at_once == 1:
            return self.prepare_ahead_ns
        return min(self.overlap_ahead_ns, max(self.prepare_ahead_ns, int(pass_ns * OVERLAP_SHARE)))


class Engine:
    """One model on one device. Lives on one event loop."""

    def __init__(
        self,
        *,
        factory: BackendFactory,
        tokenizer: TextTokenizer,
        max_input_length: int,
        scheduler: Scheduler,
        settings: EngineSettings,
        observer: EngineObserver | None = None,
        on_fatal: Callable[[str], None] = lambda _why: None,
        on_stall: Callable[[int], None] = lambda _age_ns: None,
        on_recovery: Callable[[int], None] = lambda _lasted_ns: None,
        on_compilation: Callable[[DeviceReport], None] = lambda _report: None,
        include_prompt: bool = True,
    ) -> None:
        """Nothing runs before ``start``.

        ``on_fatal`` is called once when nothing more will run: end the process then. ``on_stall`` is told how long the
        device has been silent when that is too long, ``on_recovery`` how long the stall was; between the two calls are
        refused. ``on_compilation`` is told once how the compilation of the model went, if there was one.
        ``include_prompt`` says whether the checkpoint pools a prompt's tokens.
        """
        self._factory = factory
        self._scheduler = scheduler
        self._settings = settings
        self._observer: EngineObserver = observer or SilentObserver()
        self._on_fatal = on_fatal
        self._on_stall = on_stall
        self._on_recovery = on_recovery
        self._on_compilation = on_compilation
        self._pool = TokenizerPool(tokenizer, settings.tokenizer, self._observer.tokenized, self._lose_tokenizer)
        self.unread = UnreadAdmission(scheduler, self._observer, self._takes)
        """Who refuses calls before they are read."""
        self._intake = Intake(
            scheduler, self._pool, self._observer, max_input_length, self.unread, include_prompt=include_prompt
        )
        self._finish_walled = walled(self._finish, self._break)
        self._started_ns = 0
        self._draining = False
        self._requests = 0
        self._worker: Worker | None = None
        self._driver: Driver | None = None
        self._watchdog: Watchdog | None = None
        self._canary: Canary | None = None
        self._serving = False
        self._ready: WorkerReady | None = None

    # ---------------------------------------------------------------------------------------------------- lifecycle

    async def start(self) -> ModelIdentity:
        """Load and warm up the model in the worker thread, and see one text answered. Raises ``StartupError``."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[WorkerReady | BaseException] = loop.create_future()
        driver = self._driver = self._assemble(loop, ready)
        assert self._worker is not None
        self._worker.start()
        outcome = await ready
        if isinstance(outcome, EmbedServeError):
            raise outcome
        if isinstance(outcome, BaseException):
            raise StartupError(f"the model could not be loaded: {type(outcome).__name__}: {outcome}") from outcome
        now = time.monotonic_ns()
        if outcome.report.batch_tokens_max:
            self._scheduler.cap_batches(outcome.report.batch_tokens_max)
        # The first burst must not be admitted on a guess.
        for sample in outcome.passes:
            self._scheduler.cost.learn(sample.tokens, sample.padded_tokens, sample.elapsed_ns, now)
        canary = self._canary = self._make_canary(driver)
        await canary.first(outcome.identity.dimension, self._settings.stall.hang_ns)
        self._ready = outcome
        self._started_ns = time.monotonic_ns()
        self._serving = True
        canary.start()
        return outcome.identity

    def _assemble(self, loop: asyncio.AbstractEventLoop, ready: asyncio.Future[WorkerReady | BaseException]) -> Driver:
        """Worker, watchdog and driver, each of which calls another."""
        watchdog = self._watchdog = Watchdog(
            self._settings.stall,
            call_later=lambda delay_s, look: loop.call_later(delay_s, walled(look, self._break)),
            on_stall=self._stall,
            on_recovery=self._recover,
            on_hang=lambda age_ns: driver.fail(f"a pass has been at work for {age_ns / 1e9:.1f} s (health.hang_ms)"),
        )
        take_compilation = walled(self._take_compilation, self._break)
        worker = self._worker = Worker(
            self._factory,
            warm_up_tokens=self._settings.warm_up_tokens,
            on_ready=lambda outcome: post(loop, settle, ready, outcome),
            on_result=lambda result: post(loop, self._take_result_walled, result),
            on_death=lambda death: post(loop, self._die, death),
            on_compilation=lambda report: post(loop, take_compilation, report),
        )
        driver = Driver(
            self._scheduler,
            worker.submit,
            self._observer,
            watchdog,
            batches_in_flight=self._settings.batches_in_flight,
            prepare_ahead_ns=lambda pass_ns: self._settings.ahead_ns(worker.passes_at_once, pass_ns),
            judge_probe=lambda vector: None if self._canary is None else self._canary.judge(vector),
            on_fatal=self._fail,
        )
        self._take_result_walled = walled(driver.take_result, self._break)
        return driver

    def _make_canary(self, driver: Driver) -> Canary:
        assert self._watchdog is not None
        return Canary(
            self._settings.canary,
            send=lambda: send_probe(CANARY_TEXT, self._pool, self._intake, driver),
            last_good_ns=lambda: driver.last_good_ns,
            on_outcome=self._observer.canary,
            on_wrong=driver.fail,
            on_overdue=self._watchdog.overdue,
        )

    def drain(self) -> None:
        """Admit nothing more; what was admitted goes on."""
        self._draining = True
        if self._canary is not None:
            self._canary.stop()

    async def idle(self) -> None:
        """Wait until no request is in the engine."""
        driver = self._running
        while self._requests or not driver.idle:
            await driver.change()
        self._scheduler.drain()  # only now: a stream that was admitted must still be able to submit its later windows

    async def stop(self, timeout_s: float) -> bool:
        """End the worker and the tokenizer threads; whether they ended in time."""
        loop = asyncio.get_running_loop()
        self.drain()
        if self._watchdog is not None:
            self._watchdog.stop()
        ended = True
        if self._worker is not None:
            ended = await loop.run_in_executor(None, self._worker.stop, timeout_s)
        return await loop.run_in_executor(None, self._pool.close) and ended

    @property
    def stalled(self) -> bool:
        """Whether the device is silent for longer than a pass may take."""
        return self._watchdog is not None and self._watchdog.stalled

    @property
    def pass_age_ns(self) -> int:
        """How long the running pass has been at work; 0 while none runs."""
        return 0 if self._watchdog is None else self._watchdog.age_ns(time.monotonic_ns())

    @property
    def loaded(self) -> bool:
        """Whether ``start`` has succeeded."""
        return self._ready is not None

    @property
    def identity(self) -> ModelIdentity:
        """The model that is served; only after ``start``."""
        assert self._ready is not None
        return self._ready.identity

    @property
    def device(self) -> DeviceReport:
        """The device as it was lately, a second before the last pass at most; only after ``start``."""
        assert self._ready is not None and self._worker is not None  # noqa: PT018
        return self._worker.device or self._ready.report

    @property
    def warm_up_ns(self) -> int:
        """Loading and warm-up together; only after ``start``."""
        assert self._ready is not None
        return self._ready.warm_up_ns

    @property
    def scheduler(self) -> Scheduler:
        """For telemetry: to read, never to call."""
        return self._scheduler

    @property
    def requests(self) -> int:
        """Requests in the engine now."""
        return self._requests

    @property
    def tokenizer_use(self) -> TokenizerUse:
        """How busy the tokenizer threads are."""
        return self._pool.use

    @property
    def _running(self) -> Driver:
        assert self._driver is not None, "the engine was not started"
        return self._driver

    def _break(self, error: Exception) -> None:
        self._running.broken(error)

    def _die(self, death: BaseException) -> None:
        self._running.fail(f"the worker thread died: {type(death).__name__}: {death}")

    def _lose_tokenizer(self, death: BaseException) -> None:
        self._running.fail(f"a tokenizer thread died: {type(death).__name__}: {death}")

    def _fail(self, why: str) -> None:
        """Nothing more will run. Health says so before anybody is told, those who wait for a tokenizer too."""
        self.drain()
        if self._serving:
            self._serving = False
            self._on_fatal(why)
        self._pool.fail(EngineFailed(why))

    def _stall(self, age_ns: int) -> None:
        if self._serving:
            self._observer.stalled()
            self._on_stall(age_ns)

    def _recover(self, lasted_ns: int) -> None:
        if self._serving:
            self._on_recovery(lasted_ns)

    def _take_compilation(self, report: DeviceReport) -> None:
        if report.compiled:
            self._pool.yield_to_the_loop()
            self._observer.model_swapped("compiled", report.compile_s, cached=report.compile_cached)
        else:
            self._observer.compile_failed(report.compile_s)
        self._on_compilation(report)

    # ----------------------------------------------------------------------------------------------------- requests

    async def embed(self, call: Call) -> Embedded:
        """All vectors of one request, in its order.

        Raises ``InvalidRequest`` (a text is too long), ``Overloaded``, ``NotServing``, ``DeadlineExpired`` or a
        ``ServerFault``. On cancellation the request leaves its queue at once.
        """
        stages = call.stages
        verdict = "failed"
        self._requests += 1
        try:
            self.admit(call)
            tokenized = await self._intake.tokenize(call)
            stages.tokenized_ns = time.monotonic_ns()
            lengths = tokenized.lengths.tolist()
            self._intake.refuse_unusable(call, lengths)
            future: asyncio.Future[Embedded] = asyncio.get_running_loop().create_future()
            submission = self._intake.submission(call, lengths, self._intake.new_flow())
            pending = WholeRequest(
                submission, call, tokenized.ids, tokenized.truncated, self._intake.skip(tokenized), future
            )
            stages.tokens = len(tokenized.ids)
            rejection = self._running.submit(pending)
            if rejection is not None:
                self._intake.refuse(rejection, "exact")
            try:
                embedded = await future
            except asyncio.CancelledError:
                self._running.cancel(pending)
                raise
            verdict = "done"
            return embedded
        except BaseException as error:
            verdict = verdict_of(error)
            raise
        finally:
            self._requests -= 1
            # What is told of the end is of no use to the caller: after its answer.
            asyncio.get_running_loop().call_soon(self._finish_walled, call, verdict, time.monotonic_ns())

    async def embed_stream(self, call: Call) -> AsyncGenerator[Portion, None]:
        """Portions of one request as their batches finish, failed texts among them; every index exactly once.

        Work that is admitted and not yet taken is bounded by a ``Window``: a reader that stalls stops its
        own work. Raises as ``embed`` does, but for what concerns single texts. Close the generator to cancel.
        """
        verdict = "cancelled"
        self._requests += 1
        try:
            window = Window(call, self._intake, self._settings.stream_window_items)
            self.admit(call, window.piece)
            # Closed here, not by the garbage collector some turns of the loop later, when the call is said to be over.
            async with aclosing(stream_portions(call, self._intake, self._running, window)) as portions:
                async for portion in portions:
                    yield portion
            verdict = "done"
        except (Exception, asyncio.CancelledError) as error:
            verdict = verdict_of(error)
            raise
        finally:
            self._requests -= 1
            self._finish(call, verdict, time.monotonic_ns())

    def admit(self, call: Call, texts: int | None = None) -> None:
        """Early admission of ``call``, or of a stream's first ``texts``: raises as ``embed`` does, takes no place."""
        if self._draining or self._ready is None:
            raise not_serving()
        assert self._watchdog is not None
        if self._watchdog.stalled:
            raise stalled()
        self._refuse_beyond_room()
        self._intake.admit(call, texts)

    def _takes(self) -> bool:
        """Whether ``admit`` would ask the scheduler at all."""
        return self._open and not self._full

    @property
    def _open(self) -> bool:
        return self._ready is not None and not self._draining and not self.stalled

    @property
    def _full(self) -> bool:
        return self._requests >= self._settings.max_requests_in_flight

    def _refuse_beyond_room(self) -> None:
        limit = self._settings.max_requests_in_flight
        if self._requests > limit:
            why = "TOO_MANY_REQUESTS_IN_FLIGHT"
            self._intake.refuse(
                Rejection("in_flight", why, IN_FLIGHT_RETRY_MS, {"in_flight": float(limit)}), "estimate"
            )

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
            self._running.notify()  # a drain may have begun meanwhile

    def load(self) -> LoadReport:
        """The load now, in well under 100 us."""
        return report_load(self._scheduler, serving=self._open, started_ns=self._started_ns, full=self._full)

    def _finish(self, call: Call, verdict: str, now: int) -> None:
        timed_out = verdict == "expired" or (
            verdict == "cancelled" and call.deadline_ns is not None and now >= call.deadline_ns
        )
        if verdict == "done" or timed_out:
            self._scheduler.observe_sojourn(now - call.stages.arrived_ns, now, timed_out=timed_out)
        self._observer.request_finished(call.stages, verdict=verdict)
        if self._draining:
            self._running.notify()


def verdict_of(error: BaseException) -> str:
    """What observers call a request that ended so."""
    match error:
        case Overloaded() | NotServing():
            return "rejected"
        case DeadlineExpired():
            return "expired"
        case asyncio.CancelledError() | GeneratorExit():
            return "cancelled"
        case _:
            return "failed"
