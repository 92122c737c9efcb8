"""Texts to vectors in this process, through the same engine and the same validation as the server's.

Decides which settings of a server make no sense here: nobody else waits, so that no policy refuses and the queue is as
long as the pipeline makes it. Must never know gRPC's calls or statuses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from embedserve.api.status import item_error
from embedserve.api.validation import RequestLimits, RequestValidator
from embedserve.bulk.outcome import BulkError, Failure, Options, Vector
from embedserve.bulk.request import request_of
from embedserve.config import Admission, Config
from embedserve.engine.call import Call, Portion
from embedserve.engine.engine import Engine
from embedserve.engine.observer import SilentObserver
from embedserve.engine.stages import Stages
from embedserve.errors import InvalidRequest
from embedserve.model.checkpoint import load_checkpoint
from embedserve.scheduling.item import Priority
from embedserve.wiring import build_engine, prepare_environment

__all__ = ["Local"]

STOP_S = 5.0
"""Time for the pass that runs to end. A pass takes milliseconds."""
QUEUE_TOKENS = 1 << 30
"""Never reached: the pipeline bounds what is here."""


class Local:
    """An ``Embedder`` of one model, loaded on entering and stopped on leaving."""

    def __init__(self, config: Config, options: Options) -> None:
        """Nothing is loaded yet."""
        scheduling = config.scheduling.model_copy(update={"max_queue_tokens": QUEUE_TOKENS})
        self._config = config.model_copy(update={"admission": Admission(policies=()), "scheduling": scheduling})
        self._options = options
        self._engine: Engine | None = None
        self._validator: RequestValidator | None = None

    async def __aenter__(self) -> Self:
        """Load and warm up. Raises ``StartupError``."""
        prepare_environment()
        model, limits = self._config.model, self._config.limits
        checkpoint = load_checkpoint(
            model.source,
            name=model.name,
            revision=model.revision,
            max_input_length=model.max_input_length,
            allow_download=model.allow_download,
        )
        # A dead worker fails every request that waits for it, so nobody need be told apart.
        self._engine = build_engine(self._config, checkpoint, SilentObserver(), lambda _why: None)
        identity = await self._engine.start()
        limits_here = RequestLimits(max_texts=limits.max_texts, max_text_bytes=limits.max_text_bytes)
        self._validator = RequestValidator(identity, limits_here)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the worker."""
        if self._engine is not None:
            self._engine.drain()
            await self._engine.stop(STOP_S)

    async def dimensions(self) -> int:
        """Components of every vector. Raises ``BulkError`` where the model has fewer, or no such prompt."""
        engine, validator = self._running()
        try:
            validator.embed_stream(request_of(["probe"], self._options))
        except InvalidRequest as error:
            raise BulkError("; ".join(f"{v.field}: {v.description}" for v in error.violations)) from error
        return self._options.dimensions or engine.identity.dimension

    async def embed(self, texts: Sequence[str]) -> Sequence[Vector | Failure]:
        """One outcome a text, in order. Raises what the engine does when nothing more can run."""
        engine, validator = self._running()
        valid = validator.embed_stream(request_of(texts, self._options))
        outcomes: dict[int, Vector | Failure] = {
            bad.index: Failure(bad.violation.reason, bad.violation.description) for bad in valid.bad_texts
        }
        if valid.indexes:
            stages = Stages(arrived_ns=time.monotonic_ns())
            stages.validated_ns = stages.arrived_ns
            full = valid.dimensions == engine.identity.dimension
            call = Call(
                stages,
                texts=valid.texts,
                truncation=valid.truncation,
                normalize=valid.normalize,
                dimensions=None if full else valid.dimensions,
                prompt=valid.prompt,
                priority=Priority.BULK,
            )
            async for portion in engine.embed_stream(call):
                _take(portion, valid.indexes, outcomes)
        return [outcomes[index] for index in range(len(texts))]

    def _running(self) -> tuple[Engine, RequestValidator]:
        assert self._engine is not None, "not entered"
        assert self._validator is not None, "not entered"
        return self._engine, self._validator


def _take(portion: Portion, places: Sequence[int], outcomes: dict[int, Vector | Failure]) -> None:
    if portion.vectors is not None:
        counted = zip(portion.indexes, portion.vectors, portion.token_counts, portion.truncated, strict=True)
        for index, values, token_count, truncated in counted:
            outcomes[places[index]] = Vector(values, int(token_count), bool(truncated))
    for refused in portion.refused:
        _, reason, message = item_error(refused.error)
        own = message if isinstance(refused.error, InvalidRequest) else str(refused.error)
        outcomes[places[refused.index]] = Failure(reason, own)
