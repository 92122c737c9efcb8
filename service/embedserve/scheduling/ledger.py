"""Who was admitted and is not settled yet, and whose time is up.

Decides when a submission is forgotten (its last item has left) and which waiting items expire. Must never know batches,
outcomes of passes or callers.
"""

from __future__ import annotations

from embedserve.scheduling.admission.gate import Gate
from embedserve.scheduling.agenda import Agenda
from embedserve.scheduling.item import Settled, Verdict
from embedserve.scheduling.retry import RetryLadder
from embedserve.scheduling.waiting import Ticket, WaitingQueue

__all__ = ["Ledger"]


class Ledger:
    """Every admitted submission until its last item is settled (I1), and those that expired and were not told yet."""

    __slots__ = ("_deadlines", "_expired", "_gate", "_ladder", "_overdue", "_queue", "tickets")

    def __init__(self, queue: WaitingQueue, ladder: RetryLadder, gate: Gate) -> None:
        self._queue = queue
        self._ladder = ladder
        self._gate = gate
        self.tickets: dict[int, Ticket] = {}
        """By submission id."""
        self._deadlines = Agenda(self.tickets.__contains__)
        self._expired: dict[int, Settled] = {}
        self._overdue: dict[int, None] = {}

    @property
    def has_expired(self) -> bool:
        """Whether expiries were found that nobody was told of."""
        return bool(self._expired)

    def add(self, ticket: Ticket) -> None:
        """A submission was admitted."""
        self.tickets[ticket.id] = ticket
        if ticket.deadline_ns is not None:
            self._deadlines.add(ticket.deadline_ns, ticket.id)

    def cancel(self, submission_id: int) -> int:
        """Waiting items leave now, running ones count no more; how many left. Unknown ids are no error."""
        self._expired.pop(submission_id, None)
        ticket = self.tickets.get(submission_id)
        if ticket is None or ticket.cancelled:
            return 0
        ticket.cancelled = True
        left = len(self._withdraw(ticket))
        self.release(ticket)
        return left

    def expire_due(self, now_ns: int) -> None:
        """Withdraws the waiting items whose deadline has come; a deadline is the first instant that is too late."""
        submission_id = self._deadlines.pop_due(now_ns)
        while submission_id is not None:
            ticket = self.tickets[submission_id]
            if not ticket.cancelled:
                indexes = self._withdraw(ticket)
                if indexes:
                    self._expired[ticket.id] = Settled(ticket.id, tuple(indexes), Verdict.EXPIRED)
                    if not ticket.probe:
                        self._gate.observe_expired(now_ns - ticket.submitted_ns, ticket.predicted_ns)
                if ticket.running:
                    self._overdue[ticket.id] = None
                self.release(ticket)
            submission_id = self._deadlines.pop_due(now_ns)

    def take_expired(self) -> tuple[Settled, ...]:
        """What ``expire_due`` found since it was last asked."""
        if not self._expired:
            return ()
        expired = tuple(self._expired.values())
        self._expired.clear()
        return expired

    def take_overdue(self) -> tuple[int, ...]:
        """Submissions whose deadline ``expire_due`` found to have come while items of theirs run."""
        if not self._overdue:
            return ()
        overdue = tuple(self._overdue)
        self._overdue.clear()
        return overdue

    def first_deadline_ns(self) -> int | None:
        """The next deadline of anybody who is not settled."""
        return self._deadlines.first_ns()

    def release(self, ticket: Ticket) -> bool:
        """Forgets a submission that has no item left. Returns whether it had none."""
        if ticket.waiting or ticket.retrying or ticket.running:
            return False
        self.tickets.pop(ticket.id, None)
        if self._overdue:
            self._overdue.pop(ticket.id, None)
        return True

    def clear(self) -> dict[int, list[int]]:
        """Forgets everybody; the items that waited for their first run, by submission."""
        waiting = {ticket.id: self._queue.withdraw(ticket) for ticket in list(self.tickets.values()) if ticket.waiting}
        self.tickets.clear()
        self._overdue.clear()
        return waiting

    def _withdraw(self, ticket: Ticket) -> list[int]:
        """All items of a submission that wait, for the first time or again."""
        indexes = self._queue.withdraw(ticket) if ticket.waiting else []
        if ticket.retrying:
            indexes = sorted(indexes + self._ladder.withdraw(ticket))
        return indexes
