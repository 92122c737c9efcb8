"""The door: calls that are refused on their headers, before their message is read.

Decides which calls are asked about, and how a refusal is put into bytes when there are hundreds a second. Must never
know a message or why calls are refused: ``engine.unread`` decides that. A call whose headers are wrong is let through,
to be told so.
"""

from __future__ import annotations

from typing import Final

from embedserve.api import status
from embedserve.api.rpc import Rpc
from embedserve.api.validation import caller_of
from embedserve.api.violations import Violations
from embedserve.engine.intake import overloaded
from embedserve.engine.unread import UnreadAdmission
from embedserve.scheduling.item import Rejection

__all__ = ["Door"]

KEPT_NS: Final = 100_000_000
"""The sentence of a refusal, its figures and its details are made once in so long for each reason: they took a third of
a refusal, and nobody reads a thousand a second. When to come back is each call's own."""
CALLS_OWN: Final = frozenset({"deadline"})
"""Policies whose figures are one caller's: kept, they would tell another how much time this one had. They are left out;
spans and log lines have them."""
GUESSED: Final = frozenset({"tokens", "items"})
"""Figures that would be the caller's own if it had been read."""


class Door:
    """Turns calls away."""

    def __init__(self, unread: UnreadAdmission, *, max_request_ms: int, max_tenant_bytes: int) -> None:
        """The limits are the settings of the same names."""
        self._unread = unread
        self._max_request_ns = max_request_ms * 1_000_000
        self._max_tenant_bytes = max_tenant_bytes
        self.watched = unread.watched
        """Whether calls that arrive at an instant are to be asked about."""
        self._kept: dict[tuple[str, str], tuple[int, status.RefusalText]] = {}

    def refusal(self, call: Rpc, deadline_ns: int | None, now_ns: int) -> status.Reply | None:
        """The answer to a call that is turned away; ``None``: read its message."""
        violations = Violations()
        priority, tenant = caller_of(call.metadata, self._max_tenant_bytes, violations)
        latest_ns = call.arrived_ns + self._max_request_ns
        ends_ns = latest_ns if deadline_ns is None else min(deadline_ns, latest_ns)
        if violations.total or not self._unread.judges(ends_ns, priority, now_ns):
            return None
        rejection = self._unread.judge(call.arrived_ns, ends_ns, priority, tenant, now_ns)
        call.judged_unread = True
        if rejection is None:
            return None
        figures = {name: value for name, value in rejection.figures.items() if name not in GUESSED}
        rejection = rejection._replace(figures=figures)
        text = self._text(rejection, now_ns)
        call.attributes.update(rejection.figures)
        call.attributes["policy"] = rejection.policy
        call.attributes["priority"] = priority.name.lower()
        if tenant:
            call.attributes["tenant"] = tenant
        left_ms = None if deadline_ns is None else (deadline_ns - now_ns) / 1e6
        return status.refusal(text, rejection.retry_after_ms, left_ms=left_ms)

    def _text(self, rejection: Rejection, now_ns: int) -> status.RefusalText:
        key = (rejection.policy, rejection.reason)
        made_ns, text = self._kept.get(key, (0, None))
        if text is None or now_ns - made_ns > KEPT_NS:
            shown = rejection._replace(figures={}) if rejection.policy in CALLS_OWN else rejection
            text = status.refusal_text(overloaded(shown))
            self._kept[key] = (now_ns, text)
        return text
