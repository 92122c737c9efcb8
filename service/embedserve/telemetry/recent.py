"""What has happened lately, for people who look at one process: rates, latencies, refusals, slow calls.

Decides which recent facts are kept and for how long: everything is a ring, a reservoir or a count, so that memory does
not grow and an event costs 1 to 4 us. Calls that have ended are noted, and counted some at a time: code that runs once
among all else that a call needs costs three times what it costs in a row. Must never know who shows them, nor what a
scrape shows: metrics are kept apart, since they count from the start and this forgets; nor who tells it, which
``watching.py`` does. Event loop only.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Final

from embedserve.engine.observer import BatchRecord
from embedserve.engine.stages import Stages
from embedserve.snapshot import Refusal
from embedserve.telemetry.ended_calls import EndedCall, Samples, Slowest, longest_stage
from embedserve.telemetry.seconds import NS, RECENT_S, Seconds, Slot

__all__ = ["NOW_S", "UNARY", "Episode", "Recent", "Refused"]

NOW_S: Final = 10
"""What rates are taken over: short enough to follow a change, long enough not to flicker."""
QUIET_NS: Final = NOW_S * NS
"""Trouble that has not shown for so long is over."""
FULL, NOT_FULL = 0.9, 0.8
"""Busy for more of the time than the first is a bottleneck, until it is under the second."""
RING: Final = 8
"""Failed calls that are kept."""
RING_REASON: Final = 4
"""Refused calls that are kept of each reason, so that a frequent one leaves a rare one to be seen."""
PASSES: Final = 512
"""Passes that are kept: 4 to 50 s of a busy device."""
WAITS: Final = 512
ENDED_MAX: Final = 32
"""Calls that have ended and are not counted yet."""
REASONS_MAX: Final = 64
"""Reasons told apart; there are twenty. What is more counts as other."""
UNARY: Final = "embedserve.v1.EmbeddingService/Embed"
CALLERS_OWN: Final = frozenset(
    {"CANCELLED", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION", "UNIMPLEMENTED"}
)
"""Statuses that are the caller's doing: counted, but no failure of this process."""


Ended = tuple[int, str, int, str, "Stages | None", "str | None", Mapping[str, "str | int | float | bool"], "str | None"]
"""When a call ended, and what ``call_ended`` is told of it."""


class Episode:
    """Something that goes on for a while: events with no more than ``QUIET_NS`` between them."""

    __slots__ = ("last_ns", "since_ns")

    def __init__(self) -> None:
        self.since_ns = self.last_ns = -QUIET_NS

    def mark(self, now_ns: int) -> None:
        """It shows."""
        if now_ns - self.last_ns > QUIET_NS:
            self.since_ns = now_ns
        self.last_ns = now_ns

    def since(self, now_ns: int) -> int | None:
        """Since when; ``None`` where it is over."""
        return self.since_ns if now_ns - self.last_ns <= QUIET_NS else None


class Refused:
    """What was refused for one reason."""

    __slots__ = ("calls", "episode", "last_trace_id", "total")

    def __init__(self) -> None:
        self.episode = Episode()
        self.total = 0
        self.last_trace_id: str | None = None
        self.calls: deque[EndedCall] = deque(maxlen=RING_REASON)


class Recent:
    """The recent past of one process."""

    def __init__(self, tokenizer_threads: int, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """Begin now."""
        self.clock = clock
        self.threads = tokenizer_threads
        now = clock()
        self.seconds = Seconds(now)
        self._second = now // NS
        self._ended: list[Ended] = []
        self.samples = Samples()
        self.slowest, self.slowest_traced = Slowest(), Slowest()
        self.failed: deque[EndedCall] = deque(maxlen=RING)
        self.passes: deque[tuple[int, int, int, int, int]] = deque(maxlen=PASSES)
        """End, texts, tokens, computed tokens, nanoseconds at work."""
        self.waits: deque[tuple[int, int]] = deque(maxlen=WAITS)
        """When a piece of tokenizer work ended, and how long it had waited for a thread."""
        self.by_status: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.reasons: dict[tuple[str, str], Refused] = {}
        self.last_mistake: str | None = None
        self.shedding, self.failing = Episode(), Episode()
        self.full_since: dict[str, int | None] = {"device": None, "tokenizer": None, "event loop": None}
        self.in_flight = 0
        self.last_pass_ns: int | None = None
        self.stalls = 0
        self.last_stall_ns: int | None = None
        self.canary: tuple[str, int] | None = None

    # ------------------------------------------------------------------------------------------------------ calls

    def note_ended(self, ended: Ended) -> None:
        """One call is over; it is counted before anybody reads."""
        self._ended.append(ended)
        if len(self._ended) >= ENDED_MAX:
            self.settle()

    def settle(self) -> None:
        """Count what was noted. To be called before anything is read."""
        ended, self._ended = self._ended, []
        for call in ended:
            self.call_ended(*call)

    def call_ended(
        self,
        now: int,
        method: str,
        arrived_ns: int,
        status: str,
        stages: Stages | None,
        error_type: str | None,
        attributes: Mapping[str, str | int | float | bool],
        trace_id: str | None,
    ) -> None:
        """One call was over at ``now``."""
        slot = self._slot(now)
        slot.calls += 1
        self.by_status[status] += 1
        duration = now - arrived_ns
        if status == "OK":
            if stages is not None:
                slot.texts += stages.texts or int(attributes.get("texts", 0))
                if method == UNARY:
                    self.samples.add(stages, arrived_ns, now)
        elif "policy" in attributes or status == "UNAVAILABLE":
            slot.refused += 1
            call = self._kept(method, now, duration, status, None, error_type, attributes, trace_id)
            self._refuse(call, now)
            return
        elif status in CALLERS_OWN:
            slot.mistaken += 1
            self.last_mistake = status
        else:
            slot.failed += 1
            self.failing.mark(now)
            self.failed.append(self._kept(method, now, duration, status, stages, error_type, attributes, trace_id))
        if method == UNARY:
            slow = self.slowest.beats(duration, now)
            traced = trace_id is not None and self.slowest_traced.beats(duration, now)
            if slow or traced:
                call = self._kept(method, now, duration, status, stages, error_type, attributes, trace_id)
                if slow:
                    self.slowest.add(call)
                if traced:
                    self.slowest_traced.add(call)

    def _refuse(self, call: EndedCall, now: int) -> None:
        self.shedding.mark(now)
        key = (call.policy or "not serving", call.reason or call.status)
        known = self.reasons.get(key)
        if known is None:
            if len(self.reasons) >= REASONS_MAX:
                key = ("other", "other")
            known = self.reasons.setdefault(key, Refused())
        known.total += 1
        known.calls.append(call)
        known.episode.mark(now)
        known.last_trace_id = call.trace_id or known.last_trace_id
        slot = self.seconds.at(now)
        if slot.reasons is None:
            slot.reasons = {}
        slot.reasons[key] = slot.reasons.get(key, 0) + 1

    @staticmethod
    def _kept(
        method: str,
        now: int,
        duration: int,
        status: str,
        stages: Stages | None,
        reason: str | None,
        attributes: Mapping[str, str | int | float | bool],
        trace_id: str | None,
    ) -> EndedCall:
        """What is kept of a call: these names and numbers and no others, whatever the attributes hold."""
        tenant, policy, texts = attributes.get("tenant"), attributes.get("policy"), attributes.get("texts")
        tokens = stages.tokens if stages is not None and stages.tokens else None
        longest = longest_stage(stages, now, answered=status == "OK") if stages is not None else None
        return EndedCall(
            now, method.rpartition("/")[2], status, reason, str(policy) if policy else None,
            str(tenant) if tenant else None, int(texts) if texts is not None else None, tokens, duration, longest,
            trace_id,
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------------------- engine

    def tokenized(self, waited_ns: int, elapsed_ns: int) -> None:
        """Some texts are tokens. What did not wait at all was done on the event loop, and is counted with it."""
        now = self.clock()
        slot = self._slot(now)
        slot.tokenized += 1
        if waited_ns:
            self.seconds.spread("tokenizer_ns", now - elapsed_ns, now)
            self.waits.append((now, waited_ns))

    def batch_finished(self, record: BatchRecord) -> None:
        """A pass is over."""
        self.outcomes[record.outcome] += 1
        if record.outcome == "skipped":  # nothing was computed
            return
        now = self.clock()
        slot = self._slot(now)
        batch, times = record.batch, record.times
        if times is not None:
            begin, end = times.start_ns + record.shared_ns, times.copied_out_ns
        else:  # a pass that failed has no marks; it began when the one before it had ended
            begin, end = max(record.dispatched_ns, self.last_pass_ns or 0), record.returned_ns
        self.seconds.spread("device_ns", begin, end)
        slot.batches += 1
        slot.tokens += batch.tokens
        self.last_pass_ns = end
        self.passes.append((end, batch.rows, batch.tokens, batch.padded_tokens, end - begin))

    def stalled(self) -> None:
        """The device is silent."""
        self.stalls += 1
        self.last_stall_ns = self.clock()

    def canary_sent(self, outcome: str) -> None:
        """A known text has come back, or has not."""
        self.canary = (outcome, self.clock())

    # ------------------------------------------------------------------------------------------------------- reads

    def busy(self, now_ns: int, pass_age_ns: int = 0) -> dict[str, float]:
        """Share of the last ``NOW_S`` that each resource was at work; the running pass is so for ``pass_age_ns``."""
        slots = list(self.seconds.last(NOW_S, now_ns))
        length_ns = self.seconds.length_s(NOW_S, now_ns) * NS
        device = sum(slot.device_ns for slot in slots) + min(pass_age_ns, length_ns)
        tokenizer = sum(slot.tokenizer_ns for slot in slots) / self.threads
        return {
            "device": min(device / length_ns, 1.0),
            "tokenizer": min(tokenizer / length_ns, 1.0),
            "event loop": self.seconds.loop_share(NOW_S, now_ns),
        }

    def update_full(self, now_ns: int, busy: Mapping[str, float]) -> None:
        """Note which resources have become a bottleneck, and which no longer are one.

        Not in the first seconds: whoever has only begun is busy.
        """
        if now_ns - self.seconds.begun_ns < QUIET_NS:
            return
        for name, share in busy.items():
            if share < NOT_FULL:
                self.full_since[name] = None
            elif share >= FULL and self.full_since[name] is None:
                begun = now_ns - int(self.seconds.length_s(NOW_S, now_ns) * NS)
                self.full_since[name] = begun

    def refused(self) -> list[EndedCall]:
        """The last refused calls of each reason, latest first."""
        calls = (call for known in self.reasons.values() for call in known.calls)
        return sorted(calls, key=attrgetter("at_ns"), reverse=True)[: 2 * RING]

    def refusals(self, now_ns: int, offset_ns: int) -> tuple[Refusal, ...]:
        """By reason, the most frequent of the last minutes first; ``offset_ns`` leads to the wall clock."""
        recent: Counter[tuple[str, str]] = Counter()
        for slot in self.seconds.last(RECENT_S, now_ns):
            if slot.reasons is not None:
                recent.update(slot.reasons)
        found = []
        for (policy, reason), known in self.reasons.items():
            since = known.episode.since(now_ns)
            found.append(
                Refusal(
                    policy,
                    reason,
                    recent[policy, reason],
                    known.total,
                    None if since is None else (since + offset_ns) / NS,
                    (known.episode.last_ns + offset_ns) / NS,
                    known.last_trace_id,
                )
            )
        return tuple(sorted(found, key=lambda refusal: (-refusal.recent, -refusal.last_s)))

    def _slot(self, now: int) -> Slot:
        """The second of an event. In a new one the only work that is not an event's own: none without events."""
        if self._ended and now // NS > self._second:  # they belong to seconds before this one
            self.settle()
        slot = self.seconds.at(now)
        if slot.second != self._second:
            self._second = now // NS
            self.update_full(now, self.busy(now))
        return slot
