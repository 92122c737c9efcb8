"""Exact time of our own code on the event loop, call by call, taken from outside.

Decides where a slice of the loop's time begins and ends. Must never change what the product does: it wraps methods of
classes before the first object is made, in the benchmark's server process only. A slice is a stretch in which the event
loop runs our code without a break; what lies between slices (waiting for a thread, for the device, for the loop's other
work, for the network) is not counted. One caller at a time, so that every slice is that caller's.

    enter     guard before the message is here; then from the request's bytes: parsing, guard, telemetry's begin,
              validation, early admission, the hand-over to a tokenizer thread
    submit    from the token ids: exact admission, the buckets
    pump      the scheduler closes the batch, the hand-over to the worker
    settle    the result is taken: scheduler, telemetry, the rows given to whoever waits
    respond   encoding, building and serialising the response, telemetry's end, guard: to the response's bytes

Two parts of them are taken apart. ``payload`` is what turns bytes into texts and vectors into bytes: parsing,
validation, encoding, building and serialising. ``handover`` is what giving the texts to a tokenizer thread costs the
loop.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

import grpc
import orjson

from embedserve.api import embedding, wire
from embedserve.api.embedding import EmbeddingServicer
from embedserve.api.guard import Guard
from embedserve.api.rpc import current_rpc
from embedserve.api.validation import RequestValidator
from embedserve.engine.driver import Driver
from embedserve.engine.tokenization import TokenizerPool

__all__ = ["COLUMNS", "ECHO", "TAKE", "install"]

COLUMNS = ("enter", "submit", "pump", "settle", "respond", "handover", "payload", "marks")
"""Of one call, in nanoseconds. ``handover`` is a part of ``enter``, ``payload`` of ``enter`` and ``respond``.
``marks`` is the same time by the product's own ``Stages``: received to admitted, tokenized to queued, computed to
responded."""

PROBE = "embedserve.loadtest.Probe"
ECHO = f"/{PROBE}/Echo"
"""Takes a request of Embed and gives the bytes that Embed last gave for one of that length: gRPC's own cost."""
TAKE = f"/{PROBE}/Take"
"""JSON with a list of ``COLUMNS`` for each call since the last time, and the stopwatch's own cost."""

_T = TypeVar("_T")
_now = time.monotonic_ns


class _Slices:
    """What is known of the call that runs, and of those that have ended."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.answers: dict[int, bytes] = {}
        self.parse_begun = 0
        self.request_bytes = 0
        self.nested = 0
        self.open: dict[str, int] = {}
        self.clear()

    def clear(self) -> None:
        self.open = dict.fromkeys(("intercept", "pump", "settle", "handover", "payload"), 0)

    def end(self, steps: list[int], answer: bytes) -> None:
        """A call has ended, its task having run in ``steps``: enter, submit, respond."""
        stages = current_rpc().stages
        assert stages is not None
        marks = (
            (stages.admitted_ns - stages.arrived_ns)
            + (stages.queued_ns - stages.tokenized_ns)
            + (stages.responded_ns - stages.computed_ns)
        )
        parts, first, last = self.open, steps[0], steps[-1]
        self.calls.append(
            (
                first + parts["intercept"],
                sum(steps[1:-1]),
                parts["pump"],
                parts["settle"],
                last,
                parts["handover"],
                parts["payload"],
                marks,
            )
        )
        self.answers[self.request_bytes] = answer
        self.clear()


class _Steps(Awaitable[_T]):
    """Awaits a coroutine and keeps how long each of its steps took, from being resumed to waiting again."""

    def __init__(self, work: Coroutine[Any, Any, _T], steps: list[int], begun: int = 0) -> None:
        self._work = work
        self._steps = steps
        self._begun = begun

    def __await__(self) -> Generator[Any, Any, _T]:
        work, steps, begun = self._work, self._steps, self._begun or _now()
        resume: Callable[[Any], Any] = work.send
        value: Any = None
        while True:
            try:
                waited_for = resume(value)
            except StopIteration as stop:
                steps.append(_now() - begun)
                result: _T = stop.value
                return result
            steps.append(_now() - begun)
            try:
                value, resume = (yield waited_for), work.send
            except BaseException as error:  # noqa: BLE001 - handed on to the coroutine, which must see it
                value, resume = error, work.throw
            begun = _now()


def install() -> None:
    """Wrap the product's classes. Call it before any of them is used, in a process that does nothing but measure."""
    slices = _Slices()
    _wrap_guard(slices)
    _wrap_payload(slices)
    _wrap_driver(slices)
    _wrap_pool(slices)
    _add_probe(slices)


def _wrap_guard(slices: _Slices) -> None:
    wrap, intercept = Guard._wrap, Guard.intercept_service  # noqa: SLF001 - from outside, on purpose

    async def timed_intercept(self: Guard, continuation: Any, details: Any) -> Any:
        steps: list[int] = []
        handler = await _Steps(intercept(self, continuation, details), steps)
        slices.open["intercept"] += sum(steps)
        return handler

    def timed_wrap(self: Guard, handler: Any, method: str) -> Any:
        if not method.endswith("/Embed"):
            return wrap(self, handler, method)
        inner = handler._replace(request_deserializer=_timed(slices, "payload", handler.request_deserializer))
        guarded: Any = wrap(self, inner, method)
        parse, behaviour = guarded.request_deserializer, guarded.unary_unary

        def timed_parse(raw: bytes) -> Any:
            slices.request_bytes = len(raw)
            slices.parse_begun = _now()
            return parse(raw)

        async def timed_behaviour(request: Any, context: Any) -> bytes:
            steps: list[int] = []
            # The first step begins with the parsing: gRPC calls us right after it, without giving the loop away.
            answer: bytes = await _Steps(behaviour(request, context), steps, slices.parse_begun)
            slices.end(steps, answer)
            return answer

        return guarded._replace(request_deserializer=timed_parse, unary_unary=timed_behaviour)

    Guard._wrap, Guard.intercept_service = timed_wrap, timed_intercept  # type: ignore[method-assign, assignment]  # noqa: SLF001


def _timed(slices: _Slices, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*arguments: Any, **keywords: Any) -> Any:
        begun = _now()
        try:
            return function(*arguments, **keywords)
        finally:
            slices.open[name] += _now() - begun

    return timed


def _wrap_payload(slices: _Slices) -> None:
    for holder, name in (
        (RequestValidator, "embed"),
        (embedding, "encode"),
        (wire, "unary_parts"),
        (wire, "stage_timings"),
        (wire, "finish_unary"),
    ):
        setattr(holder, name, _timed(slices, "payload", getattr(holder, name)))


def _wrap_driver(slices: _Slices) -> None:
    def timed(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def outermost(self: Driver, *arguments: Any) -> Any:
            if slices.nested:  # a part of the slice that has begun
                return method(self, *arguments)
            slices.nested, begun = 1, _now()
            try:
                return method(self, *arguments)
            finally:
                slices.open[name] += _now() - begun
                slices.nested = 0

        return outermost

    Driver._pump = timed(Driver._pump, "pump")  # type: ignore[method-assign]  # noqa: SLF001
    Driver._fired = timed(Driver._fired, "pump")  # type: ignore[method-assign]  # noqa: SLF001
    Driver.take_result = timed(Driver.take_result, "settle")  # type: ignore[method-assign]


def _wrap_pool(slices: _Slices) -> None:
    TokenizerPool._hand_over = _timed(slices, "handover", TokenizerPool._hand_over)  # type: ignore[method-assign]  # noqa: SLF001


def _add_probe(slices: _Slices) -> None:
    add_to = EmbeddingServicer.add_to

    async def echo(request: bytes, _context: Any) -> bytes:
        return slices.answers[len(request)]

    async def take(_request: bytes, _context: Any) -> bytes:
        calls, slices.calls = slices.calls, []
        return orjson.dumps({"columns": COLUMNS, "calls": calls, "stopwatch_ns": await _own_cost()})

    def add_both(self: EmbeddingServicer, server: grpc.aio.Server) -> None:
        add_to(self, server)
        served = (("Echo", echo), ("Take", take))
        methods: dict[str, Any] = {name: grpc.unary_unary_rpc_method_handler(do) for name, do in served}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(PROBE, methods),))

    EmbeddingServicer.add_to = add_both  # type: ignore[method-assign]


async def _own_cost(rounds: int = 2000) -> float:
    """What one step costs by being timed, in nanoseconds: part of every figure, not taken off."""

    async def nothing() -> None:
        return

    begun = _now()
    for _ in range(rounds):
        await nothing()
    bare = _now() - begun
    steps: list[int] = []
    for _ in range(rounds):
        await _Steps(nothing(), steps)
    return (_now() - begun - 2 * bare) / rounds
