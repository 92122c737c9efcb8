"""The outermost interceptor: what every call has in common, and the wall that no exception passes.

Decides when a call arrived, how long it may take, which one status it ends with and who is told. Must never know what
a call asks for. It is one of the three places where a broad ``except`` is allowed, because grpc.aio sends the text of
an exception that leaves a handler to the client, and sends nothing at all when a ``CancelledError`` that is not the
client's leaves one (grpc#29248).

Only the guarded service is touched: health and reflection pass as they are, so that ``Watch`` keeps working. Handlers
of the guarded service may be coroutines, async generators or coroutines that call ``context.write``.

Under overload a call may be answered before its message is read (``door``). For grpc such a handler takes a stream, of
which it reads the first message or none; on the wire there is no difference. The trace id goes out with the trailers: a
batch of its own for initial metadata costs 46 us of the loop's time a call, the trailers 8 us.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from embedserve.api import status
from embedserve.api.ending import TRACE_ID_KEY, abort, cancelled_from_outside, status_name, write_all
from embedserve.api.observer import CallObserver, Metadata, SilentCallObserver
from embedserve.api.rpc import CALL, Rpc
from embedserve.errors import (
    EmbedServeError,
    InvalidRequest,
    InvariantBroken,
    NotServing,
    Overloaded,
    Violation,
)

__all__ = ["Doorkeeper", "Guard"]

SERVICE: Final = "embedserve.v1.EmbeddingService"
TURNED_AWAY: Final = frozenset({"Embed", "EmbedStream"})
"""Methods whose calls a door may refuse before their message is read: admission is theirs."""
ALWAYS_ANSWERED: Final = frozenset({"GetLoad"})
"""Methods that answer while the server does not accept: a balancer must be able to ask whether it does."""
NOT_SERVING_RETRY_MS: Final = 1000
"""A start or a drain takes seconds, and a balancer has another address."""
MAX_METADATA_BYTES: Final = 16 << 10
"""All metadata of one call, as Core's own limit is meant."""
METADATA_ENTRY_BYTES: Final = 32
"""What an entry counts beside its key and value (RFC 7541, 4.1)."""
LAST_WORD_S: Final = 1.0
"""How long a stream's reader may take to accept its error status. The status waits behind the messages that the reader
has not read, and a reader that has stopped reading must not keep the call in flight."""
ATTEMPTS_KEY: Final = "grpc-previous-rpc-attempts"
"""What gRPC clients send with a retry: how often they have tried this call before (gRFC A6)."""
MAX_ATTEMPT: Final = 5
"""No gRPC client tries a call more often (gRFC A6). What is more, or no number, is somebody's own invention."""


class _Unparsable:
    """Stands for a request that could not be parsed."""

    __slots__ = ("error",)

    def __init__(self, error: Exception, method: str) -> None:
        name = method.rpartition("/")[2]
        violation = Violation("", f"the bytes are not a valid request of {name}", "MALFORMED_MESSAGE")
        self.error = InvalidRequest([violation]) if isinstance(error, DecodeError) else error


Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
OnInternalError = Callable[[str, BaseException], None]
"""Told the id that the client got, and what happened."""
OnFatal = Callable[[BaseException], None]
"""Told that this process must end; called after the client was answered."""
Accepting = Callable[[], bool]
"""Whether calls are taken now."""


class Doorkeeper(Protocol):
    """Turns calls away before their message is read; ``door.Door``."""

    def watched(self, now_ns: int, /) -> bool:
        """Whether calls that arrive now are to be asked about."""

    def refusal(self, call: Rpc, deadline_ns: int | None, now_ns: int) -> status.Reply | None:
        """The answer to a call that is turned away."""


class Guard(grpc.aio.ServerInterceptor):
    """Guards one service. Give it to the server as the first interceptor."""

    def __init__(
        self,
        *,
        on_internal_error: OnInternalError,
        on_fatal: OnFatal,
        accepting: Accepting = lambda: True,
        observer: CallObserver | None = None,
        service: str = SERVICE,
        always_answered: frozenset[str] = ALWAYS_ANSWERED,
        max_metadata_bytes: int = MAX_METADATA_BYTES,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Guard the methods of ``service``, of which those in ``always_answered`` do not ask ``accepting``."""
        self._observer: CallObserver = observer or SilentCallObserver()
        self._accepting = accepting
        self._on_internal_error = on_internal_error
        self._on_fatal = on_fatal
        self._prefix = f"/{service}/"
        self._always_answered = always_answered
        self._max_metadata_bytes = max_metadata_bytes
        self._clock = clock
        self.door: Doorkeeper | None = None
        """Set once there is something to judge by."""
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}
        self._unread: dict[str, Handler] = {}
        """By method: the handlers that are given calls whose message has not been read."""
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        """Calls whose handler has begun and not ended."""
        return self._in_flight

    async def wait_idle(self) -> None:
        """Return when no call is in flight."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Stamp the arrival and give back the guarded handler."""
        method: str = handler_call_details.method
        if not method.startswith(self._prefix):
            return await continuation(handler_call_details)
        call = self._arrive(method[1:], handler_call_details.invocation_metadata)
        CALL.set(call)
        if self.door is not None and self.door.watched(call.arrived_ns):
            unread = self._unread.get(method)
            if unread is not None:
                return unread
        try:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            known = self._wrapped.get(method)
            if known is None or known[0] is not handler:
                known = self._wrapped[method] = (handler, self._wrap(handler, method))
        except Exception as error:  # noqa: BLE001  # an inner interceptor broke, and its text must not go out
            return grpc.unary_unary_rpc_method_handler(self._unary(_raising(error), None, method))
        return known[1]

    def _arrive(self, method: str, metadata: Metadata) -> Rpc:
        call = Rpc(method, metadata, self._clock())
        # Core counts the bytes of the header block, in which an entry of the table takes one byte each time it is
        # named: 4 KB become 4 MB, which would live as long as the call does.
        size = sum([len(key) + len(value) + METADATA_ENTRY_BYTES for key, value in metadata])
        if size > self._max_metadata_bytes:
            call.metadata = ()
            call.refused = Overloaded(
                f"metadata of {size} bytes, at most {self._max_metadata_bytes} are allowed (server.max_metadata_bytes)",
                reason="METADATA_TOO_LARGE",
                policy="metadata",
                retry_after_ms=None,
            )
        return call

    def _wrap(self, handler: Any, method: str) -> Handler:
        if handler.request_streaming:
            raise InvariantBroken(f"{method} takes a stream, which the guard does not know")
        parse = self._parse(handler.request_deserializer, method)
        turned_away = method.removeprefix(self._prefix) in TURNED_AWAY
        if handler.response_streaming:
            streams = self._stream(handler.unary_stream, method)
            if turned_away:
                self._unread[method] = grpc.stream_stream_rpc_method_handler(
                    self._at_the_door(streams, parse), None, handler.response_serializer
                )
            return grpc.unary_stream_rpc_method_handler(streams, parse, handler.response_serializer)
        answers = self._unary(handler.unary_unary, handler.response_serializer, method)
        if turned_away:
            self._unread[method] = grpc.stream_unary_rpc_method_handler(self._at_the_door(answers, parse))
        return grpc.unary_unary_rpc_method_handler(answers, parse)

    def _parse(self, parse: Callable[[bytes], Any] | None, method: str) -> Callable[[bytes], Any]:
        clock = self._clock

        def guarded(raw: bytes) -> Any:
            try:
                message = raw if parse is None else parse(raw)
            except Exception as error:  # noqa: BLE001  # judged in the handler, where the client can be answered
                message = _Unparsable(error, method)
            CALL.get().received_ns = clock()
            return message

        return guarded

    def _unary(
        self, behaviour: Callable[[Any, Any], Awaitable[Any]], serialize: Callable[[Any], bytes] | None, method: str
    ) -> Callable[[Any, Any], Awaitable[bytes]]:
        always = self._is_always_answered(method)

        async def guarded(request: Any, context: Any) -> bytes:
            call = self._enter()
            try:
                self._begin(call, context)
                self._check(request, always=always)
                response = await behaviour(request, context)
                # Serialised here, not by grpc, so that a message that cannot be serialised is an error like any other.
                raw = _as_bytes(response if serialize is None else serialize(response))
                self._end_by_context(call, context)
            except (Exception, asyncio.CancelledError, SystemExit) as error:  # noqa: BLE001  # the wall
                await self._fail(call, context, error)
                return b""  # never sent: a status was
            else:
                return raw
            finally:
                self._leave(call)

        return guarded

    def _stream(self, behaviour: Callable[[Any, Any], Any], method: str) -> Callable[[Any, Any], Awaitable[None]]:
        always = self._is_always_answered(method)
        generator = inspect.isasyncgenfunction(behaviour)

        async def guarded(request: Any, context: Any) -> None:
            call = self._enter()
            try:
                self._begin(call, context)
                self._check(request, always=always)
                if generator:
                    await write_all(behaviour(request, context), context)
                else:
                    await behaviour(request, context)
                self._end_by_context(call, context)
            except (Exception, asyncio.CancelledError, SystemExit) as error:  # noqa: BLE001  # the wall
                await self._fail(call, context, error, LAST_WORD_S)
            finally:
                self._leave(call)

        return guarded

    def _at_the_door(
        self, guarded: Callable[[Any, Any], Awaitable[Any]], parse: Callable[[bytes], Any]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        """The handler of a call whose message was not read; for grpc it takes a stream, which it need not read."""

        async def unread(_messages: Any, context: Any) -> Any:
            if await self._turned_away(CALL.get(), context):
                return b""  # never sent: a status was
            raw = await context.read()
            if raw is grpc.aio.EOF:  # cancelled, or larger than gRPC takes: Core has answered, or nobody is there
                raise asyncio.CancelledError
            return await guarded(parse(raw), context)

        return unread

    async def _turned_away(self, call: Rpc, context: Any) -> bool:
        """Whether the call was refused, and told so, before its message was read."""
        if self.door is None or call.refused is not None or not self._accepting():
            return False
        try:
            remaining_s = context.time_remaining()
            now = self._clock()
            reply = self.door.refusal(call, None if remaining_s is None else now + int(remaining_s * 1e9), now)
        except Exception as error:  # noqa: BLE001  # the wall is around who reads the call
            call.refused = error
            return False
        if reply is None:
            return False
        self._enter()
        try:
            self._begin(call, context)
            self._end(call, reply.code.name, reply.error_type)
        except Exception as error:  # noqa: BLE001  # the wall
            await self._fail(call, context, error)
        else:
            await abort(context, reply, call, within_s=None)
        finally:
            self._leave(call)
        return True

    def _is_always_answered(self, method: str) -> bool:
        return method.removeprefix(self._prefix) in self._always_answered

    def _check(self, request: Any, *, always: bool) -> None:
        """Raise what forbids the call before its handler sees it."""
        if (refused := CALL.get().refused) is not None:
            raise refused
        if not always and not self._accepting():
            raise NotServing(
                "the server is starting or draining", reason="NOT_SERVING", retry_after_ms=NOT_SERVING_RETRY_MS
            )
        if isinstance(request, _Unparsable):
            raise request.error

    # The life of one call

    def _enter(self) -> Rpc:
        """Count the call: whatever happens from here on, ``_leave`` counts it down."""
        call = CALL.get()
        self._in_flight += 1
        if self._in_flight == 1:
            self._idle.clear()
        return call

    def _begin(self, call: Rpc, context: Any) -> None:
        """Its deadline and its trace."""
        remaining_s = context.time_remaining()
        if remaining_s is not None:
            # grpc counts by the wall clock, which may step: read once, and count on by the monotonic clock.
            call.deadline_ns = self._clock() + int(remaining_s * 1e9)
            call.attributes["deadline_ms"] = round(remaining_s * 1e3, 1)
        for key, value in call.metadata:
            if key == ATTEMPTS_KEY:
                call.attributes["attempt"] = _attempt(value)
        call.trace = self._observer.begin(call.method, call.metadata, call.arrived_ns, context.peer())
        if call.trace.trace_id is not None:
            context.set_trailing_metadata(((TRACE_ID_KEY, call.trace.trace_id),))

    def _leave(self, call: Rpc) -> None:
        if not call.ended:  # the loop is closing and the coroutine with it
            self._end(call, "CANCELLED", "CANCELLED")
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()

    def _end(self, call: Rpc, name: str, error_type: str | None) -> None:
        call.ended = True
        try:
            call.trace.end(status=name, stages=call.stages, error_type=error_type, attributes=call.attributes)
        except Exception as error:  # noqa: BLE001  # who watches must not break what is watched
            self._on_internal_error(status.new_error_id(), error)

    def _end_by_context(self, call: Rpc, context: Any) -> None:
        """The handler has returned, or has aborted."""
        code = context.code()
        if code:
            name = status_name(code)
            self._end(call, name, None if name == "OK" else name)
        elif cancelled_from_outside():  # and the handler has swallowed it
            self._end_cancelled(call)
        else:
            self._end(call, "OK", None)

    async def _fail(self, call: Rpc, context: Any, error: BaseException, last_word_s: float | None = None) -> None:
        """End the call for ``error``: answer the client unless it is gone or was answered."""
        if isinstance(error, grpc.aio.AbortError):
            self._end_by_context(call, context)
            raise error
        if cancelled_from_outside():
            self._end_cancelled(call)
            raise asyncio.CancelledError from error
        reply = self._reply(error, call)
        try:
            if context.done():
                self._end_by_context(call, context)
            else:
                self._end(call, reply.code.name, reply.error_type)
                await abort(context, reply, call, within_s=last_word_s)
        finally:
            if isinstance(error, (InvariantBroken, SystemExit)):
                self._on_fatal(error)

    def _reply(self, error: BaseException, call: Rpc) -> status.Reply:
        if isinstance(error, EmbedServeError):
            left_ms = None if call.deadline_ns is None else (call.deadline_ns - self._clock()) / 1e6
            reply = status.reply(error, left_ms=left_ms)
            if isinstance(error, Overloaded):
                call.attributes["policy"] = error.policy
                call.attributes.update(error.figures)
        else:
            reply = status.unexpected(error)
        if reply.error_id is not None:
            call.attributes["error_id"] = reply.error_id
            self._on_internal_error(reply.error_id, error)
        return reply

    def _end_cancelled(self, call: Rpc) -> None:
        late = call.deadline_ns is not None and self._clock() >= call.deadline_ns
        name = "DEADLINE_EXCEEDED" if late else "CANCELLED"
        self._end(call, name, name)


def _attempt(previous: str | bytes) -> int:
    """Which attempt this is, from 2 to ``MAX_ATTEMPT``, by what the client says of its earlier ones."""
    known = len(previous) == 1 and "1" <= str(previous) < str(MAX_ATTEMPT)
    return int(previous) + 1 if known else MAX_ATTEMPT


def _as_bytes(response: Any) -> bytes:
    if not isinstance(response, bytes):
        raise TypeError(f"the answer is {type(response).__name__}, not bytes")
    return response


def _raising(error: BaseException) -> Callable[[Any, Any], Awaitable[Any]]:
    async def raising(_request: Any, _context: Any) -> Any:
        raise error

    return raising
