"""The guard over a real connection: one status for every call, told once, and nothing of an exception in it."""

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from embedserve import errors
from embedserve.api import guard as guard_module
from embedserve.api.observer import SilentCallTrace
from embedserve.api.rpc import current_rpc
from embedserve.engine.stages import Stages
from embedserve.v1 import embedding_pb2 as pb

SECRET = "/srv/secret"
Behaviour = Callable[[Any, Any], Any]


def unary(act: Callable[[Any], Any]) -> Behaviour:
    async def handler(request: Any, context: Any) -> bytes:
        await act(context)
        return b"answer"

    return handler


def generator(act: Callable[[Any], Any]) -> Behaviour:
    async def handler(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        await act(context)
        yield b"second"

    return handler


def writer(act: Callable[[Any], Any]) -> Behaviour:
    async def handler(request: Any, context: Any) -> None:
        await context.write(b"first")
        await act(context)
        await context.write(b"second")

    return handler


STYLES = pytest.mark.parametrize("style", [unary, generator, writer])


async def call(serve: Any, style: Any, act: Any, **options: Any) -> tuple[Any, Any, list[bytes]]:
    """Serve a handler of ``style`` that does ``act`` in its middle, and call it to its end."""
    served = await serve(style(act), **options) if style is unary else await serve(stream=style(act), **options)
    rpc = served.embed() if style is unary else served.stream()
    messages = await read(rpc)
    async with asyncio.timeout(5):  # a status that the handler itself sent is with the client before the handler ends
        await served.guard.wait_idle()
    return served, rpc, messages


async def read(rpc: Any) -> list[bytes]:
    try:
        return [message async for message in rpc] if hasattr(rpc, "__aiter__") else [await rpc]
    except grpc.aio.AioRpcError:
        return []


async def nothing(context: Any) -> None:
    return None


def overload() -> NoReturn:
    raise errors.Overloaded("busy", reason="QUEUE_FULL", policy="queue", retry_after_ms=1000)


def raising(error: BaseException) -> Callable[[Any], Any]:
    async def act(context: Any) -> None:
        raise error

    return act


class TestOk:
    @STYLES
    async def test_answers_pass(self, serve: Any, style: Any) -> None:
        """Every style of handler works, and its end is told once with what the handler said of it."""
        stages = Stages(arrived_ns=1)

        async def act(context: Any) -> None:
            current_rpc().stages = stages
            current_rpc().attributes["texts"] = 3

        served, rpc, messages = await call(serve, style, act)

        assert messages == ([b"answer"] if style is unary else [b"first", b"second"])
        assert await rpc.code() is grpc.StatusCode.OK
        end = served.recorder.end
        assert (end.status, end.error_type, end.attributes) == ("OK", None, {"texts": 3})
        assert end.stages is stages
        assert served.recorder.internal == []

    async def test_what_a_handler_knows_of_its_call(self, serve: Any) -> None:
        """Method, metadata, arrival, deadline on the monotonic clock."""
        seen = []

        async def act(context: Any) -> None:
            seen.append(current_rpc())

        served = await serve(unary(act))
        before = time.monotonic_ns()
        await served.embed(timeout=30, metadata=[("x-embedserve-tenant", "blue")])
        after = time.monotonic_ns()
        (known,) = seen

        assert known.method == "embedserve.v1.EmbeddingService/Embed"
        assert ("x-embedserve-tenant", "blue") in [tuple(pair) for pair in known.metadata]
        assert before < known.arrived_ns <= known.received_ns < after
        # grpc sends the time left as a number of at most eight digits, so it may lose a little.
        assert known.deadline_ns == pytest.approx(before + 30e9, abs=1e9)
        (trace,) = served.recorder.traces
        assert (trace.method, trace.arrived_ns) == (known.method, known.arrived_ns)
        assert trace.peer.startswith("ipv4:127.0.0.1")
        assert trace.metadata["x-embedserve-tenant"] == "blue"

    @pytest.mark.parametrize(
        ("said", "attempt"), [("1", 2), ("4", 5), ("5", 5), ("0", 5), ("", 5), ("12", 5), ("x", 5), (b"1", 5)]
    )
    def test_which_attempt_it_is(self, said: str | bytes, attempt: int) -> None:
        """As the client says, and within bounds whatever it says: gRPC's clients let nobody write it, others do."""
        assert guard_module._attempt(said) == attempt

    async def test_no_deadline_is_none(self, serve: Any) -> None:
        """And not a number far away."""
        seen = []

        async def act(context: Any) -> None:
            seen.append(current_rpc().deadline_ns)

        await (await serve(unary(act))).embed()

        assert seen == [None]

    async def test_calls_do_not_see_each_other(self, serve: Any) -> None:
        """A hundred at once, each with its own metadata."""

        async def act(context: Any) -> None:
            mine = current_rpc()
            await asyncio.sleep(0)
            assert current_rpc() is mine
            mine.attributes["n"] = int(dict(mine.metadata)["n"])

        served = await serve(unary(act))
        await asyncio.gather(*(served.embed(metadata=[("n", str(n))]) for n in range(100)))

        assert sorted(trace.ends[0].attributes["n"] for trace in served.recorder.traces) == list(range(100))

    @STYLES
    async def test_trace_id_goes_out(self, serve: Any, style: Any) -> None:
        """With the trailers of every call that has one."""
        served = await serve(style(nothing)) if style is unary else await serve(stream=style(nothing))
        served.recorder.trace_id = "ab" * 16
        rpc = served.embed() if style is unary else served.stream()
        await read(rpc)

        assert dict(await rpc.trailing_metadata())["x-trace-id"] == "ab" * 16

    async def test_trace_id_goes_out_with_errors_too(self, serve: Any) -> None:
        """Beside the details."""
        served = await serve(unary(raising(errors.UnknownModel("a", ["b"]))))
        served.recorder.trace_id = "ab" * 16
        rpc = served.embed()
        await read(rpc)
        trailers = dict(await rpc.trailing_metadata())

        assert trailers["x-trace-id"] == "ab" * 16
        assert "grpc-status-details-bin" in trailers


class TestErrors:
    @STYLES
    async def test_an_exception_never_shows_its_text(self, serve: Any, style: Any) -> None:
        """INTERNAL with an id that the log has too. Bare grpc.aio sends ``UNKNOWN`` with class and text."""
        error = ValueError(SECRET)
        served, rpc, _ = await call(serve, style, raising(error))

        assert await rpc.code() is grpc.StatusCode.INTERNAL
        ((error_id, logged),) = served.recorder.internal
        assert logged is error
        assert await rpc.details() == f"internal error (error id {error_id})"
        assert SECRET not in repr(await rpc.trailing_metadata())
        assert (served.recorder.end.status, served.recorder.end.error_type) == ("INTERNAL", "ValueError")
        assert served.recorder.end.attributes["error_id"] == error_id

    @STYLES
    async def test_refusals_are_told_with_policy_and_figures(self, serve: Any, style: Any) -> None:
        """To the client as details and to the trace as attributes."""
        error = errors.Overloaded(
            "busy", reason="QUEUE_FULL", policy="queue", retry_after_ms=1000, figures={"queued_tokens": 5.0}
        )
        served, rpc, _ = await call(serve, style, raising(error))

        assert await rpc.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        end = served.recorder.end
        assert (end.status, end.error_type) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert end.attributes == {"policy": "queue", "queued_tokens": 5.0}
        assert served.recorder.internal == []

    @STYLES
    async def test_a_refusal_leaves_nothing_to_the_collector_of_cycles(self, serve: Any, style: Any) -> None:
        """grpc keeps the exception of an abort, which would keep every frame of the call, which keep the call."""
        kept: list[weakref.ref[BaseException]] = []

        async def refuse(context: Any) -> None:
            try:
                overload()
            except errors.Overloaded as error:  # a name that outlived this block would be a cycle of its own
                kept.append(weakref.ref(error))
                raise

        gc.disable()
        try:
            _, rpc, _ = await call(serve, style, refuse)
            assert await rpc.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            async with asyncio.timeout(5):
                while kept[0]() is not None:  # noqa: ASYNC110  # nothing tells when grpc lets go of a call
                    await asyncio.sleep(0)
        finally:
            gc.enable()

    @STYLES
    async def test_abort_by_the_handler_is_left_alone(self, serve: Any, style: Any) -> None:
        """Code, message and trailers are the handler's; the trace has the code."""

        async def act(context: Any) -> None:
            await context.abort(grpc.StatusCode.ABORTED, "so it is", (("k", "v"),))

        served, rpc, _ = await call(serve, style, act)

        assert (await rpc.code(), await rpc.details()) == (grpc.StatusCode.ABORTED, "so it is")
        assert dict(await rpc.trailing_metadata())["k"] == "v"
        assert (served.recorder.end.status, served.recorder.end.error_type) == ("ABORTED", "ABORTED")

    @STYLES
    async def test_abort_with_status_is_seen(self, serve: Any, style: Any) -> None:
        """The stock OpenTelemetry interceptor records this as OK."""

        async def act(context: Any) -> None:
            await context.abort_with_status(
                rpc_status.to_status(
                    rpc_status.status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="later")
                )
            )

        served, rpc, _ = await call(serve, style, act)

        assert await rpc.code() is grpc.StatusCode.UNAVAILABLE
        assert served.recorder.end.status == "UNAVAILABLE"

    async def test_set_code_is_seen(self, serve: Any) -> None:
        """A handler that returns after ``set_code`` has that status."""

        async def act(context: Any) -> None:
            context.set_code(grpc.StatusCode.DATA_LOSS)

        served, rpc, _ = await call(serve, unary, act)

        assert await rpc.code() is grpc.StatusCode.DATA_LOSS
        assert served.recorder.end.status == "DATA_LOSS"

    @pytest.mark.parametrize("answer", [None, "text", pb.EmbedResponse()])
    async def test_an_answer_that_is_not_bytes(self, serve: Any, answer: Any) -> None:
        """Is ours to mend: INTERNAL."""

        async def handler(request: Any, context: Any) -> Any:
            return answer

        served = await serve(handler)
        rpc = served.embed()
        await read(rpc)

        assert await rpc.code() is grpc.StatusCode.INTERNAL
        assert len(served.recorder.internal) == 1

    @STYLES
    async def test_a_broken_invariant_is_fatal(self, serve: Any, style: Any) -> None:
        """The client has its answer first; then whoever ends the process is told."""
        error = errors.InvariantBroken(SECRET)
        served, rpc, _ = await call(serve, style, raising(error))

        assert await rpc.code() is grpc.StatusCode.INTERNAL
        assert SECRET not in str(await rpc.details())
        assert served.recorder.fatal == [error]
        assert served.recorder.end.error_type == "InvariantBroken"

    @STYLES
    async def test_system_exit_is_fatal(self, serve: Any, style: Any) -> None:
        """And does not end the process from inside a handler."""
        served, rpc, _ = await call(serve, style, raising(SystemExit(70)))

        assert await rpc.code() is grpc.StatusCode.INTERNAL
        assert [type(error) for error in served.recorder.fatal] == [SystemExit]

    async def test_an_inner_interceptor_that_raises(self, serve: Any) -> None:
        """Is guarded as well."""

        class Broken(grpc.aio.ServerInterceptor):
            async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
                raise ValueError(SECRET)

        served = await serve(unary(nothing), inner=(Broken(),))
        rpc = served.embed()
        await read(rpc)

        assert await rpc.code() is grpc.StatusCode.INTERNAL
        assert SECRET not in str(await rpc.details())
        assert [str(error) for _, error in served.recorder.internal] == [SECRET]

    async def test_an_observer_that_raises_breaks_nothing(self, serve: Any) -> None:
        """The call is answered; the observer's error is reported."""

        class Broken(SilentCallTrace):
            def end(self, **_: Any) -> None:
                raise RuntimeError(SECRET)

        served = await serve(unary(nothing))
        served.recorder.begin = lambda *_: Broken()

        assert await served.embed() == b"answer"
        assert [str(error) for _, error in served.recorder.internal] == [SECRET]

    @STYLES
    async def test_an_observer_that_cannot_begin_fails_its_call_and_holds_nothing(self, serve: Any, style: Any) -> None:
        """INTERNAL, and counted down: a drain would wait its whole grace for a call that is not there."""

        def broken(*_: Any) -> NoReturn:
            raise RuntimeError(SECRET)

        served = await serve(style(nothing)) if style is unary else await serve(stream=style(nothing))
        served.recorder.begin = broken
        rpc = served.embed() if style is unary else served.stream()
        await read(rpc)

        assert await rpc.code() is grpc.StatusCode.INTERNAL
        assert SECRET not in str(await rpc.details())
        assert [str(error) for _, error in served.recorder.internal] == [SECRET]
        async with asyncio.timeout(5):
            await served.guard.wait_idle()
        assert served.guard.in_flight == 0

    async def test_an_unknown_method_is_grpcs_business(self, serve: Any) -> None:
        """UNIMPLEMENTED, and no call is counted."""
        served = await serve(unary(nothing))
        rpc = served.channel.unary_unary("/embedserve.v1.EmbeddingService/Nope")(b"")
        await read(rpc)

        assert await rpc.code() is grpc.StatusCode.UNIMPLEMENTED
        assert served.recorder.traces == []


class TestMalformed:
    @pytest.mark.parametrize("raw", [b"\x12\x02\xff\xfe", b"\x12\x05ab", b"\xff" * 20, b"\x00", b"GET / HTTP/1.1"])
    @pytest.mark.parametrize("style", [unary, writer])
    async def test_garbage_is_the_callers_fault(self, serve: Any, style: Any, raw: bytes) -> None:
        """INVALID_ARGUMENT with details. Bare grpc.aio sends ``UNKNOWN … DecodeError``."""
        served = await serve(style(nothing)) if style is unary else await serve(stream=style(nothing))
        rpc = served.embed(raw) if style is unary else served.stream(raw)
        await read(rpc)

        assert await rpc.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "Decode" not in str(await rpc.details())
        assert b"MALFORMED_MESSAGE" in dict(await rpc.trailing_metadata())["grpc-status-details-bin"]
        assert served.recorder.end.status == "INVALID_ARGUMENT"

    async def test_no_mutation_of_a_good_request_gives_another_status(self, serve: Any) -> None:
        """Whatever byte is turned: OK or INVALID_ARGUMENT."""
        served = await serve(unary(nothing))
        good = pb.EmbedRequest(texts=["hello", "you"], dimensions=3, token_ids=[pb.TokenIds(ids=[1, 2])])
        raw = good.SerializeToString()
        codes = set()
        for position in range(len(raw)):
            for flip in (0x80, 0x07, 0xFF):
                rpc = served.embed(raw[:position] + bytes([raw[position] ^ flip]) + raw[position + 1 :])
                await read(rpc)
                codes.add(await rpc.code())

        assert codes == {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}

    async def test_a_deserializer_of_ours_that_breaks(self, serve: Any) -> None:
        """Is not the caller's fault."""

        def broken(raw: bytes) -> Any:
            raise KeyError(SECRET)

        def add(server: grpc.aio.Server) -> None:
            handler = grpc.unary_unary_rpc_method_handler(unary(nothing), broken)
            server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(guard_module.SERVICE, {"Other": handler}),)
            )

        served = await serve(add=add)
        rpc = served.channel.unary_unary(f"/{guard_module.SERVICE}/Other")(b"")
        await read(rpc)

        assert await rpc.code() is grpc.StatusCode.INTERNAL
        assert SECRET not in repr((await rpc.details(), await rpc.trailing_metadata()))


class TestCancellation:
    @STYLES
    async def test_by_the_client(self, serve: Any, style: Any) -> None:
        """The handler is stopped at once; the trace says CANCELLED; nothing is reported as an error."""
        begun, stopped = asyncio.Event(), asyncio.Event()

        async def act(context: Any) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()

        served = await serve(style(act)) if style is unary else await serve(stream=style(act))
        rpc = served.embed() if style is unary else served.stream()
        reading = asyncio.ensure_future(read(rpc))
        await begun.wait()
        rpc.cancel()
        async with asyncio.timeout(5):
            await stopped.wait()
            await served.guard.wait_idle()
        await asyncio.wait([reading])

        assert (served.recorder.end.status, served.recorder.end.error_type) == ("CANCELLED", "CANCELLED")
        assert served.recorder.internal == []

    @STYLES
    async def test_by_the_deadline(self, serve: Any, style: Any) -> None:
        """The same, under its own name. The stock OpenTelemetry interceptor records this as OK."""

        async def act(context: Any) -> None:
            await asyncio.Event().wait()

        served = await serve(style(act)) if style is unary else await serve(stream=style(act))
        rpc = served.embed(timeout=0.1) if style is unary else served.stream(timeout=0.1)
        await read(rpc)
        async with asyncio.timeout(5):
            await served.guard.wait_idle()

        assert await rpc.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert served.recorder.end.status == "DEADLINE_EXCEEDED"
        assert served.recorder.internal == []

    @STYLES
    async def test_of_something_inside_reaches_the_client(self, serve: Any, style: Any) -> None:
        """A cancelled future of our own is INTERNAL. Bare grpc.aio sends nothing, and the client hangs."""

        async def act(context: Any) -> None:
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future

        async with asyncio.timeout(5):
            served, rpc, _ = await call(serve, style, act)

        assert await rpc.code() is grpc.StatusCode.INTERNAL
        assert (served.recorder.end.status, served.recorder.end.error_type) == ("INTERNAL", "CancelledError")
        assert len(served.recorder.internal) == 1

    async def test_that_a_handler_swallows(self, serve: Any) -> None:
        """The trace has what the client saw, not OK."""
        begun = asyncio.Event()

        async def act(context: Any) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return

        served = await serve(unary(act))
        rpc = served.embed()
        reading = asyncio.ensure_future(read(rpc))
        await begun.wait()
        rpc.cancel()
        async with asyncio.timeout(5):
            await served.guard.wait_idle()
        await asyncio.wait([reading])

        assert served.recorder.end.status == "CANCELLED"

    async def test_a_generator_is_closed_when_its_reader_goes(self, serve: Any) -> None:
        """Its ``finally`` runs before the call counts as over."""
        begun, closed = asyncio.Event(), []

        async def handler(request: Any, context: Any) -> AsyncIterator[bytes]:
            try:
                yield b"first"
                begun.set()
                await asyncio.Event().wait()
            finally:
                closed.append(True)

        served = await serve(stream=handler)
        rpc = served.stream()
        assert await rpc.read() == b"first"
        await begun.wait()
        rpc.cancel()
        async with asyncio.timeout(5):
            await served.guard.wait_idle()

        assert closed == [True]

    async def test_a_generator_is_closed_when_a_write_is_cut_off(self, serve: Any) -> None:
        """Also where it waits at a ``yield`` and not at an ``await`` of its own."""
        closed = []

        async def handler(request: Any, context: Any) -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x" * 1_000_000
            finally:
                closed.append(current_rpc().method)

        served = await serve(stream=handler)
        rpc = served.stream()
        await rpc.read()
        rpc.cancel()
        async with asyncio.timeout(5):
            await served.guard.wait_idle()

        assert closed == [f"{guard_module.SERVICE}/EmbedStream"]

    async def test_a_reader_that_has_stopped_does_not_hold_its_call(
        self, serve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The error status waits behind unread messages: the guard waits a while, not for ever."""
        monkeypatch.setattr(guard_module, "LAST_WORD_S", 0.05)

        async def handler(request: Any, context: Any) -> None:
            try:
                while True:
                    async with asyncio.timeout(0.2):
                        await context.write(b"x" * 1_000_000)
            except TimeoutError:
                raise errors.DeadlineExpired("the reader accepted nothing") from None

        served = await serve(stream=handler)
        rpc = served.stream()
        await rpc.read()
        async with asyncio.timeout(10):
            await served.guard.wait_idle()

        assert served.recorder.end.status == "DEADLINE_EXCEEDED"
        assert served.recorder.internal == []
        rpc.cancel()


class TestAccepting:
    @pytest.mark.parametrize("style", [unary, generator, writer])
    async def test_refuses_while_not_accepting(self, serve: Any, style: Any) -> None:
        """UNAVAILABLE with a retry hint, before the handler sees the call."""
        served, rpc, messages = await call(serve, style, raising(AssertionError()), accepting=lambda: False)
        status = await rpc_status.aio.from_call(rpc)
        packed = {entry.TypeName(): entry for entry in status.details}
        retry = error_details_pb2.RetryInfo()
        packed["google.rpc.RetryInfo"].Unpack(retry)

        assert messages == []
        assert await rpc.code() is grpc.StatusCode.UNAVAILABLE
        assert 800 <= retry.retry_delay.ToMilliseconds() <= 1200
        assert (served.recorder.end.status, served.recorder.end.error_type) == ("UNAVAILABLE", "NOT_SERVING")

    async def test_load_is_told_all_the_same(self, serve: Any) -> None:
        """A balancer must be able to ask why."""
        served = await serve(unary(nothing), accepting=lambda: False)

        assert await served.channel.unary_unary(f"/{guard_module.SERVICE}/GetLoad")(b"") == b"answer"

    async def test_what_was_accepted_goes_on(self, serve: Any) -> None:
        """Only new calls are refused."""
        accepting, begun, go = [True], asyncio.Event(), asyncio.Event()

        async def act(context: Any) -> None:
            begun.set()
            await go.wait()

        served = await serve(unary(act), accepting=lambda: accepting[0])
        first = asyncio.ensure_future(read(served.embed()))
        await begun.wait()
        assert served.guard.in_flight == 1
        accepting[0] = False
        assert await read(served.embed()) == []
        waiting = asyncio.ensure_future(served.guard.wait_idle())
        go.set()

        assert await first == [b"answer"]
        async with asyncio.timeout(5):
            await waiting


class TestErrorTree:
    @pytest.mark.parametrize(
        ("error", "code", "kinds"),
        [
            (
                errors.InvalidRequest([errors.Violation("texts[1]", "empty", "TEXT_EMPTY")] * 200),
                "INVALID_ARGUMENT",
                {"ErrorInfo", "BadRequest"},
            ),
            (errors.RevisionMismatch("a", "b"), "FAILED_PRECONDITION", {"ErrorInfo"}),
            (errors.UnknownModel("ü€😀\n", ["b"]), "NOT_FOUND", {"ErrorInfo"}),
            (errors.Unsupported("not by this model"), "UNIMPLEMENTED", {"ErrorInfo"}),
            (
                errors.Overloaded("no", reason="R", policy="p", retry_after_ms=9),
                "RESOURCE_EXHAUSTED",
                {"ErrorInfo", "RetryInfo"},
            ),
            (errors.NotServing("no", reason="R", retry_after_ms=9), "UNAVAILABLE", {"ErrorInfo", "RetryInfo"}),
            (errors.DeadlineExpired("too late"), "DEADLINE_EXCEEDED", {"ErrorInfo"}),
            (errors.ItemFailed(SECRET), "INTERNAL", {"ErrorInfo"}),
            (errors.NonFiniteOutput(SECRET), "INTERNAL", {"ErrorInfo"}),
            (errors.ItemTooLarge(SECRET), "RESOURCE_EXHAUSTED", {"ErrorInfo"}),
            (errors.EngineFailed(SECRET), "INTERNAL", {"ErrorInfo"}),
            (errors.ServerFault(SECRET), "INTERNAL", {"ErrorInfo"}),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
    )
    async def test_a_client_can_decode_every_error(self, serve: Any, error: Any, code: str, kinds: set[str]) -> None:
        """With grpcio-status, over a real connection and its limits on trailers."""
        _, rpc, _ = await call(serve, unary, raising(error))
        decoded = await rpc_status.aio.from_call(rpc)

        assert (await rpc.code()).name == code
        assert decoded.message == await rpc.details()
        assert {entry.TypeName().removeprefix("google.rpc.") for entry in decoded.details} == kinds
        assert SECRET not in repr((decoded, await rpc.trailing_metadata()))

    async def test_pushback_makes_a_client_come_back_then(self, serve: Any) -> None:
        """A client with a retry policy waits as long as it is told, and -1 stops it (gRFC A6)."""
        tries: list[float] = []
        answers = [
            errors.Overloaded("no", reason="R", policy="p", retry_after_ms=200),
            errors.ItemTooLarge("never"),
            errors.ItemTooLarge("not reached"),
        ]

        async def act(context: Any) -> None:
            tries.append(time.monotonic())
            raise answers[len(tries) - 1]

        served = await serve(unary(act))
        config = (
            '{"methodConfig":[{"name":[{}],"retryPolicy":{"maxAttempts":4,"initialBackoff":"5s","maxBackoff":"5s",'
            '"backoffMultiplier":1,"retryableStatusCodes":["RESOURCE_EXHAUSTED"]}}]}'
        )
        options = [("grpc.service_config", config)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}", options=options) as channel:
            rpc = channel.unary_unary(f"/{guard_module.SERVICE}/Embed")(b"")
            await read(rpc)

        assert len(tries) == 2
        assert 0.15 < tries[1] - tries[0] < 2
