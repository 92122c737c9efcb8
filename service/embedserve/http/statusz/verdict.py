"""What somebody in trouble wants to know first: one sentence, and five answers.

Decides what counts as trouble, and its words. Must never know HTML, nor how a snapshot is taken. Figures are in the
sentence; the headline has none, so that it changes only when the state does and can be read out then.
"""

from __future__ import annotations

from dataclasses import dataclass

from embedserve.http.statusz.reasons import REASONS
from embedserve.http.statusz.words import amount, clock, count, duration, rate, several, share
from embedserve.snapshot import Bucket, Resource, Snapshot

__all__ = ["Answer", "Verdict", "judge"]

SLOW_BUCKET = 2.0
"""A bucket whose P95 is so many times the fastest one's stands out."""
NEAR = 0.7
"""Busy for so much of the time, a resource explains refusals: work comes in bursts."""
FAILED_BAD = 0.01
"""From this share of calls on, failures are the trouble; under it, a part of it."""
SAMPLES_MIN = 5
"""Fewer calls of a bucket than this say nothing about it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to one question."""

    question: str
    answer: str
    level: str
    """``good``, ``warn`` or ``bad``."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How things are."""

    level: str
    """``good``, ``warn`` (in trouble, and at work), ``bad``, or ``wait`` (not there yet, or leaving)."""
    headline: str
    sentence: str
    answers: tuple[Answer, ...]


def judge(shown: Snapshot) -> Verdict:
    """The verdict on ``shown``."""
    level, headline, sentence = _state(shown)
    answers = (_bottleneck(shown), _refusing(shown), _slow_bucket(shown), _slow_stage(shown), _failing(shown))
    return Verdict(level, headline, sentence, answers)


def _at(shown: Snapshot, at_s: float) -> str:
    return clock(at_s, shown.at_s)


def _state(shown: Snapshot) -> tuple[str, str, str]:
    process = shown.process
    since, lasted = _at(shown, process.since_s), duration(shown.at_s - process.since_s)
    match process.state:
        case "serving":
            return _serving(shown)
        case "starting":
            return "wait", "Starting", f"Starting for {lasted}: no calls are taken yet."
        case "warming":
            said = (
                f"Warming up for {lasted}: the model is being loaded and tried. Calls get UNAVAILABLE until it serves."
            )
            return "wait", "Warming up", said
        case "stalled":
            age = shown.device.pass_age_s
            why = f"a pass has been at work for {duration(age)}" if age else "the device does not answer"
            said = f"Stalled since {since}: {why}. New calls get UNAVAILABLE with ENGINE_STALLED."
            return "bad", "Stalled", said
        case "draining":
            left = several(shown.traffic.in_flight, "call")
            return "wait", "Draining", f"Draining since {since}: {left} to be answered, and then the process ends."
        case "failed":
            said = f"Failed at {since}: nothing more will run. The log's last event, failed or start_failed, says why."
            return "bad", "Failed", said
        case _:
            return "wait", process.state.capitalize(), f"{process.state.capitalize()} since {since}."


def _serving(shown: Snapshot) -> tuple[str, str, str]:
    traffic, admission = shown.traffic, shown.admission
    full = _full(shown)
    level, head, parts = "good", ["Serving"], []
    if full:
        level = "warn"
        head.append(f"{full.name} is full")
        parts.append(f"{full.name} {share(full.busy)} busy since {_at(shown, full.full_since_s or shown.at_s)}")
    else:
        parts.append(f"device {share(shown.resources[0].busy)} busy")
    if admission.since_s is not None:
        level = "warn"
        head.append("shedding")
        top = next((refusal for refusal in admission.refusals if refusal.since_s is not None), None)
        by = f" by {top.policy}" if top else ""
        parts.append(f"shedding {share(admission.share)}{by} since {_at(shown, admission.since_s)}")
    if traffic.failing_since_s is not None:
        level = _failing_level(shown)
        head.append("failing calls")
        parts.append(f"failing {share(_failed(shown))} since {_at(shown, traffic.failing_since_s)}")
    if shown.process.silent:
        level = level if level == "bad" else "warn"
        head.append("a front end is silent")
        parts.append(f"{', '.join(shown.process.silent)} does not answer")
    if silent := [engine.name for engine in shown.process.engines if engine.state in ("silent", "lost")]:
        level = level if level == "bad" else "warn"
        head.append("an engine is silent")
        parts.append(f"{', '.join(silent)} gets no calls")
    headline = ", ".join(head)
    if not traffic.calls_per_s and not traffic.in_flight and level == "good":
        return level, "Serving, idle", f"Serving. Idle: no call in the last {shown.now_s:.0f} s."
    done = max(traffic.calls_per_s - traffic.refused_per_s - traffic.failed_per_s - traffic.mistaken_per_s, 0.0)
    text = ", ".join(parts)
    return level, headline, f"Serving {amount(done)} calls/s. {text[0].upper()}{text[1:]}."


def _failed(shown: Snapshot) -> float:
    """Share of calls that fail."""
    return shown.traffic.failed_per_s / shown.traffic.calls_per_s if shown.traffic.calls_per_s else 0.0


def _failing_level(shown: Snapshot) -> str:
    return "bad" if _failed(shown) >= FAILED_BAD else "warn"


def _full(shown: Snapshot) -> Resource | None:
    """The resource that has been full for longest."""
    full = [resource for resource in shown.resources if resource.full_since_s is not None]
    return min(full, key=lambda resource: resource.full_since_s or 0.0, default=None)


def _bottleneck(shown: Snapshot) -> Answer:
    question = "What is the bottleneck?"
    if shown.process.state == "stalled":
        return Answer(question, "The device: it is silent, so that everything else waits for it.", "bad")
    if shown.process.state in ("starting", "warming"):
        return Answer(question, "No calls are served yet.", "good")
    full = _full(shown)
    if full is None:
        return _nothing_full(shown, question)
    others = ", ".join(f"{one.name} {share(one.busy)}" for one in shown.resources if one is not full)
    since = _at(shown, full.full_since_s or shown.at_s)
    return Answer(question, f"The {full.name}: {share(full.busy)} busy since {since}. Others: {others}.", "warn")


def _nothing_full(shown: Snapshot, question: str) -> Answer:
    busy = ", ".join(f"{one.name} {share(one.busy)}" for one in shown.resources)
    if shown.admission.since_s is None:
        return Answer(question, f"Nothing is full. Busy: {busy}.", "good")
    nearest = max(shown.resources, key=lambda one: one.busy)
    if nearest.busy >= NEAR:
        return Answer(question, f"The {nearest.name} is near to full. Busy: {busy}.", "warn")
    said = f"Nothing is near to full, and yet calls are refused: a limit comes before the machine's own. Busy: {busy}."
    return Answer(question, said, "warn")


def _refusing(shown: Snapshot) -> Answer:
    question = "What is refused, and why?"
    admission = shown.admission
    current = [refusal for refusal in admission.refusals if refusal.since_s is not None]
    if admission.since_s is None or not current:
        past = sum(refusal.recent for refusal in admission.refusals)
        if not past:
            return Answer(question, f"Nothing in the last {duration(shown.recent_s)}.", "good")
        last = max(refusal.last_s for refusal in admission.refusals)
        said = f"Nothing now; {several(past, 'call')} in the last {duration(shown.recent_s)}, until {_at(shown, last)}."
        return Answer(question, said, "good")
    top = current[0]
    why = REASONS.get(top.reason, top.reason)
    more = f"; {len(current) - 1} more below" if len(current) > 1 else ""
    said = (
        f"{share(admission.share)} of calls ({rate(shown.traffic.refused_per_s)}) since {_at(shown, admission.since_s)}"
        f" by {top.policy}: {why}{more}."
    )
    return Answer(question, said, "warn")


def _slow_bucket(shown: Snapshot) -> Answer:
    question = "Which length is slow?"
    known: list[tuple[float, Bucket]] = [
        (bucket.total.p95_s, bucket)
        for bucket in shown.buckets
        if bucket.total.p95_s is not None and bucket.total.count >= SAMPLES_MIN
    ]
    if not known:
        return Answer(question, f"Too few calls in the last {duration(shown.window_s)} to say.", "good")
    worst, bucket = max(known, key=lambda pair: pair[0])
    best, fastest = min(known, key=lambda pair: pair[0])
    waits = (
        f"up to {count(bucket.edge)} tokens, P95 {duration(worst)}, of which P95 {duration(bucket.wait.p95_s)} waiting"
    )
    if len(known) == 1:
        return Answer(question, f"All calls are of one length: {waits}.", "good")
    if worst < SLOW_BUCKET * best:
        return Answer(question, f"None stands out. The slowest: {waits}.", "good")
    said = f"Slowest: {waits}. Fastest: up to {count(fastest.edge)} tokens, {duration(best)}."
    return Answer(question, said, "good")


def _slow_stage(shown: Snapshot) -> Answer:
    question = "Where do calls spend their time?"
    known = [(stage.latency.p95_s, stage.name) for stage in shown.stages if stage.latency.p95_s]
    if not known or shown.latency.p95_s is None:
        return Answer(question, f"No call was answered in the last {duration(shown.window_s)}.", "good")
    longest = sorted(known, reverse=True)[:2]
    parts = ", ".join(f"{name} {duration(p95)}" for p95, name in longest)
    said = f"P95 {duration(shown.latency.p95_s)} in all; the longest stages: {parts}."
    return Answer(question, said, "good")


def _failing(shown: Snapshot) -> Answer:
    question = "Do calls fail?"
    traffic = shown.traffic
    own = f" By callers' own doing: {rate(traffic.mistaken_per_s)}, the last one {traffic.last_mistake}."
    mistakes = own if traffic.mistaken_per_s > 0 else ""
    if traffic.failing_since_s is not None:
        status = shown.requests.failed[0].status if shown.requests.failed else "errors"
        often = f"{share(_failed(shown))} of calls ({rate(traffic.failed_per_s)})"
        said = f"{often} since {_at(shown, traffic.failing_since_s)}; the last one: {status}.{mistakes}"
        return Answer(question, said, _failing_level(shown))
    past = sum(value or 0.0 for value in traffic.failed) * shown.step_s
    if past >= 0.5 and shown.requests.failed:
        last = shown.requests.failed[0]
        ended = f"{count(past)} in the last {duration(shown.recent_s)}, {last.status} at {_at(shown, last.at_s)}"
        return Answer(question, f"Not now; {ended}.{mistakes}", "good")
    return Answer(question, f"None in the last {duration(shown.recent_s)}.{mistakes}", "good")
