"""The lines that load could make many of: one a call, and one a second for what is shed.

Decides which calls get a line, and that refusals are summed up. Must never know gRPC or how a line is written.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from embedserve.scheduling.item import Rejection
from embedserve.telemetry.logs import LineLogger
from embedserve.telemetry.settings import LogRequests
from embedserve.telemetry.spans import error_kind
from embedserve.telemetry.tracing import CallEnd

__all__ = ["CallLog", "ShedLog"]

SHED_INTERVAL_S: Final = 1.0
"""Under overload thousands of requests are refused in a second; one line says as much as all of theirs."""
_NS_PER_MS: Final = 1e6
_SHOWN: Final = ("texts", "tenant", "model", "encoding", "dimensions", "deadline_ms", "policy", "error_id")
"""What a line says of a call, of all that the API knows; numbers and names, never content."""
_RENAMED: Final = {"texts": "text_count"}

Schedule = Callable[[float, Callable[[], None]], object]


class CallLog:
    """Writes the access line of a call, if it is to have one."""

    def __init__(self, logger: Any, which: LogRequests, ratio: float) -> None:
        """``ratio`` of the calls that are OK get a line when ``which`` is ``sampled``; failed ones always do.

        Calls that were shed have one with ``all`` only: ``ShedLog`` sums them up. A line costs half as much again as a
        refusal, and under overload there are thousands.
        """
        self._logger = logger
        self._later = logger.later if isinstance(logger, LineLogger) else None
        self._shed_too = which == "all"
        self._ratio = {"all": 1.0, "sampled": ratio}.get(which, 0.0)
        self._random = random.Random()  # noqa: S311 - which lines are kept is no secret

    def __call__(self, call: CallEnd) -> None:
        """Log ``call``."""
        failed = call.status != "OK"
        if failed:
            if "policy" in call.attributes and not self._shed_too:
                return
        elif self._random.random() >= self._ratio:
            return
        level = "warning" if failed else "info"
        if self._later is not None:
            self._later("rpc", level, partial(_fields, call), call.trace)
        else:
            write = getattr(self._logger, level)
            write("rpc", **_fields(call))


def _fields(call: CallEnd) -> dict[str, object]:
    """What a line says of ``call``."""
    fields: dict[str, object] = {
        "method": call.method,
        "status": call.status,
        "duration_ms": round(call.duration_ns / _NS_PER_MS, 3),
        "peer": call.peer,
    }
    for key in _SHOWN:
        if key in call.attributes:
            fields[_RENAMED.get(key, key)] = call.attributes[key]
    if call.tokens:
        fields["tokens"] = call.tokens
    if call.status != "OK":
        fields["error_kind"] = error_kind(call.status, call.error_type, call.attributes)
    if call.error_type is not None:
        fields["error_type"] = call.error_type
    return fields


class ShedLog:
    """Writes the first refusal at once and then one line a second for as long as there are more."""

    def __init__(self, logger: Any, schedule: Schedule | None = None) -> None:
        """``schedule(delay_s, callback)`` defaults to the running loop's ``call_later``."""
        self._logger = logger
        self._schedule = schedule or (
            lambda delay_s, callback: asyncio.get_running_loop().call_later(delay_s, callback)
        )
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._waiting = False

    def __call__(self, rejection: Rejection, stage: str) -> None:
        """Count a refusal."""
        self._counts[(rejection.policy, rejection.reason, stage)] += 1
        if not self._waiting:
            self._write()
            self._wait()

    def flush(self) -> None:
        """Write what was counted since the last line, if anything."""
        if self._counts:
            self._write()

    def _wait(self) -> None:
        self._waiting = True
        self._schedule(SHED_INTERVAL_S, self._due)

    def _due(self) -> None:
        self._waiting = False
        if self._counts:
            self._write()
            self._wait()

    def _write(self) -> None:
        by_reason = {
            f"{policy}/{reason}/{stage}": count for (policy, reason, stage), count in self._counts.most_common()
        }
        self._logger.warning("requests_shed", requests=self._counts.total(), by_reason=by_reason)
        self._counts.clear()
