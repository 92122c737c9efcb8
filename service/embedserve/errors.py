"""Every failure the service can report, as one tree.

This module decides *whose fault* a failure is and *whether to retry*. It must never know how a failure is spelled on a
wire: the only translation to gRPC statuses is ``api/status.py``, the only translation to exit codes is ``cli.py``.

    EmbedServeError
    ├── CallerError                the caller must change the request; retrying it is useless
    │   ├── InvalidRequest         one or more fields are wrong; carries every violation      INVALID_ARGUMENT
    │   ├── RevisionMismatch       the pinned revision is not the one that is served          FAILED_PRECONDITION
    │   ├── UnknownModel           no such model here                                         NOT_FOUND
    │   └── Unsupported            this model or build cannot do that                         UNIMPLEMENTED
    ├── Refusal                    nothing is wrong with the request; try again later
    │   ├── Overloaded             shed by an admission policy or a queue limit               RESOURCE_EXHAUSTED
    │   └── NotServing             starting, draining or stopped                              UNAVAILABLE
    │       └── EngineStalled      the device is silent for too long; it may come back        UNAVAILABLE
    ├── DeadlineExpired            the caller's time ran out before the answer                DEADLINE_EXCEEDED
    ├── ServerFault                ours; the message is for the log, the client gets an id    INTERNAL
    │   ├── ItemFailed             this text makes the model fail                             INTERNAL
    │   ├── NonFiniteOutput        the model gave NaN or infinity for this text, twice        INTERNAL
    │   ├── ItemTooLarge           one text alone does not fit the device's memory; no retry  RESOURCE_EXHAUSTED
    │   └── EngineFailed           the worker died while this request was in flight           INTERNAL
    ├── StartupError               the process cannot serve; exit 1
    │   └── ModelRefused           the checkpoint is incomplete, unsafe or not an encoder
    ├── ConfigError                settings are wrong, all of them listed; exit 2
    └── InvariantBroken            a promise of our own code does not hold; exit 70
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "CallerError",
    "ConfigError",
    "DeadlineExpired",
    "EmbedServeError",
    "EngineFailed",
    "EngineStalled",
    "InvalidRequest",
    "InvariantBroken",
    "ItemFailed",
    "ItemTooLarge",
    "ModelRefused",
    "NonFiniteOutput",
    "NotServing",
    "Overloaded",
    "Refusal",
    "RevisionMismatch",
    "ServerFault",
    "StartupError",
    "UnknownModel",
    "Unsupported",
    "Violation",
]


class EmbedServeError(Exception):
    """The root of every failure that embedserve raises on purpose."""

    retryable: ClassVar[bool] = False
    """Whether the same request may succeed later, unchanged."""


class CallerError(EmbedServeError):
    """The request is wrong as it stands."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with one field of a request."""

    field: str
    """The path in the request, as in ``texts[3]``."""
    description: str
    """A sentence that says what was given, what the limit is and what to do."""
    reason: str
    """A stable SCREAMING_SNAKE word for programs, such as ``TEXT_TOO_LONG``."""


class InvalidRequest(CallerError):
    """One or more fields are wrong; ``violations`` holds all of them, never only the first."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        """Keep ``violations``, which must not be empty."""
        if not violations:
            raise InvariantBroken("an InvalidRequest without a violation")
        self.violations = tuple(violations)
        first = self.violations[0]
        more = f" (and {len(self.violations) - 1} more)" if len(self.violations) > 1 else ""
        where = f"{first.field}: " if first.field else ""
        super().__init__(f"{where}{first.description}{more}")


class RevisionMismatch(CallerError):
    """The caller pinned a revision that is not the one that is served."""

    def __init__(self, expected: str, served: str) -> None:
        """Name both revisions."""
        self.expected = expected
        self.served = served
        super().__init__(f"expected_revision is {expected!r} but revision {served!r} is served")


class UnknownModel(CallerError):
    """No model of that name is served."""

    def __init__(self, asked: str, served: Sequence[str]) -> None:
        """Name the model asked for and those that are served."""
        self.asked = asked
        self.served = tuple(served)
        super().__init__(f"model {asked!r} is not served here; served: {', '.join(self.served)}")


class Unsupported(CallerError):
    """This model or build cannot do what was asked; never answered by an approximation."""


class Refusal(EmbedServeError):
    """Nothing is wrong with the request, but not now."""

    retryable = True

    def __init__(self, message: str, *, reason: str, retry_after_ms: int | None) -> None:
        """``retry_after_ms`` is our honest estimate, or ``None`` where there is none."""
        self.reason = reason
        self.retry_after_ms = retry_after_ms
        super().__init__(message)


class Overloaded(Refusal):
    """Shed by an admission policy or a queue limit.

    ``policy`` names what refused, ``figures`` the numbers that decided, for traces and logs.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        policy: str,
        retry_after_ms: int | None,
        figures: dict[str, float] | None = None,
    ) -> None:
        """Keep the policy and its figures."""
        super().__init__(message, reason=reason, retry_after_ms=retry_after_ms)
        self.policy = policy
        self.figures = figures or {}


class NotServing(Refusal):
    """The process is starting, draining or stopped."""


class EngineStalled(NotServing):
    """The device is silent for longer than a pass may take: what is queued now may never be run."""


class DeadlineExpired(EmbedServeError):
    """The caller's time ran out; the work was not started, or its result was dropped."""


class ServerFault(EmbedServeError):
    """Ours. Its text is for the log; a client sees an id only."""


class ItemFailed(ServerFault):
    """This text makes the forward pass raise, alone."""


class NonFiniteOutput(ServerFault):
    """The model gave NaN or infinity for this text, also when it was run alone."""


class ItemTooLarge(ServerFault):
    """One text alone does not fit the device's memory; a retry here cannot help."""


class EngineFailed(ServerFault):
    """The worker died or an invariant broke while this request was in flight."""


class StartupError(EmbedServeError):
    """The process cannot serve; exit 1."""


class ModelRefused(StartupError):
    """The checkpoint is incomplete, unsafe or not an encoder that we can serve rightly."""


class ConfigError(EmbedServeError):
    """Settings are wrong; ``problems`` lists all of them; exit 2."""

    def __init__(self, problems: Sequence[str]) -> None:
        """One sentence a problem."""
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class InvariantBroken(EmbedServeError):
    """A promise of our own code does not hold; the process ends with 70."""
