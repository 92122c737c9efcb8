"""What several processes remember of their calls, as one.

Decides what of ``Recent`` crosses to the process that shows it, and how two of them become one. Must never know how it
crosses or who shows it. All processes of a host read the same monotonic clock, so that seconds are added up as they
are; quantiles are taken of all samples together, which is right as far as connections are dealt evenly.

What crosses is bounded by what ``Recent`` keeps: at most 300 seconds of counts, 960 samples and some 100 calls, which
is 100 KB of JSON for a front end at its limit. Event loop only; a front end needs 1 to 4 ms, once a look at the page.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

import orjson

from embedserve.telemetry.ended_calls import EndedCall, Samples, Slowest
from embedserve.telemetry.recent import NOW_S, QUIET_NS, Episode, Recent, Refused
from embedserve.telemetry.seconds import RECENT_S

__all__ = ["LoopUse", "Merged", "merge_memories", "pack_memory"]

_COUNTED: Final = ("calls", "refused", "failed", "mistaken", "texts", "tokenized", "tokenizer_ns")
"""What a front end counts in a second; passes are the engine's."""


@dataclass(frozen=True, slots=True)
class LoopUse:
    """How busy the event loop of one process is."""

    process: str
    busy: float
    history: tuple[float | None, ...]
    full_since_ns: int | None


@dataclass(frozen=True, slots=True)
class Merged:
    """The memory of all processes."""

    recent: Recent
    """The engine process's passes with the front ends' calls."""
    loops: tuple[LoopUse, ...]
    """Of the front ends."""
    tokenizer_pending: int
    """Calls that wait for a tokenizer thread of theirs, or have one."""


def pack_memory(recent: Recent, tokenizer_pending: int) -> bytes:
    """What ``recent`` knows of calls, as JSON."""
    now = recent.clock()
    recent.settle()
    seconds = recent.seconds
    recent.update_full(now, recent.busy(now))
    facts = {
        "threads": recent.threads,
        "pending": tokenizer_pending,
        "seconds": [
            (
                slot.second,
                [getattr(slot, name) for name in _COUNTED],
                [(*key, number) for key, number in (slot.reasons or {}).items()],
            )
            for slot in seconds.last(RECENT_S, now)
        ],
        "loop": (seconds.loop_share(NOW_S, now), seconds.loop_history(now)),
        "full_since": recent.full_since,
        "samples": recent.samples.rows(now),
        "slow": [recent.slowest.top(now), recent.slowest_traced.top(now)],
        "failed": list(recent.failed),
        "refused": [
            (*key, known.total, known.last_trace_id, _episode(known.episode), list(known.calls))
            for key, known in recent.reasons.items()
        ],
        "episodes": [_episode(recent.shedding), _episode(recent.failing)],
        "waits": list(recent.waits),
        "by_status": recent.by_status,
        "last_mistake": recent.last_mistake,
        "in_flight": recent.in_flight,
    }
    return orjson.dumps(facts, default=tuple, option=orjson.OPT_NON_STR_KEYS)  # a call is a named tuple


def merge_memories(own: Recent, given: Sequence[tuple[str, bytes]]) -> Merged:
    """``own`` of the engine process, and what each front end has packed, by its name. ``own`` stays as it is."""
    known = [(name, orjson.loads(packed)) for name, packed in given if packed]
    merged = Recent(max(1, sum(facts["threads"] for _, facts in known)), own.clock)
    merged.seconds = own.seconds.copy()
    merged.samples = Samples()
    merged.passes, merged.outcomes, merged.last_pass_ns = own.passes, own.outcomes, own.last_pass_ns
    merged.stalls, merged.last_stall_ns, merged.canary = own.stalls, own.last_stall_ns, own.canary
    merged.full_since = dict(own.full_since) | {"tokenizer": None}
    for _, facts in known:
        _add_counts(merged, facts)
    merged.samples.extend(row for _, facts in known for row in facts["samples"])
    merged.waits = deque(sorted(tuple(wait) for _, facts in known for wait in facts["waits"]), merged.waits.maxlen)
    _add_calls(merged, known)
    loops = tuple(
        LoopUse(name, facts["loop"][0], tuple(facts["loop"][1]), facts["full_since"]["event loop"])
        for name, facts in known
    )
    return Merged(merged, loops, sum(facts["pending"] for _, facts in known))


def _add_counts(merged: Recent, facts: dict[str, Any]) -> None:
    for second, counts, reasons in facts["seconds"]:
        merged.seconds.add(second, dict(zip(_COUNTED, counts, strict=True)), {(p, r): n for p, r, n in reasons})
    merged.by_status += Counter(facts["by_status"])
    merged.in_flight += facts["in_flight"]
    merged.last_mistake = facts["last_mistake"] or merged.last_mistake
    _extend(merged.shedding, facts["episodes"][0])
    _extend(merged.failing, facts["episodes"][1])
    since = facts["full_since"]["tokenizer"]
    if since is not None:
        merged.full_since["tokenizer"] = min(since, merged.full_since["tokenizer"] or since)


def _add_calls(merged: Recent, known: Sequence[tuple[str, dict[str, Any]]]) -> None:
    for place, kept in enumerate((merged.slowest, merged.slowest_traced)):
        _keep_slowest(kept, [_call(name, row) for name, facts in known for row in facts["slow"][place]])
    merged.failed.extend(_by_end(_call(name, row) for name, facts in known for row in facts["failed"]))
    for name, facts in known:
        for policy, reason, total, trace_id, episode, calls in facts["refused"]:
            refused = merged.reasons.setdefault((policy, reason), Refused())
            refused.total += total
            if trace_id is not None and episode[1] >= refused.episode.last_ns:
                refused.last_trace_id = trace_id
            _extend(refused.episode, episode)
            latest = _by_end([*refused.calls, *(_call(name, row) for row in calls)])
            refused.calls.clear()
            refused.calls.extend(latest)


def _by_end(calls: Any) -> list[EndedCall]:
    return sorted(calls, key=attrgetter("at_ns"))


def _keep_slowest(kept: Slowest, calls: Sequence[EndedCall]) -> None:
    for call in _by_end(calls):
        if kept.beats(call.duration_ns, call.at_ns):
            kept.add(call)


def _call(process: str, row: Sequence[Any]) -> EndedCall:
    call = EndedCall(*row)
    longest = None if call.longest is None else (call.longest[0], call.longest[1])
    return call._replace(process=process, longest=longest)


def _episode(of: Episode) -> tuple[int, int]:
    return of.since_ns, of.last_ns


def _extend(episode: Episode, other: Sequence[int]) -> None:
    """``episode`` and the other one, as one where they touch, or else the later of them."""
    since_ns, last_ns = other
    if max(since_ns, episode.since_ns) - min(last_ns, episode.last_ns) > QUIET_NS:
        if last_ns > episode.last_ns:
            episode.since_ns, episode.last_ns = since_ns, last_ns
        return
    episode.since_ns, episode.last_ns = min(since_ns, episode.since_ns), max(last_ns, episode.last_ns)
