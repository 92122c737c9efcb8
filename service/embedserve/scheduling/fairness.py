"""Who goes next: a fair order of members (tenants of a class, flows of a tenant) by the tokens they have had.

Decides order only. Must never know what a member wants to run, how a batch is filled, or the time.

Start-time fair queueing (Goyal, Vin, Cheng: "Start-time Fair Queuing", SIGCOMM 1996), in the form of token counters
(Sheng et al.: "Fairness in Serving Large Language Models", OSDI 2024): each member has a tag, the tokens charged to it;
the smallest tag is served; who arrives starts at the virtual time. Chosen over deficit round robin because a newcomer
is next, rather than after a round of all others, and because one tag orders a member in all buckets at once.

Virtual time moves to the tag of whom is served, as in SFQ, and besides by ``tokens / (active + 1)``, the pace of the
ideal fluid server. Without that second term an endless flood of one-item newcomers, each starting at a virtual time
that stands still, would hold back for ever a member that was served once. The ``+ 1`` is the newcomer's place: a
member that runs alone stays ahead of virtual time, so that whoever comes beside it is next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from embedserve.scheduling.waiting import Run

__all__ = ["FairOrder", "Flow", "PriorityClass", "Tenant"]


class Member(Protocol):
    """What ``FairOrder`` asks of those it orders."""

    key: Hashable
    seq: int
    tag: int
    queued: list[bool]

    @property
    def work(self) -> Sequence[object]:
        """Per lane: truthy while something waits there."""


M = TypeVar("M", bound=Member)


class FairOrder(Generic[M]):
    """Members with work, per lane in the order of their tags; ties go to the smaller ``seq``.

    A lane is a bucket, or the only one when packed. A tag only grows, so that a heap entry with an old tag is put back
    when it is met instead of being searched for: O(log n) a turn.
    """

    __slots__ = ("_gone", "_idle", "_idle_sweep_at", "active", "heaps", "vtime")

    SCALE_BITS = 16
    """Tags are tokens in fixed point, so that one token shared by 60,000 members still moves virtual time."""
    SLACK = 64
    """Stale entries that are not worth a sweep."""

    def __init__(self, lanes: int) -> None:
        self.vtime = 0
        self.active = 0
        """Members with work in any lane."""
        self.heaps: list[list[tuple[int, int, M]]] = [[] for _ in range(lanes)]
        self._idle: dict[Hashable, int] = {}
        self._idle_sweep_at = self.SLACK
        self._gone = 0

    def activate(self, member: M) -> None:
        """A member has work again: it starts now, or where it stopped if it had been served ahead of the others."""
        self.active += 1
        member.tag = max(self.vtime, self._idle.pop(member.key, 0)) if self._idle else self.vtime

    def enqueue(self, member: M, lane: int) -> None:
        """A member has work in a lane."""
        if not member.queued[lane]:
            member.queued[lane] = True
            heappush(self.heaps[lane], (member.tag, member.seq, member))

    def leave(self, member: M) -> None:
        """A member has no work left. Its lead is kept while others wait, so that coming in pieces gains nothing."""
        self.active -= 1
        if not self.active:
            self._idle.clear()
            self._idle_sweep_at = self.SLACK
        elif member.tag > self.vtime:
            self._idle[member.key] = member.tag
            if len(self._idle) > self._idle_sweep_at:
                self._idle = {key: tag for key, tag in self._idle.items() if tag > self.vtime}
                self._idle_sweep_at = 2 * len(self._idle) + self.SLACK
        self._gone += 1
        if self._gone > 2 * self.active + self.SLACK:
            self._sweep()

    def head(self, lane: int) -> M | None:
        """The member that is next in a lane."""
        heap = self.heaps[lane]
        while heap:
            tag, seq, member = heap[0]
            if not member.work[lane]:
                heappop(heap)
                member.queued[lane] = False
            elif tag != member.tag:
                heapreplace(heap, (member.tag, seq, member))
            else:
                return member
        return None

    def surcharge(self, member: M, tokens: int) -> None:
        """A member caused work out of its turn: it pays with later turns; virtual time does not move."""
        member.tag += tokens << self.SCALE_BITS
        if member.key in self._idle:
            self._idle[member.key] = max(self._idle[member.key], member.tag)

    def set_aside(self, lane: int) -> None:
        """Takes the head out of its lane until ``enqueue``: what it has next does not fit this batch."""
        heappop(self.heaps[lane])[2].queued[lane] = False

    def charge(self, member: M, tokens: int, *, in_turn: bool = True) -> None:
        """A member was served; not ``in_turn`` if one with a smaller tag waits, which had no use for the room.

        Out of turn its start says nothing of how far the order has come: whoever left with a small lead a moment ago
        would come back far ahead of those who wait, and those who come now too.
        """
        start, cost = member.tag, tokens << self.SCALE_BITS
        member.tag = start + cost
        paced = self.vtime + cost // (self.active + 1)
        self.vtime = max(start, paced) if in_turn else paced

    def _sweep(self) -> None:
        self._gone = 0
        for lane, heap in enumerate(self.heaps):
            kept = [entry for entry in heap if entry[2].work[lane]]
            if len(kept) < len(heap):
                for entry in heap:
                    entry[2].queued[lane] = bool(entry[2].work[lane])
                heapify(kept)
                self.heaps[lane] = kept


class Flow:
    """Work of one request: its runs per lane, first come first served."""

    __slots__ = ("key", "lanes", "queued", "seq", "tag", "work")

    def __init__(self, key: int, seq: int, lanes: int) -> None:
        self.key = key
        self.seq = seq
        self.tag = 0
        self.lanes = 0
        """Lanes with work."""
        self.work: list[OrderedDict[int, Run] | None] = [None] * lanes
        self.queued = [False] * lanes

    def first(self, lane: int) -> Run:
        """The run that is served next in a lane that has work."""
        runs = self.work[lane]
        assert runs, "a flow without work was asked for it"
        return next(iter(runs.values()))


class Tenant:
    """The flows of one tenant in one class."""

    __slots__ = ("apart_until_ns", "flow_by_key", "flows", "key", "lanes", "queued", "seq", "tag", "tokens", "work")

    def __init__(self, key: str, seq: int, lanes: int) -> None:
        self.key = key
        self.seq = seq
        self.tag = 0
        self.lanes = 0
        """Pairs of flow and lane with work."""
        self.work = [0] * lanes
        """Flows with work, per lane."""
        self.queued = [False] * lanes
        self.flows: FairOrder[Flow] = FairOrder(lanes)
        self.flow_by_key: dict[int, Flow] = {}
        self.tokens = 0
        """Useful tokens that wait."""
        self.apart_until_ns = 0
        """In quarantine until then: an item of its was poison lately."""


class PriorityClass:
    """The tenants of one priority, what waits there, and what it is owed of its minimum share."""

    __slots__ = ("credit", "items", "items_by_lane", "tenant_by_key", "tenants", "tokens", "turn_by_lane")

    def __init__(self, lanes: int) -> None:
        self.tenants: FairOrder[Tenant] = FairOrder(lanes)
        self.tenant_by_key: dict[str, Tenant] = {}
        self.items = 0
        self.tokens = 0
        self.items_by_lane = [0] * lanes
        self.turn_by_lane = [0] * lanes
        """Which batch a lane was last chosen for: lanes of one flow take turns."""
        self.credit = 0.0
        """Tokens that are owed to it while higher classes are served."""
