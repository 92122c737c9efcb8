"""How a failure is told to a client: the only place that knows ``grpc.StatusCode`` for errors.

Decides status, message, ``google.rpc`` details and retry hints. Must never know what raised the error or why. The text
of an exception that is ours never goes out: the client gets an id that the log names too.

Details follow the richer error model (``grpc-status-details-bin`` holding ``google.rpc.Status``) with ErrorInfo on
every error (AIP-193); retry pushback follows gRFC A6: clients that have a retry policy wait that long, and a negative
value stops them.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from embedserve.api.refusal_details import refusal_status, retry_info
from embedserve.errors import (
    CallerError,
    ConfigError,
    DeadlineExpired,
    EmbedServeError,
    EngineFailed,
    EngineStalled,
    InvalidRequest,
    InvariantBroken,
    ItemFailed,
    ItemTooLarge,
    NonFiniteOutput,
    NotServing,
    Overloaded,
    Refusal,
    RevisionMismatch,
    ServerFault,
    StartupError,
    UnknownModel,
    Unsupported,
    Violation,
)

__all__ = [
    "BAD_TEXT",
    "DOMAIN",
    "RefusalText",
    "Reply",
    "item_error",
    "new_error_id",
    "refusal",
    "refusal_text",
    "reply",
    "unexpected",
]

DOMAIN: Final = "embedserve"
"""``ErrorInfo.domain`` of every error."""
MAX_DETAILS_BYTES: Final = 5120
"""Trailers are limited to 8 KiB in all by most peers, and base64 makes three bytes four: 5 KiB become 6.7 KiB."""
MAX_MESSAGE_CHARACTERS: Final = 256
"""The message is sent twice, in ``grpc-message`` (percent-encoded) and in the details."""
BAD_TEXT: Final[int] = grpc.StatusCode.INVALID_ARGUMENT.value[0]
"""``ItemError.code`` of a ``validation.BadText``."""
JITTER_SPREAD: Final = 0.2
"""A retry hint is scaled by 0.8 to 1.2, so that those refused together do not come back together."""
NEVER: Final = "-1"
"""A pushback that tells the client not to retry (gRFC A6)."""

_PUSHBACK = "grpc-retry-pushback-ms"
_DETAILS = "grpc-status-details-bin"

Jitter = Callable[[], float]
"""Gives the factor for one retry hint."""


Trailers: TypeAlias = tuple[tuple[str, str | bytes], ...]


class Reply(NamedTuple):
    """What goes to the client, and what the log needs to find it again."""

    code: grpc.StatusCode
    message: str
    trailers: Trailers
    error_type: str
    """Low-cardinality word for metrics: the error's class name, or a refusal's reason."""
    error_id: str | None = None
    """Set where the error is ours."""


class RefusalText(NamedTuple):
    """What refusals for one reason have in common."""

    code: grpc.StatusCode
    message: str
    details: bytes
    """``google.rpc.Status`` without RetryInfo."""
    reason: str
    pushback: str | None
    """What a client with a retry policy is told where no wait is worth it."""


class _Spelling(NamedTuple):
    code: grpc.StatusCode
    reason: str


_SPELLINGS: Final[Mapping[type[EmbedServeError], _Spelling]] = {
    InvalidRequest: _Spelling(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    RevisionMismatch: _Spelling(grpc.StatusCode.FAILED_PRECONDITION, "REVISION_MISMATCH"),
    UnknownModel: _Spelling(grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL"),
    Unsupported: _Spelling(grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED"),
    CallerError: _Spelling(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    Overloaded: _Spelling(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    NotServing: _Spelling(grpc.StatusCode.UNAVAILABLE, "NOT_SERVING"),
    EngineStalled: _Spelling(grpc.StatusCode.UNAVAILABLE, "ENGINE_STALLED"),
    Refusal: _Spelling(grpc.StatusCode.UNAVAILABLE, "REFUSED"),
    DeadlineExpired: _Spelling(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED"),
    ItemTooLarge: _Spelling(grpc.StatusCode.RESOURCE_EXHAUSTED, "ITEM_TOO_LARGE"),
    ItemFailed: _Spelling(grpc.StatusCode.INTERNAL, "ITEM_FAILED"),
    NonFiniteOutput: _Spelling(grpc.StatusCode.INTERNAL, "NON_FINITE_OUTPUT"),
    EngineFailed: _Spelling(grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
    ServerFault: _Spelling(grpc.StatusCode.INTERNAL, "INTERNAL"),
    StartupError: _Spelling(grpc.StatusCode.INTERNAL, "INTERNAL"),
    ConfigError: _Spelling(grpc.StatusCode.INTERNAL, "INTERNAL"),
    InvariantBroken: _Spelling(grpc.StatusCode.INTERNAL, "INTERNAL"),
    EmbedServeError: _Spelling(grpc.StatusCode.INTERNAL, "INTERNAL"),
}
"""Every class of the tree; a subclass that is not here is spelled as its nearest ancestor."""

_FAULTS: Final[Mapping[str, str]] = {
    "ITEM_TOO_LARGE": "one text alone does not fit the device's memory: do not send it here again",
    "ITEM_FAILED": "the model failed on this text",
    "NON_FINITE_OUTPUT": "the model gave a vector that is not finite for this text",
    "ENGINE_FAILED": "the engine failed while this request was in flight",
}
"""What a client may know of a fault of ours."""


def new_error_id() -> str:
    """16 hex digits to find one error in the log."""
    return secrets.token_hex(8)


def _jitter() -> float:
    return random.uniform(1 - JITTER_SPREAD, 1 + JITTER_SPREAD)  # noqa: S311  # spreads load, hides nothing


def reply(
    error: EmbedServeError, *, error_id: str | None = None, left_ms: float | None = None, jitter: Jitter = _jitter
) -> Reply:
    """The answer to ``error``, in about 16 us for a refusal.

    ``error_id`` is made here when needed and not given; ``left_ms`` is until the caller's deadline, if it has one.
    """
    spelling = _spelling(error)
    if isinstance(error, InvalidRequest):
        return _invalid(error, spelling)
    if isinstance(error, Refusal):
        return refusal(refusal_text(error), error.retry_after_ms, left_ms=left_ms, jitter=jitter)
    if isinstance(error, (CallerError, DeadlineExpired)):
        return _reply(
            spelling, _cut(str(error)), type(error).__name__, [_error_info(spelling.reason, _metadata(error))]
        )
    return _fault(spelling, type(error).__name__, error_id or new_error_id())


def refusal_text(error: Refusal) -> RefusalText:
    """All of a refusal but when to come back: 40 us of the loop's time under load, worth keeping for a moment."""
    spelling = _spelling(error)
    metadata: dict[str, str] = {}
    pushback = None
    if isinstance(error, Overloaded):
        metadata = {name: f"{value:.6g}" for name, value in error.figures.items()}
        metadata["policy"] = error.policy
        pushback = NEVER
    message = _cut(str(error))
    details = refusal_status(spelling.code.value[0], message, error.reason, DOMAIN, metadata)
    return RefusalText(spelling.code, message, details, error.reason, pushback)


def refusal(text: RefusalText, retry_after_ms: int | None, *, left_ms: float | None, jitter: Jitter = _jitter) -> Reply:
    """The answer to one refused call; ``left_ms`` is until the caller's deadline, if it has one."""
    details, pushback = text.details, text.pushback
    if retry_after_ms is not None:
        wait_ms = max(1, round(retry_after_ms * jitter()))
        # The retries of a gRPC client share the call's deadline. One that is told to wait past it would sit the rest of
        # its time out and then report that, not the refusal. RetryInfo still says when a call with a new one may come.
        if left_ms is None or wait_ms < left_ms:
            pushback = str(wait_ms)
        details += retry_info(wait_ms)
    return Reply(text.code, text.message, _trailers(details, pushback), text.reason)


def unexpected(exception: BaseException, *, error_id: str | None = None) -> Reply:
    """The answer to an exception that is not of our tree: INTERNAL with an id, and nothing of the exception."""
    spelling = _SPELLINGS[ServerFault]
    return _fault(spelling, type(exception).__name__, error_id or new_error_id())


def item_error(error: EmbedServeError, *, error_id: str | None = None) -> tuple[int, str, str]:
    """``code, reason, message`` for ``ItemError``: why one text of a stream has no vector."""
    spelling = _spelling(error)
    code = int(spelling.code.value[0])
    if isinstance(error, InvalidRequest):
        violation = error.violations[0]
        return code, violation.reason, _cut(violation.description)
    if isinstance(error, Refusal):
        return code, error.reason, _cut(str(error))
    if isinstance(error, (CallerError, DeadlineExpired)):
        return code, spelling.reason, _cut(str(error))
    return code, spelling.reason, _fault_message(spelling, error_id or new_error_id())


def _spelling(error: EmbedServeError) -> _Spelling:
    for kind in type(error).__mro__:
        spelling = _SPELLINGS.get(kind)
        if spelling is not None:
            return spelling
    raise InvariantBroken(f"no status for {type(error).__name__}")


def _cut(text: str, limit: int = MAX_MESSAGE_CHARACTERS) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _any(message: Message) -> any_pb2.Any:
    return any_pb2.Any(
        type_url=f"type.googleapis.com/{message.DESCRIPTOR.full_name}", value=message.SerializeToString()
    )


def _error_info(reason: str, metadata: Mapping[str, str]) -> any_pb2.Any:
    return _any(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata))


def _metadata(error: EmbedServeError) -> dict[str, str]:
    if isinstance(error, RevisionMismatch):
        return {"expected": _cut(error.expected), "served": error.served}
    if isinstance(error, UnknownModel):
        return {"asked": _cut(error.asked), "served": _cut(", ".join(error.served))}
    return {}


def _reply(
    spelling: _Spelling,
    message: str,
    error_type: str,
    details: Sequence[any_pb2.Any],
    *,
    pushback: str | None = None,
    error_id: str | None = None,
) -> Reply:
    status = status_pb2.Status(code=spelling.code.value[0], message=message, details=details).SerializeToString()
    return Reply(spelling.code, message, _trailers(status, pushback), error_type, error_id)


def _trailers(details: bytes, pushback: str | None) -> Trailers:
    return ((_DETAILS, details),) if pushback is None else ((_PUSHBACK, pushback), (_DETAILS, details))


def _fault_message(spelling: _Spelling, error_id: str) -> str:
    return f"{_FAULTS.get(spelling.reason, 'internal error')} (error id {error_id})"


def _fault(spelling: _Spelling, error_type: str, error_id: str) -> Reply:
    # INTERNAL is in nobody's retry policy by default, but may be in somebody's: the same request would fail again.
    details = [_error_info(spelling.reason, {"error_id": error_id})]
    message = _fault_message(spelling, error_id)
    return _reply(spelling, message, error_type, details, pushback=NEVER, error_id=error_id)


def _invalid(error: InvalidRequest, spelling: _Spelling) -> Reply:
    """List every violation, or as many as fit; the last place then says how many are left out."""
    bad_request = error_details_pb2.BadRequest()
    size = 0
    for position, violation in enumerate(error.violations):
        size += _add(bad_request, violation)
        if size > MAX_DETAILS_BYTES - 1024:  # room for the message, ErrorInfo and the line below
            del bad_request.field_violations[-1]
            left = len(error.violations) - position
            _add(bad_request, Violation("", f"{left} more violations do not fit here", "MORE_VIOLATIONS"))
            break
    info = _error_info(spelling.reason, {"violations": str(len(error.violations))})
    return _reply(spelling, _cut(str(error)), type(error).__name__, [info, _any(bad_request)])


def _add(bad_request: error_details_pb2.BadRequest, violation: Violation) -> int:
    """Add one violation; returns its size in bytes."""
    entry = bad_request.field_violations.add(
        field=_cut(violation.field), description=_cut(violation.description, 512), reason=violation.reason
    )
    size: int = entry.ByteSize()
    return size + 3
