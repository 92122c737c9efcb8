"""Calls that are refused before their message is read, over a real connection; and those that are read after all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from embedserve import errors
from embedserve.api import status
from embedserve.api.guard import SERVICE
from embedserve.api.rpc import Rpc
from embedserve.api.server import ServerOptions
from embedserve.v1 import embedding_pb2 as pb
from tests.integration.api.conftest import Served
from tests.unit.telemetry.pipeline import make_pipeline

SECRET = "/srv/secret"
METHODS = ("Embed", "EmbedStream")
LIMIT_S = 10.0
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
OVERLOADED = errors.Overloaded(
    "shed by queue: queue full", reason="QUEUE_FULL", policy="queue", retry_after_ms=1_000, figures={"queued_items": 4}
)
TOO_LARGE = ServerOptions().max_receive_message_bytes + 1


class Doors:
    """A door that refuses, lets through or breaks, as it is told."""

    def __init__(self, answer: Callable[[Rpc], status.Reply | None]) -> None:
        self.answer = answer
        self.watching = True
        self.asked: list[tuple[Rpc, int | None, int]] = []

    def watched(self, now_ns: int) -> bool:
        return self.watching

    def refusal(self, call: Rpc, deadline_ns: int | None, now_ns: int) -> status.Reply | None:
        self.asked.append((call, deadline_ns, now_ns))
        return self.answer(call)


def closed(call: Rpc) -> status.Reply:
    call.attributes["policy"] = "queue"
    return status.reply(OVERLOADED)


def opened(call: Rpc) -> None:
    return None


class Reads:
    """A deserialiser that counts."""

    def __init__(self) -> None:
        self.raw: list[bytes] = []

    def __call__(self, raw: bytes) -> bytes:
        self.raw.append(raw)
        if raw == b"not a message":
            pb.EmbedRequest.FromString(b"\xff\xff")
        return raw


class Started:
    """A server whose handlers answer with what they are sent."""

    def __init__(self, served: Served, reads: Reads) -> None:
        self.served, self.reads = served, reads

    def open_(self, method: str, **options: Any) -> Any:
        """A call of which nothing but the headers has been sent."""
        path = f"/{SERVICE}/{method}"
        of = self.served.channel.stream_unary if method != "EmbedStream" else self.served.channel.stream_stream
        return of(path)(**options)

    async def told(self, call: Any, method: str) -> tuple[list[bytes], grpc.StatusCode, str, dict[str, Any]]:
        """All that a client sees of a call."""
        answers: list[bytes] = []
        async with asyncio.timeout(LIMIT_S):
            try:
                if method == "EmbedStream":
                    while (message := await call.read()) is not grpc.aio.EOF:
                        answers.append(message)
                else:
                    answers.append(await call)
            except (grpc.aio.AioRpcError, asyncio.CancelledError, asyncio.InvalidStateError):
                pass
            trailers = dict(await call.trailing_metadata() or ())
            return answers, await call.code(), await call.details() or "", trailers

    async def ask(self, method: str, *messages: bytes, **options: Any) -> Any:
        """Send all of a call at once; what the client sees."""
        call = self.open_(method, **options)
        try:
            for message in messages:
                await call.write(message)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            pass  # it was answered already
        return await self.told(call, method)

    async def idle(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            await self.served.guard.wait_idle()


async def echo(request: bytes, context: Any) -> bytes:
    if request == b"break":
        raise ValueError(SECRET)
    if request == b"abort":
        await context.abort(grpc.StatusCode.ABORTED, "so it is", (("why", "because"),))
    if request == b"refuse":
        raise OVERLOADED
    if request == b"wait":
        await asyncio.sleep(LIMIT_S)
    return b"<" + request + b">"


async def echoes(request: bytes, context: Any) -> AsyncIterator[bytes]:
    yield b"first"
    yield await echo(request, context)


@pytest.fixture
async def start(serve: Any) -> Callable[..., Any]:
    async def started(door: Any = None, **options: Any) -> Started:
        reads = Reads()
        unary = grpc.unary_unary_rpc_method_handler(echo, reads)
        handlers = {
            **dict.fromkeys(("Embed", "GetLoad", "CountTokens", "ListModels"), unary),
            "EmbedStream": grpc.unary_stream_rpc_method_handler(echoes, reads),
        }
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        served = await serve(add=lambda server: server.add_generic_rpc_handlers((generic,)), **options)
        made = Started(served, reads)
        for method in handlers:  # a method is known from its first call on
            await made.ask(method, b"")
        await made.idle()
        served.recorder.traces.clear()
        reads.raw.clear()
        served.recorder.trace_id = TRACE_ID
        served.guard.door = door
        return made

    return started


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """grpc has nothing to complain of, nor has asyncio."""
    yield
    complaints = [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.split(".")[0] in GRPC]
    assert [r.getMessage() for r in complaints] == []


GRPC = {"grpc", "asyncio"}


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until ``condition`` holds."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - all that is known
            await asyncio.sleep(0)


def details_of(trailers: dict[str, Any]) -> tuple[error_details_pb2.ErrorInfo, float | None]:
    info, retry, wait_ms = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), None
    found = rpc_status.status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    for detail in found.details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            wait_ms = retry.retry_delay.ToNanoseconds() / 1e6
    return info, wait_ms


@pytest.mark.parametrize("method", METHODS)
class TestTurnedAway:
    """Refused on the headers."""

    async def test_before_there_is_a_message(self, start: Any, method: str) -> None:
        """The client has sent its headers, and sends nothing more."""
        started = await start(Doors(closed))
        answers, code, message, _ = await started.told(started.open_(method), method)

        assert (answers, code, message) == ([], grpc.StatusCode.RESOURCE_EXHAUSTED, "shed by queue: queue full")
        assert started.reads.raw == []

    async def test_its_message_is_not_parsed(self, start: Any, method: str) -> None:
        started = await start(Doors(closed))
        for message in (b"hello", b"x" * 1_000_000):
            assert (await started.ask(method, message))[1] is grpc.StatusCode.RESOURCE_EXHAUSTED
        await started.idle()

        assert started.reads.raw == []
        assert started.served.guard.in_flight == 0

    async def test_all_that_a_client_is_told_is_as_in_an_ordinary_refusal(self, start: Any, method: str) -> None:
        started = await start()
        answers, code, message, ordinary = await started.ask(method, b"refuse")
        started.served.guard.door = Doors(closed)
        _, code_unread, message_unread, unread = await started.ask(method, b"refuse")

        assert answers == ([] if method == "Embed" else [b"first"])
        assert (code_unread, message_unread) == (code, message)
        assert list(unread) == list(ordinary)
        assert unread["x-trace-id"] == ordinary["x-trace-id"] == TRACE_ID
        assert details_of(unread)[0] == details_of(ordinary)[0]
        assert details_of(unread)[0].reason == "QUEUE_FULL"

    async def test_it_is_told_once_to_who_watches(self, start: Any, method: str) -> None:
        started = await start(Doors(closed))
        await started.ask(method, b"hello", timeout=30)
        await started.idle()

        (trace,), end = started.served.recorder.traces, started.served.recorder.end
        assert trace.method == f"{SERVICE}/{method}"
        assert trace.peer.startswith("ipv4:127.0.0.1")
        assert (end.status, end.error_type, end.stages) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", None)
        assert end.attributes["policy"] == "queue"
        assert end.attributes["deadline_ms"] == pytest.approx(30_000, abs=1_000)

    async def test_a_sampled_one_has_a_span(self, start: Any, method: str) -> None:
        """In its caller's trace, with the policy, and nothing of the message that nobody read."""
        started, pipeline, text = await start(Doors(closed)), make_pipeline(), b"xylophonequartz"
        started.served.guard._observer = pipeline.calls
        parent = (("traceparent", f"00-{TRACE_ID}-00f067aa0ba902b7-01"),)
        *_, trailers = await started.ask(method, text, metadata=parent)
        await started.idle()

        (span,) = pipeline.finish()
        assert trailers["x-trace-id"] == TRACE_ID
        assert (span.name, f"{span.context.trace_id:032x}") == (f"{SERVICE}/{method}", TRACE_ID)
        assert span.attributes is not None
        assert span.attributes["rpc.response.status_code"] == "RESOURCE_EXHAUSTED"
        assert "queue" in span.attributes.values()
        assert text.decode() not in span.to_json()

    async def test_the_door_is_told_when_it_came_and_until_when_it_waits(self, start: Any, method: str) -> None:
        door = Doors(closed)
        started = await start(door)
        await started.ask(method, b"hello", timeout=30)
        await started.ask(method, b"hello")

        (call, deadline_ns, now_ns), (_, none, _) = door.asked
        assert deadline_ns is not None
        assert deadline_ns - now_ns == pytest.approx(30e9, abs=1e9)
        assert call.arrived_ns <= now_ns
        assert none is None

    async def test_a_hundred_at_once(self, start: Any, method: str) -> None:
        started = await start(Doors(closed))
        ends = await asyncio.gather(*(started.ask(method, b"hello") for _ in range(100)))
        await started.idle()

        assert {code for _, code, _, _ in ends} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert len({details_of(trailers)[1] for *_, trailers in ends}) > 50
        assert len(started.served.recorder.traces) == 100

    async def test_nobody_is_once_it_is_no_longer_watched(self, start: Any, method: str) -> None:
        door = Doors(closed)
        started = await start(door)
        door.watching = False

        assert (await started.ask(method, b"hello"))[0][-1] == b"<hello>"
        assert door.asked == []


class TestNeverTurnedAway:
    @pytest.mark.parametrize("method", ["GetLoad", "CountTokens", "ListModels"])
    async def test_methods_without_admission(self, start: Any, method: str) -> None:
        door = Doors(closed)
        started = await start(door)

        assert (await started.ask(method, b"hello"))[0] == [b"<hello>"]
        assert door.asked == []

    @pytest.mark.parametrize("method", METHODS)
    async def test_who_is_refused_for_more_than_the_load_is_told_that(self, start: Any, method: str) -> None:
        """Metadata over the limit; a server that does not accept."""
        door, accepts = Doors(closed), True
        started = await start(door, accepting=lambda: accepts, max_metadata_bytes=1_000)
        large = await started.ask(method, b"hello", metadata=(("x-large", "x" * 1_000),))
        accepts = False
        stopping = await started.ask(method, b"hello")

        assert large[1] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details_of(large[3])[0].reason == "METADATA_TOO_LARGE"
        assert stopping[1] is grpc.StatusCode.UNAVAILABLE
        assert details_of(stopping[3])[0].reason == "NOT_SERVING"
        assert door.asked == []


@pytest.mark.parametrize("method", METHODS)
class TestReadAfterAll:
    """Who is let through sees no difference; nor does who watches."""

    async def both(self, start: Any, do: Callable[[Started], Any]) -> tuple[Any, Any]:
        """What comes of something without a door, and with one that lets everybody through."""
        found = []
        for door in (None, Doors(opened)):
            started = await start(door)
            seen = await do(started)
            await started.idle()
            ends = [
                (
                    e.status,
                    e.error_type,
                    {k: v for k, v in e.attributes.items() if k not in ("error_id", "deadline_ms")},
                )
                for trace in started.served.recorder.traces
                for e in trace.ends
            ]
            found.append((seen, ends, started.reads.raw, len(started.served.recorder.internal)))
            assert door is None or door.asked
        return found[0], found[1]

    @pytest.mark.parametrize(
        "messages",
        [
            (b"hello",),
            (b"",),
            (b"x" * 1_000_000,),
            (b"break",),
            (b"abort",),
            (b"refuse",),
            (b"not a message",),
            (b"x" * TOO_LARGE,),
            (b"one", b"two"),
        ],
        ids=lambda m: repr(m) if sum(map(len, m)) < 100 else f"{sum(map(len, m))} bytes",
    )
    async def test_every_end(self, start: Any, method: str, messages: tuple[bytes, ...]) -> None:
        """An answer, a failure, a message that is too large or is none, one too many."""

        async def do(started: Started) -> Any:
            answers, code, message, trailers = await started.ask(method, *messages)
            if "grpc-status-details-bin" in trailers:
                info, wait_ms = details_of(trailers)
                id_ = info.metadata["error_id"]
                return answers, code, message.replace(id_ or "-", ""), info.reason, wait_ms is None, sorted(trailers)
            return answers, code, message, trailers

        without, with_door = await self.both(start, do)

        assert with_door == without

    async def test_a_client_that_leaves_before_its_message(self, start: Any, method: str) -> None:
        async def do(started: Started) -> Any:
            call = started.open_(method)
            await asyncio.gather(*(started.ask(method, b"hello") for _ in range(3)))  # its headers are there
            call.cancel()
            await started.ask(method, b"hello")
            return await call.code()

        without, with_door = await self.both(start, do)

        assert with_door == without
        assert len(without[1]) == 4

    @pytest.mark.parametrize(("sent", "ends"), [((), False), ((), True), ((b"wait",), True)])
    async def test_a_deadline_that_comes(self, start: Any, method: str, sent: tuple[bytes, ...], ends: bool) -> None:
        """Before a message, where there will never be one (grpc.aio gives that no status), or while it is served."""

        async def do(started: Started) -> Any:
            call = started.open_(method, timeout=0.15)
            for message in sent:
                await call.write(message)
            if ends:
                await call.done_writing()
            return (await started.told(call, method))[1]

        without, with_door = await self.both(start, do)

        assert with_door == without
        assert with_door[0] is grpc.StatusCode.DEADLINE_EXCEEDED

    async def test_a_client_that_leaves_while_it_is_served(self, start: Any, method: str) -> None:
        async def do(started: Started) -> Any:
            call = started.open_(method)
            await call.write(b"wait")
            await until(lambda: started.served.guard.in_flight > 0)
            call.cancel()
            return await call.code()

        without, with_door = await self.both(start, do)

        assert with_door == without
        assert without[1] == [("CANCELLED", "CANCELLED", {})]

    async def test_a_slow_upload_is_not_counted(self, start: Any, method: str) -> None:
        """The clock of the request starts when its message is here."""
        clock = [1_000]
        seen: list[Rpc] = []

        def look(call: Rpc) -> None:
            seen.append(call)

        started = await start(Doors(look), clock=lambda: clock[0])
        call = started.open_(method)
        await until(lambda: bool(seen))
        assert started.served.guard.in_flight == 0
        clock[0] = 9_000
        await call.write(b"hello")
        await call.done_writing()
        await started.told(call, method)

        assert (seen[0].arrived_ns, seen[0].received_ns) == (1_000, 9_000)

    async def test_its_handler_knows_its_own_call(self, start: Any, method: str) -> None:
        """A hundred at once, some turned away."""

        def every_third(call: Rpc) -> status.Reply | None:
            return None if int(dict(call.metadata)["n"]) % 3 else closed(call)

        started = await start(Doors(every_third))
        ends = await asyncio.gather(*(started.ask(method, b"%d" % n, metadata=(("n", str(n)),)) for n in range(100)))
        await started.idle()

        for n, (answers, code, _, _) in enumerate(ends):
            if n % 3:
                assert answers[-1] == b"<%d>" % n
            else:
                assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(started.served.recorder.traces) == 100
        assert all(len(trace.ends) == 1 for trace in started.served.recorder.traces)


@pytest.mark.parametrize("method", METHODS)
class TestBroken:
    """What breaks at the door is ours: INTERNAL, an id, and nothing of it goes out."""

    @pytest.mark.parametrize("error", [ValueError(SECRET), errors.InvariantBroken(SECRET)])
    async def test_the_door(self, start: Any, method: str, error: Exception) -> None:
        def breaks(call: Rpc) -> None:
            raise error

        started = await start(Doors(breaks))
        answers, code, message, trailers = await started.ask(method, b"hello")
        await started.idle()
        recorder = started.served.recorder

        assert (answers, code) == ([], grpc.StatusCode.INTERNAL)
        assert SECRET not in message + repr(trailers)
        assert details_of(trailers)[0].metadata["error_id"] in message
        assert [known for _, known in recorder.internal] == [error]
        assert recorder.end.status == "INTERNAL"
        assert recorder.fatal == ([error] if isinstance(error, errors.InvariantBroken) else [])

    @pytest.mark.parametrize("error", [ValueError(SECRET), errors.InvariantBroken(SECRET)])
    async def test_who_watches_at_the_begin(self, start: Any, method: str, error: Exception) -> None:
        started = await start(Doors(closed))
        recorder = started.served.recorder

        def breaks(*_: Any) -> Any:
            raise error

        recorder.begin = breaks
        answers, code, message, trailers = await started.ask(method, b"hello")
        await started.idle()

        assert (answers, code) == ([], grpc.StatusCode.INTERNAL)
        assert SECRET not in message + repr(trailers)
        assert details_of(trailers)[0].metadata["error_id"] in message
        assert [known for _, known in recorder.internal] == [error]
        assert recorder.fatal == ([error] if isinstance(error, errors.InvariantBroken) else [])

    async def test_who_watches_at_the_end(self, start: Any, method: str) -> None:
        """The caller is refused all the same."""
        started = await start(Doors(closed))
        recorder = started.served.recorder
        begin = recorder.begin

        def breaks(**_: Any) -> None:
            raise ValueError(SECRET)

        def begun(*args: Any) -> Any:
            trace = begin(*args)
            trace.end = breaks  # type: ignore[method-assign]
            return trace

        recorder.begin = begun  # type: ignore[method-assign]
        _, code, message, trailers = await started.ask(method, b"hello")
        await started.idle()

        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert SECRET not in message + repr(trailers)
        assert len(recorder.internal) == 1

    async def test_a_wall_that_was_broken_stands_for_the_next(self, start: Any, method: str) -> None:
        def breaks(call: Rpc) -> None:
            raise ValueError(SECRET)

        door = Doors(breaks)
        started = await start(door)
        await started.ask(method, b"hello")
        door.answer = opened

        assert (await started.ask(method, b"hello"))[0][-1] == b"<hello>"
