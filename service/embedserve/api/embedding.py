"""The servicer: from a message to the engine's call and back to bytes.

Decides nothing but the translation. Must never know a tensor, a policy or the scheduler's insides; statuses are
``status.py``'s, limits are ``validation.py``'s, bytes are ``wire.py``'s. It exists before the model is loaded, so that
probes meet a port that says NOT_SERVING; ``attach`` gives it the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio

from embedserve.api import status, wire
from embedserve.api.encoding import Encoding, encode, row_bytes
from embedserve.api.rpc import Rpc, current_rpc
from embedserve.api.validation import RequestLimits, RequestValidator, ValidCall
from embedserve.engine.call import Call, Portion
from embedserve.engine.intake import not_serving
from embedserve.engine.load import NO_LOAD
from embedserve.engine.stages import Stages
from embedserve.engine.surface import EngineSurface
from embedserve.errors import DeadlineExpired, EmbedServeError, ServerFault
from embedserve.v1 import embedding_pb2 as pb

__all__ = ["SERVICE", "EmbeddingServicer", "ServicerSettings"]

SERVICE: Final = "embedserve.v1.EmbeddingService"

_LOAD_STATES: Final = {
    "healthy": pb.LOAD_STATE_HEALTHY,
    "degraded": pb.LOAD_STATE_DEGRADED,
    "overloaded": pb.LOAD_STATE_OVERLOADED,
    "not_serving": pb.LOAD_STATE_NOT_SERVING,
}


@dataclass(frozen=True, slots=True)
class ServicerSettings:
    """Limits of the API; each field is a setting of the same name."""

    limits: RequestLimits
    max_request_ms: int
    """The server's own maximum: the deadline of a call whose caller set none, or a later one."""
    stream_message_bytes: int
    stream_stall_ms: int
    """How long a stream's reader may accept nothing."""


@dataclass(frozen=True, slots=True)
class _Served:
    """What there is once the model is loaded."""

    engine: EngineSurface
    validator: RequestValidator
    identity: bytes
    """What ``wire.identity_message`` made of it, once."""
    name: str
    dimension: int
    model: pb.Model


class _Writer:
    """Writes a stream's messages: waits while flow control says so, but not for a reader that has stopped for good.

    grpc.aio takes the headers for sent once its first write has returned. A first write that is given up, while Core
    still holds it, makes the status that follows send them again, which Core refuses: the client would be told nothing.
    So headers go out alone, before the first message: flow control does not hold them.
    """

    __slots__ = ("_context", "_opened", "_stall_ms")

    def __init__(self, context: Any, stall_ms: int) -> None:
        self._context = context
        self._stall_ms = stall_ms
        self._opened = False

    async def open(self) -> None:
        """Send the headers, once. Not to be given up before ``stall_ms``."""
        if not self._opened:
            await self._sent(self._context.send_initial_metadata(()))
            self._opened = True

    async def write(self, message: bytes) -> None:
        """Write. Raises ``DeadlineExpired`` when the reader accepts nothing for ``stall_ms``."""
        await self.open()
        await self._sent(self._context.write(message))

    async def _sent(self, sending: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._stall_ms / 1000):
                await sending
        except TimeoutError as stalled:
            raise DeadlineExpired(
                f"the reader accepted nothing for server.stream_stall_ms = {self._stall_ms}"
            ) from stalled


class EmbeddingServicer:
    """All methods of ``EmbeddingService``."""

    def __init__(self, settings: ServicerSettings, on_internal_error: Callable[[str, BaseException], None]) -> None:
        """``on_internal_error`` is told the id that a stream's item error carries, and what happened."""
        self._settings = settings
        self._on_internal_error = on_internal_error
        self._now_serving: _Served | None = None

    def attach(self, engine: EngineSurface, bucket_edges: Sequence[int]) -> None:
        """The model is loaded: calls may come."""
        identity = engine.identity
        model = pb.Model(
            name=identity.name,
            revision=identity.revision,
            weights_digest=identity.weights_digest,
            tokenizer_digest=identity.tokenizer_digest,
            architecture=identity.architecture,
            dimension=identity.dimension,
            max_input_length=identity.max_input_length,
            pooling=identity.pooling,
            normalize=identity.normalize,
            dtype=identity.dtype,
            device=identity.device,
            prompts=[pb.Prompt(name=name, text=text) for name, text in identity.prompts],
            default_prompt_name=identity.default_prompt_name or "",
            vocab_size=identity.vocab_size,
            max_texts=self._settings.limits.max_texts,
            max_texts_unary=min(
                wire.max_texts_unary(
                    row_bytes(Encoding.FLOAT32, identity.dimension), self._settings.limits.max_send_message_bytes
                ),
                self._settings.limits.max_texts,
            ),
            bucket_edges=bucket_edges,
        )
        self._now_serving = _Served(
            engine=engine,
            validator=RequestValidator(identity, self._settings.limits),
            identity=wire.identity_message(identity),
            name=identity.name,
            dimension=identity.dimension,
            model=model,
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with ``server``. Embed and EmbedStream answer with bytes that are serialised already."""
        unary, streaming = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers = {
            "Embed": unary(self.embed, wire.parse_embed_request),
            "EmbedStream": streaming(self.embed_stream, wire.parse_embed_stream_request),
            "CountTokens": unary(self.count_tokens, pb.CountTokensRequest.FromString, _serialize),
            "ListModels": unary(self.list_models, pb.ListModelsRequest.FromString, _serialize),
            "GetModel": unary(self.get_model, pb.GetModelRequest.FromString, _serialize),
            "GetLoad": unary(self.get_load, pb.GetLoadRequest.FromString, _serialize),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    @property
    def _served(self) -> _Served:
        if self._now_serving is None:
            raise not_serving()
        return self._now_serving

    # --------------------------------------------------------------------------------------------------------- embed

    async def embed(self, request: Any, context: Any) -> bytes:  # noqa: ARG002
        """Embed, whole or not at all."""
        served = self._served
        rpc = current_rpc()
        valid = served.validator.embed(request, rpc.metadata)
        call = self._call(served, rpc, valid)
        try:
            answer = await served.engine.embed(call)
        except DeadlineExpired as late:
            if call.deadline_ns == rpc.deadline_ns:
                raise
            raise self._took_too_long() from late
        parts = wire.unary_parts(
            encode(answer.vectors, valid.encoding),
            answer.token_counts,
            answer.truncated,
            answer.batch_sizes,
            identity=served.identity,
            dimensions=valid.dimensions,
            tokens=answer.tokens,
            batches=answer.batches,
        )
        call.stages.responded_ns = time.monotonic_ns()
        return wire.finish_unary(parts, wire.stage_timings(call.stages))

    async def embed_stream(self, request: Any, context: Any) -> None:
        """EmbedStream: each batch's rows at once, bad texts as item errors, the summary last."""
        served = self._served
        rpc = current_rpc()
        valid = served.validator.embed_stream(request, rpc.metadata)
        call = self._call(served, rpc, valid)
        failed = len(valid.bad_texts)
        writer = _Writer(context, self._settings.stream_stall_ms)
        await self._send_errors(
            writer, [(bad.index, status.BAD_TEXT, bad.reason, bad.message) for bad in valid.bad_texts]
        )
        if valid.indexes:
            ends = self._ends_at(rpc, call)
            portions = served.engine.embed_stream(call)
            try:
                while True:
                    async with asyncio.timeout_at(ends):
                        portion = await anext(portions, None)
                    if portion is None:
                        break
                    await writer.open()  # not under the limit: see there
                    failed += len(portion.refused)
                    async with asyncio.timeout_at(ends):
                        await self._send_portion(writer, portion, valid)
            except TimeoutError as late:
                raise self._took_too_long() from late
            finally:
                await portions.aclose()
        stages = call.stages
        stages.responded_ns = time.monotonic_ns()
        summary = wire.stream_summary(
            identity=served.identity,
            dimensions=valid.dimensions,
            encoding=valid.encoding,
            texts=sum(ride.rows for ride in stages.rides),
            tokens=stages.tokens,
            batches=len({ride.batch_id for ride in stages.rides}),
            failed=failed,
            timings=wire.stage_timings(stages),
        )
        await writer.write(summary)

    def _call(self, served: _Served, rpc: Rpc, valid: ValidCall) -> Call:
        # The clock starts when the whole message is here: a slow upload is the caller's time, not ours.
        stages = Stages(arrived_ns=rpc.received_ns)
        stages.validated_ns = time.monotonic_ns()
        rpc.stages = stages
        latest = rpc.received_ns + self._settings.max_request_ms * 1_000_000
        rpc.attributes.update(
            texts=len(valid.indexes),
            model=served.name,
            encoding=valid.encoding.name,
            dimensions=valid.dimensions,
            priority=valid.priority.name.lower(),
        )
        if valid.tenant:
            rpc.attributes["tenant"] = valid.tenant
        return Call(
            stages=stages,
            texts=valid.texts,
            tokens=valid.tokens,
            truncation=valid.truncation,
            normalize=valid.normalize,
            dimensions=None if valid.dimensions == served.dimension else valid.dimensions,
            prompt=valid.prompt,
            deadline_ns=latest if rpc.deadline_ns is None else min(rpc.deadline_ns, latest),
            priority=valid.priority,
            tenant=valid.tenant,
            judged_unread=rpc.judged_unread,
            trace=rpc.trace.context,
        )

    def _ends_at(self, rpc: Rpc, call: Call) -> float | None:
        """When a stream is ended, by the loop's clock, where gRPC does not do it: a hung device ends no wait."""
        if call.deadline_ns == rpc.deadline_ns:
            return None
        return asyncio.get_running_loop().time() + self._settings.max_request_ms / 1000

    def _took_too_long(self) -> DeadlineExpired:
        """What a caller is told whose own deadline had not passed."""
        return DeadlineExpired(f"not done within server.max_request_ms = {self._settings.max_request_ms}")

    async def _send_portion(self, writer: _Writer, portion: Portion, valid: ValidCall) -> None:
        place = valid.indexes
        if portion.vectors is not None:
            count = len(portion.indexes)
            for message in wire.stream_messages(
                encode(portion.vectors, valid.encoding),
                [place[i] for i in portion.indexes],
                portion.token_counts,
                portion.truncated,
                [portion.batch_size] * count,
                max_message_bytes=self._settings.stream_message_bytes,
            ):
                await writer.write(message)
        await self._send_errors(
            writer, [(place[refused.index], *self._item_error(refused.error)) for refused in portion.refused]
        )

    def _item_error(self, error: EmbedServeError) -> tuple[int, str, str]:
        if not isinstance(error, ServerFault):
            return status.item_error(error)
        error_id = status.new_error_id()
        self._on_internal_error(error_id, error)
        return status.item_error(error, error_id=error_id)

    async def _send_errors(self, writer: _Writer, errors: Sequence[tuple[int, int, str, str]]) -> None:
        if errors:
            for message in wire.stream_errors(errors, max_message_bytes=self._settings.stream_message_bytes):
                await writer.write(message)

    # ---------------------------------------------------------------------------------------------------- the others

    async def count_tokens(
        self,
        request: pb.CountTokensRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.CountTokensResponse:
        """Counts as Embed would see them."""
        served = self._served
        valid = served.validator.count_tokens(request)
        counts = (await served.engine.count_tokens(valid.texts, prompt=valid.prompt)).tolist()
        limit = served.model.max_input_length
        response = pb.CountTokensResponse(
            counts=[pb.TokenCount(token_count=c, exceeds_max_input_length=c > limit) for c in counts],
            total_tokens=sum(counts),
            max_input_length=limit,
        )
        response.model.MergeFromString(served.identity)
        return response

    async def list_models(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: ARG002
        """The one model."""
        return pb.ListModelsResponse(models=[self._served.model])

    async def get_model(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: ARG002
        """The model, if that is its name."""
        served = self._served
        served.validator.model(request.model)
        return pb.GetModelResponse(model=served.model)

    async def get_load(self, request: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:  # noqa: ARG002
        """The load; answered also before the model is loaded."""
        load = NO_LOAD if self._now_serving is None else self._now_serving.engine.load()
        return pb.GetLoadResponse(
            state=_LOAD_STATES[load.state],
            accepting_requests=load.accepting_requests,
            queued_tokens=load.queued_tokens,
            service_rate_tokens_per_second=load.service_rate_tokens_per_second,
            estimated_drain_time_ms=load.estimated_drain_time_ms,
            p95_latency_ms=load.p95_latency_ms,
            queue_depth=load.queue_depth,
            uptime_seconds=load.uptime_seconds,
            running_items=load.running_items,
            running_tokens=load.running_tokens,
        )


def _serialize(message: Any) -> bytes:
    raw: bytes = message.SerializeToString()
    return raw
