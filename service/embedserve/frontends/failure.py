"""Failures on their way between processes.

Decides which errors cross as what they are, so that a caller is told the same as by one process alone. Must never know
a status or a transport. What is no ``EmbedServeError`` crosses as ``EngineFailed`` with its type's name: its text was
written for no caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

from embedserve.engine.wall import sentence
from embedserve.errors import (
    DeadlineExpired,
    EmbedServeError,
    EngineFailed,
    EngineStalled,
    InvalidRequest,
    ItemFailed,
    ItemTooLarge,
    NonFiniteOutput,
    NotServing,
    Overloaded,
    Violation,
)

__all__ = ["pack_failure", "unpack_failure"]

_PLAIN: Final[Mapping[str, Callable[[str], EmbedServeError]]] = {
    kind.__name__: kind for kind in (DeadlineExpired, EngineFailed, ItemFailed, ItemTooLarge, NonFiniteOutput)
}
_REFUSALS: Final = {kind.__name__: kind for kind in (EngineStalled, NotServing)}


def pack_failure(error: BaseException) -> bytes:
    """``error`` as JSON."""
    facts: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    match error:
        case Overloaded():
            facts |= {
                "reason": error.reason,
                "retry_after_ms": error.retry_after_ms,
                "policy": error.policy,
                "figures": error.figures,
            }
        case NotServing():
            facts |= {"reason": error.reason, "retry_after_ms": error.retry_after_ms}
        case InvalidRequest():
            facts["violations"] = [(v.field, v.description, v.reason) for v in error.violations]
        case _ if facts["type"] not in _PLAIN:
            facts = {"type": "EngineFailed", "message": f"in the engine process: {sentence(error)}"}
    return orjson.dumps(facts, option=orjson.OPT_SERIALIZE_NUMPY)


def unpack_failure(packed: bytes) -> EmbedServeError:
    """What ``pack_failure`` was given."""
    facts = orjson.loads(packed)
    kind, message = facts["type"], facts["message"]
    if kind in _PLAIN:
        return _PLAIN[kind](message)
    if kind in _REFUSALS:
        return _REFUSALS[kind](message, reason=facts["reason"], retry_after_ms=facts["retry_after_ms"])
    if kind == "InvalidRequest":
        return InvalidRequest([Violation(*violation) for violation in facts["violations"]])
    return Overloaded(
        message,
        reason=facts["reason"],
        policy=facts["policy"],
        retry_after_ms=facts["retry_after_ms"],
        figures=facts["figures"],
    )
