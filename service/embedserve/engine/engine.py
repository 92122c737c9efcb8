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
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from embedserve.engine.call import Call, Embedded, Portion
from embedserve.engine.driver import Driver
from embedserve.engine.intake import Intake, not_serving
from embedserve.engine.load import LoadReport, report_load
from embedserve.engine.observer import EngineObserver, SilentObserver
from embedserve.engine.pending import WholeRequest
from embedserve.engine.stream import piece_items, stream_portions
from embedserve.engine.tokenization import TokenizerPool, TokenizerSettings
from embedserve.engine.worker import PassResult, Worker, WorkerReady
from embedserve.errors import (
    DeadlineExpired,
    EmbedServeError,
    NotServing,
    Overloaded,
    StartupError,
)
from embedserve.model.backend import BackendFactory, DeviceReport, ModelIdentity
from embedserve.model.tokenizer import TextTokenizer
from embedserve.scheduling.item import Rejection
from embedserve.scheduling.scheduler import Scheduler

__all__ = ["Engine", "EngineSettings"]

_T = TypeVar("_T")

IN_FLIGHT_RETRY_MS = 100
"""When ``max_requests_in_flight`` refuses: a few batches later there is room."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Limits of the engine; defaults are ``config.py``'s."""

    tokenizer: TokenizerSettings
    max_requests_in_flight: int
    """Requests in the engine; one more is refused. The last wall, for memory."""
    batches_in_flight: int
    """Passes that the worker may have: one running, the others prepared."""
    prepare_ahead_ns: int
    """How long before the predicted end of the running pass the next one is closed."""
    warm_up_tokens: int
    stream_window_items: int
    """Items of one stream that are admitted and not yet taken by its reader."""


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
        include_prompt: bool = True,
    ) -> None:
        """Nothing runs before ``start``.

        ``on_fatal`` is called once when nothing more will run: end the process then. ``include_prompt`` says whether
        the checkpoint pools a prompt's tokens.
        """
        self._factory = factory
        self._scheduler = scheduler
        self._settings = settings
        self._observer: EngineObserver = observer or SilentObserver()
        self._on_fatal = on_fatal
        self._pool = TokenizerPool(tokenizer, settings.tokenizer, self._observer.tokenized)
        self._intake = Intake(scheduler, self._pool, self._observer, max_input_length, include_prompt=include_prompt)
        self._started_ns = 0
        self._draining = False
        self._requests = 0
        self._worker: Worker | None = None
        self._driver: Driver | None = None
        self._ready: WorkerReady | None = None

    # ---------------------------------------------------------------------------------------------------- lifecycle

    async def start(self) -> ModelIdentity:
        """Load and warm up the model in the worker thread. Raises ``StartupError``."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[WorkerReady | BaseException] = loop.create_future()
        self._worker = Worker(
            self._factory,
            warm_up_tokens=self._settings.warm_up_tokens,
            on_ready=lambda outcome: _post(loop, ready.set_result, outcome),
            on_result=lambda result: _post(loop, self._take_result, result),
            on_death=lambda death: _post(loop, self._die, death),
        )
        self._driver = Driver(
            self._scheduler,
            self._worker.submit,
            self._observer,
            batches_in_flight=self._settings.batches_in_flight,
            prepare_ahead_ns=self._settings.prepare_ahead_ns,
            on_fatal=self._on_fatal,
        )
        self._worker.start()
        outcome = await ready
        if isinstance(outcome, EmbedServeError):
            raise outcome
        if isinstance(outcome, BaseException):
            raise StartupError(f"the model could not be loaded: {type(outcome).__name__}: {outcome}") from outcome
        self._ready = outcome
        self._started_ns = time.monotonic_ns()
        # The first burst must not be admitted on a guess.
        for sample in outcome.passes:
            self._scheduler.cost.learn(sample.tokens, sample.padded_tokens, sample.elapsed_ns, self._started_ns)
        return outcome.identity

    def drain(self) -> None:
        """Admit nothing more; what was admitted goes on."""
        self._draining = True

    async def idle(self) -> None:
        """Wait until no request is in the engine."""
        driver = self._running
        while self._requests or not driver.idle:
            await driver.change()
        self._scheduler.drain()  # only now: a stream that was admitted must still be able to submit its later windows

    async def stop(self, timeout_s: float) -> bool:
        """End the worker and the tokenizer threads; whether they ended in time."""
        loop = asyncio.get_running_loop()
        self._draining = True
        ended = True
        if self._worker is not None:
            ended = await loop.run_in_executor(None, self._worker.stop, timeout_s)
        self._pool.close()
        return ended

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
        """The device as it was after warm-up; only after ``start``."""
        assert self._ready is not None
        return self._ready.report

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
    def tokenizer_pending(self) -> int:
        """Requests that wait for a tokenizer thread or are in one."""
        return self._pool.pending

    @property
    def _running(self) -> Driver:
        assert self._driver is not None, "the engine was not started"
        return self._driver

    def _take_result(self, result: PassResult) -> None:
        self._running.take_result(result)

    def _die(self, death: BaseException) -> None:
        self._running.fail(f"the worker thread died: {type(death).__name__}: {death}")

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
            self._admit(call)
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
            verdict = _verdict_of(error)
            raise
        finally:
            self._requests -= 1
            # What is told of the end is of no use to the caller: after its answer.
            asyncio.get_running_loop().call_soon(self._finish, call, verdict, time.monotonic_ns())

    async def embed_stream(self, call: Call) -> AsyncGenerator[Portion, None]:
        """Portions of one request as their batches finish, failed texts among them; every index exactly once.

        Work that is admitted and not yet taken is bounded by ``stream_window_items``: a reader that stalls stops its
        own work. Raises as ``embed`` does, but for what concerns single texts. Close the generator to cancel.
        """
        verdict = "cancelled"
        self._requests += 1
        try:
            window = self._settings.stream_window_items
            self._admit(call, piece_items(window))
            # Closed here, not by the garbage collector some turns of the loop later, when the call is said to be over.
            async with aclosing(stream_portions(call, self._intake, self._running, window)) as portions:
                async for portion in portions:
                    yield portion
            verdict = "done"
        except (Exception, asyncio.CancelledError) as error:
            verdict = _verdict_of(error)
            raise
        finally:
            self._requests -= 1
            self._finish(call, verdict, time.monotonic_ns())

    def _admit(self, call: Call, texts: int | None = None) -> None:
        if self._draining or self._ready is None:
            raise not_serving()
        limit = self._settings.max_requests_in_flight
        if self._requests > limit:
            figures = {"in_flight": float(limit)}
            full = Rejection("in_flight", "TOO_MANY_REQUESTS_IN_FLIGHT", IN_FLIGHT_RETRY_MS, figures)
            self._intake.refuse(full, "estimate")
        self._intake.admit(call, texts)

    async def count_tokens(self, texts: Sequence[str], *, prompt: str = "") -> npt.NDArray[np.int32]:
        """Full token counts, shape ``[n]``. Raises ``Overloaded`` or ``NotServing``."""
        if self._draining:
            raise not_serving()
        return await self._pool.count(texts, prompt=prompt)

    def load(self) -> LoadReport:
        """The load now, in well under 100 us."""
        serving = self._ready is not None and not self._draining
        return report_load(self._scheduler, serving=serving, started_ns=self._started_ns)

    def _finish(self, call: Call, verdict: str, now: int) -> None:
        timed_out = verdict == "expired" or (
            verdict == "cancelled" and call.deadline_ns is not None and now >= call.deadline_ns
        )
        if verdict == "done" or timed_out:
            self._scheduler.observe_sojourn(now - call.stages.arrived_ns, now, timed_out=timed_out)
        self._observer.request_finished(call.stages, verdict=verdict)
        if self._draining:
            self._running.notify()


def _verdict_of(error: BaseException) -> str:
    match error:
        case Overloaded() | NotServing():
            return "rejected"
        case DeadlineExpired():
            return "expired"
        case asyncio.CancelledError() | GeneratorExit():
            return "cancelled"
        case _:
            return "failed"


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[[_T], object], argument: _T) -> None:
    """Hand over to the loop from the worker thread; a loop that is closed has nobody left to tell."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback, argument)
