"""The way in: early admission, tokenising, and the submission that the scheduler judges exactly.

Decides how tokens are estimated before they are counted, and what a rejection or an over-long text means to its
caller. Must never know batches, results or a transport.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

import numpy as np

from embedserve.engine.call import Call
from embedserve.engine.observer import EngineObserver
from embedserve.engine.tokenization import TokenizerPool
from embedserve.engine.unread import UnreadAdmission
from embedserve.errors import (
    DeadlineExpired,
    EngineFailed,
    EngineStalled,
    InvalidRequest,
    NotServing,
    Overloaded,
    Violation,
)
from embedserve.model.tokenizer import TokenizedTexts, Truncation
from embedserve.scheduling.item import Rejection, Submission
from embedserve.scheduling.scheduler import Scheduler

__all__ = ["Intake", "cut_tokens", "not_serving", "overloaded", "stalled"]

CHARS_PER_TOKEN_GUESS = 4.0
"""Where the estimate for early admission starts; English text in WordPiece has 4 to 5."""
ESTIMATE_SMOOTHING = 0.05
"""Weight of one request in the running ratio of characters to tokens: about the last 20 requests count."""
TOKENS_PER_CHAR_BOUNDS = (0.01, 4.0)
"""One odd request must not spoil the estimate of the next."""
SPECIAL_TOKENS = 2
"""Special tokens a text, in every encoder that is common today; an estimate needs no more."""
LIMITS: Final[Mapping[str, str]] = {
    "QUEUE_FULL": "scheduling.max_queue_items or scheduling.max_queue_tokens",
    "SUBMISSION_EXCEEDS_QUEUE": "scheduling.max_queue_items or scheduling.max_queue_tokens; send fewer, or EmbedStream",
    "ITEM_EXCEEDS_BATCH": "scheduling.max_batch_tokens",
    "DEADLINE_TOO_SHORT": "the call's own deadline",
    "DEADLINE_UNREACHABLE": "the call's own deadline",
    "DRAIN_TIME_EXCEEDED": "admission.throughput.max_drain_ms",
    "PREDICTED_WAIT_EXCEEDS_SLO": "admission.latency_p95.slo_ms",
    "P95_EXCEEDED": "admission.latency_p95.soft_ms",
    "TOKENS_IN_FLIGHT_EXCEEDED": "admission.gradient.max_batches",
    "TOO_MANY_REQUESTS_IN_FLIGHT": "limits.max_requests_in_flight",
}
"""What a caller reads to know whom to ask: the setting behind each reason of a refusal."""
NOT_SERVING_RETRY_MS = 1000
"""A start or a drain takes seconds; a balancer has another address."""


def not_serving() -> NotServing:
    """What a caller is told before start-up has ended and after the drain has begun."""
    return NotServing("the server is starting or draining", reason="NOT_SERVING", retry_after_ms=NOT_SERVING_RETRY_MS)


def stalled() -> EngineStalled:
    """What a caller is told while the device is silent."""
    return EngineStalled(
        "the device has been silent for longer than health.stall_ms",
        reason="ENGINE_STALLED",
        retry_after_ms=NOT_SERVING_RETRY_MS,
    )


def overloaded(rejection: Rejection) -> Overloaded:
    """What a caller is told of a refusal, and by which setting or limit."""
    message = f"shed by {rejection.policy}: {rejection.reason.lower().replace('_', ' ')}"
    limit = LIMITS.get(rejection.reason)
    if limit is not None:
        message += f", by {limit}"
    if rejection.figures:
        message += f" ({', '.join(_readable(*figure) for figure in rejection.figures.items())})"
    return Overloaded(
        message,
        reason=rejection.reason,
        policy=rejection.policy,
        retry_after_ms=rejection.retry_after_ms,
        figures=dict(rejection.figures),
    )


class Intake:
    """What every request passes before it waits."""

    def __init__(
        self,
        scheduler: Scheduler,
        pool: TokenizerPool,
        observer: EngineObserver,
        max_input_length: int,
        unread: UnreadAdmission,
        *,
        include_prompt: bool,
    ) -> None:
        """Shares the scheduler with the driver; both live on one event loop."""
        self._scheduler = scheduler
        self._pool = pool
        self._observer = observer
        self._max_input_length = max_input_length
        self._unread = unread
        self._include_prompt = include_prompt
        self._ids = itertools.count(1)
        self._tokens_per_char = 1.0 / CHARS_PER_TOKEN_GUESS

    def admit(self, call: Call, texts: int | None = None) -> None:
        """Early admission, on an estimate: a request that will be refused must not cost a tokenizer's time.

        ``texts``: how many of the call's are submitted at once, a stream's first piece; all of them unless given.
        """
        now = time.monotonic_ns()
        if call.deadline_ns is not None and now >= call.deadline_ns:
            raise DeadlineExpired("the deadline had passed when the request arrived")
        stages = call.stages
        stages.texts = call.count
        items = stages.texts if texts is None else min(texts, stages.texts)
        estimate = self.estimate(call, items)
        self._unread.saw(estimate, call.priority)
        rejection = self._scheduler.judge(
            estimate,
            items,
            deadline_ns=call.deadline_ns,
            priority=call.priority,
            tenant=call.tenant,
            now_ns=now,
            drawn=call.judged_unread,
        )
        if rejection is not None:
            self.refuse(rejection, "estimate")
        stages.admitted_ns = time.monotonic_ns()

    def estimate(self, call: Call, items: int) -> int:
        """About how many tokens the first ``items`` texts of a call have."""
        if call.texts is not None:
            judged = call.texts if items == len(call.texts) else call.texts[:items]
            chars = sum(map(len, judged)) + len(call.prompt) * items
            return min(int(chars * self._tokens_per_char) + SPECIAL_TOKENS * items, self._max_input_length * items)
        if call.source is not None:
            return min(call.source.estimate(items), self._max_input_length * items)
        assert call.tokens is not None
        lengths = call.tokens.lengths
        return len(call.tokens.ids) if items == len(lengths) else int(lengths[:items].sum())

    @property
    def pass_tokens(self) -> int:
        """Tokens of a full pass now."""
        return self._scheduler.max_batch_tokens

    def refuse(self, rejection: Rejection, stage: str) -> NoReturn:
        """Raise what a rejection means to the caller."""
        self._unread.refused(time.monotonic_ns())
        self._observer.rejected(rejection, stage=stage)
        if rejection.policy == "draining":
            if stage == "exact" and rejection.reason == "ENGINE_FAILED":
                raise EngineFailed("the engine failed while this request was in flight")
            raise not_serving()
        raise overloaded(rejection)

    async def tokenize(self, call: Call, first: int = 0, stop: int | None = None) -> TokenizedTexts:
        """Token ids of a call's texts from ``first`` to before ``stop``, or those that it brings."""
        if call.source is not None:
            return await call.source.tokenize(first, call.count if stop is None else stop)
        if call.texts is None:
            assert call.tokens is not None
            return call.tokens if stop is None else cut_tokens(call.tokens, first, stop)
        texts: Sequence[str] = call.texts if stop is None else call.texts[first:stop]
        chars = sum(map(len, texts))
        try:
            tokenized = await self._pool.encode(
                texts,
                chars,
                truncation=call.truncation,
                prompt=call.prompt,
                deadline_ns=call.deadline_ns,
                meter=call.meter,
            )
        except Overloaded as full:
            rejection = Rejection(full.policy, full.reason, full.retry_after_ms, full.figures)
            self._observer.rejected(rejection, stage="estimate")
            raise
        chars += len(call.prompt) * len(texts)
        if chars and not np.count_nonzero(tokenized.truncated):
            low, high = TOKENS_PER_CHAR_BOUNDS
            ratio = min(max((len(tokenized.ids) - SPECIAL_TOKENS * len(texts)) / chars, low), high)
            self._tokens_per_char += ESTIMATE_SMOOTHING * (ratio - self._tokens_per_char)
        return tokenized

    def skip(self, tokenized: TokenizedTexts) -> int:
        """Leading tokens of each text that pooling leaves out: the prompt's, where the checkpoint says so."""
        return 0 if self._include_prompt else tokenized.prompt_tokens

    def new_flow(self) -> int:
        """A number for one request: its submissions share what it is given."""
        return next(self._ids)

    def submission(self, call: Call, lengths: list[int], flow: int, *, continuation: bool = False) -> Submission:
        """What the scheduler sees of some items of a call."""
        stages = call.stages
        stages.bucket = max(stages.bucket, self._scheduler.bucket_of(max(lengths)))
        return Submission(
            id=next(self._ids),
            flow=flow,
            tokens=lengths,
            arrived_ns=stages.arrived_ns,
            deadline_ns=call.deadline_ns,
            priority=call.priority,
            tenant=call.tenant,
            continuation=continuation,
            whole_tokens=sum(lengths) * call.count // len(lengths) if call.count > len(lengths) else 0,
        )

    def unusable(self, call: Call, lengths: Sequence[int]) -> list[int]:
        """Positions of texts that are too long and may not be cut, or that the tokenizer leaves nothing of."""
        limit = self._max_input_length
        if max(lengths) <= limit and min(lengths) > 0:
            return []
        assert call.truncation is Truncation.NONE or max(lengths) <= limit, "a text was cut, yet it is too long"
        return [i for i, length in enumerate(lengths) if not 0 < length <= limit]

    def refuse_unusable(self, call: Call, lengths: Sequence[int]) -> None:
        """Raise ``InvalidRequest`` with every unusable text, if there is one."""
        unusable = self.unusable(call, lengths)
        if unusable:
            raise InvalidRequest([self.violation(i, lengths[i]) for i in unusable])

    def violation(self, index: int, length: int) -> Violation:
        """The sentence for a text of a length that the model cannot take."""
        if not length:
            return Violation(f"texts[{index}]", "has no token that the model knows", "TEXT_HAS_NO_TOKENS")
        return Violation(
            field=f"texts[{index}]",
            description=(
                f"has {length} tokens or more, the model takes {self._max_input_length}; "
                "shorten it or set truncate to TRUNCATE_END or TRUNCATE_START"
            ),
            reason="TEXT_TOO_LONG",
        )


def _readable(name: str, value: float) -> str:
    """A figure for people: nanoseconds become milliseconds."""
    return f"{name[:-3]}_ms={value / 1e6:.1f}" if name.endswith("_ns") else f"{name}={value:g}"


def cut_tokens(tokens: TokenizedTexts, first: int, stop: int) -> TokenizedTexts:
    """Those of the texts from ``first`` to before ``stop``."""
    begin = int(tokens.lengths[:first].sum())
    end = begin + int(tokens.lengths[first:stop].sum())
    return TokenizedTexts(
        ids=tokens.ids[begin:end],
        lengths=tokens.lengths[first:stop],
        truncated=tokens.truncated[first:stop],
        prompt_tokens=tokens.prompt_tokens,
    )
