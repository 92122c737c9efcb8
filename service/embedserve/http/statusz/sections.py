"""The sections of the page, from what is busy now to who the process is.

Decides what stands in which section, and in which words. Must never know how a snapshot is taken. Whatever came from
outside goes through ``foreign``.
"""

from __future__ import annotations

from collections.abc import Sequence

from embedserve.http.statusz.charts import bar, line
from embedserve.http.statusz.markup import Html, Part, foreign, tag
from embedserve.http.statusz.reasons import POLICIES, REASONS
from embedserve.http.statusz.tables import facts, section, table
from embedserve.http.statusz.words import NONE, amount, count, duration, instant, rate, several, share, size
from embedserve.snapshot import Ended, Figure, History, Latency, Snapshot

__all__ = ["admission", "device", "latency", "load", "passes", "process", "queue", "requests"]

FULL, NOT_FULL = 0.9, 0.8
"""As in ``telemetry/recent.py``. A bar is marked from the first on."""
MINUTE_POINTS = 12
"""Points of a history that a young process has at least, empty or not."""
_QUANTILES = ("P50", "P95", "P99")


def load(shown: Snapshot) -> Html:
    """What is busy, and how much comes."""
    ago = duration(shown.recent_s)
    resources = [
        (
            resource.name,
            share(resource.busy),
            bar(resource.busy, level="warn" if resource.full_since_s else ""),
            instant(resource.full_since_s, shown.at_s),
            line(_begun(resource.history), share, f"{resource.name}, last {ago}", top=1.0),
        )
        for resource in shown.resources
    ]
    traffic = shown.traffic
    flows: tuple[tuple[str, float, History], ...] = (
        ("calls", traffic.calls_per_s, traffic.calls),
        ("tokens", traffic.tokens_per_s, traffic.tokens),
        ("refused", traffic.refused_per_s, traffic.refused),
        ("failed", traffic.failed_per_s, traffic.failed),
        ("callers' mistakes", traffic.mistaken_per_s, traffic.mistaken),
    )
    by_status = ", ".join(f"{status} {count(calls)}" for status, calls in traffic.by_status.items()) or NONE
    return section(
        "load",
        "Load",
        table(
            "busy",
            f"Share of the time at work; now is the last {shown.now_s:.0f} s. Full: from {share(FULL)} on until under "
            f"{share(NOT_FULL)}. Of the event loop: processor time of its thread",
            ("what", "now", "", "full since", f"last {ago}"),
            resources,
            numbers="-np-h",
        ),
        table(
            "traffic",
            f"Embedding calls that ended, and tokens computed, a second; now is the last {shown.now_s:.0f} s",
            ("what", "now", f"last {ago}"),
            [(name, rate(now), line(_begun(history), rate, f"{name}, last {ago}")) for name, now, history in flows],
            numbers="-nh",
        ),
        facts(("calls here now", count(traffic.in_flight)), ("calls since the start", by_status)),
    )


def queue(shown: Snapshot) -> Html:
    """What waits, by length."""
    most = max((bucket.tokens for bucket in shown.buckets), default=0) or 1
    rows = [
        (
            f"up to {count(bucket.edge)}",
            count(bucket.items),
            count(bucket.tokens),
            bar(bucket.tokens / most),
            duration(bucket.oldest_s) if bucket.items else NONE,
            duration(bucket.wait.p50_s),
            duration(bucket.wait.p95_s),
            duration(bucket.total.p95_s),
            count(bucket.total.count) if bucket.total.count else NONE,
        )
        for bucket in shown.buckets
    ]
    items, tokens = (sum(values) for values in zip(*((b.items, b.tokens) for b in shown.buckets), strict=True))
    return section(
        "queue",
        "Queue",
        facts(
            ("waiting", f"{several(items, 'text')}, {several(tokens, 'token')}"),
            ("running", f"{several(shown.running_items, 'text')}, {several(shown.running_tokens, 'token')}"),
            ("worked off in", duration(shown.drain_s)),
        ),
        table(
            "buckets",
            f"By length. Waiting now, and answered calls of the last {duration(shown.window_s)} whose longest text is "
            "of that length",
            ("tokens", "texts", "tokens waiting", "", "oldest", "wait P50", "wait P95", "call P95", "sample"),
            rows,
            numbers="-nnpnnnnn",
        ),
    )


def latency(shown: Snapshot) -> Html:
    """How long calls take, and where."""
    most = max((stage.latency.p95_s or 0.0 for stage in shown.stages), default=0.0) or 1.0
    rows: list[tuple[Part, ...]] = [("whole call", *_quantiles(shown.latency), None)]
    rows += [
        (stage.name, *_quantiles(stage.latency), bar((stage.latency.p95_s or 0.0) / most)) for stage in shown.stages
    ]
    sample = f", a sample of {count(shown.latency.count)}" if shown.latency.count else ""
    return section(
        "latency",
        "Latency",
        table(
            "stages",
            f"Unary calls that were answered in the last {duration(shown.window_s)}{sample}; receive is the caller's "
            "upload",
            ("stage", *_QUANTILES, "P95"),
            rows,
            numbers="-nnnp",
        ),
    )


def passes(shown: Snapshot) -> Html:
    """Batches, as the device gets them."""
    batches = shown.batches
    sizes = [
        (_range(size.low, size.high), count(size.passes), bar(size.passes / max(batches.passes, 1)))
        for size in batches.sizes
    ]
    outcomes = ", ".join(f"{name} {count(number)}" for name, number in batches.outcomes.items()) or NONE
    over = f"the last {count(batches.passes)}, {duration(batches.over_s)}" if batches.passes else "none lately"
    return section(
        "passes",
        "Passes",
        facts(
            ("passes", rate(batches.per_s)),
            ("texts a pass", f"{amount(batches.rows)} of {count(batches.max_items)}"),
            ("tokens a pass", f"{amount(batches.tokens)} of {count(batches.max_tokens)}"),
            ("padding efficiency", share(batches.efficiency)),
            ("P50, P95", f"{duration(batches.duration.p50_s)}, {duration(batches.duration.p95_s)}"),
            ("cost model", f"{duration(batches.fixed_s)} + {duration(batches.per_token_s)} a token"),
            ("since the start", outcomes),
        ),
        table("sizes", f"Passes by texts: {over}", ("texts", "passes", ""), sizes, numbers="-np"),
    )


def admission(shown: Snapshot) -> Html:
    """Who would be taken, and who was refused."""
    rows = [
        (
            policy.name,
            [_gauge(figure) for figure in policy.figures],
            tag("strong", f"refuses: {policy.refuses}", class_="warn") if policy.refuses else "admits",
            POLICIES.get(policy.name, ""),
        )
        for policy in shown.admission.policies
    ]
    refusals = [
        (
            refusal.reason,
            refusal.policy,
            count(refusal.recent),
            count(refusal.total),
            instant(refusal.since_s, shown.at_s),
            instant(refusal.last_s, shown.at_s),
            _trace(refusal.last_trace_id),
            REASONS.get(refusal.reason, ""),
        )
        for refusal in shown.admission.refusals
    ]
    return section(
        "admission",
        "Admission",
        table(
            "policies",
            "Each limit now, and what it says to one short text",
            ("policy", "figures, of their limits", "says", "judges"),
            rows,
            numbers="---w",
        ),
        table(
            "refusals",
            f"Refused calls, by reason; recent is the last {duration(shown.recent_s)}",
            ("reason", "policy", "recent", "since the start", "goes on since", "last", "last trace", "meaning"),
            refusals,
            numbers="--nn---w",
            empty="No call has been refused since the start.",
        ),
    )


def device(shown: Snapshot) -> Html:
    """Whether the device answers, and the tokenizer."""
    it, pool = shown.device, shown.tokenizer
    age = f"{duration(it.pass_age_s)}; more than {duration(it.stall_limit_s)} may be a stall" if it.pass_age_s else NONE
    memory = f"{size(it.memory_used_bytes)} of {size(it.memory_total_bytes)}" if it.memory_total_bytes else "unknown"
    canary: Part = "no need yet: passes end well, or the process is young"
    if it.canary is not None:
        canary = [f"{it.canary}, ", instant(it.canary_s, shown.at_s)]
    last: Part = instant(it.last_pass_s, shown.at_s)
    if it.last_pass_s is not None:
        last = [last, f" ({duration(max(shown.at_s - it.last_pass_s, 0.0))} ago)"]
    stalls: Part = count(it.stalls)
    if it.last_stall_s is not None:
        stalls = [stalls, ", the last at ", instant(it.last_stall_s, shown.at_s)]
    return section(
        "device",
        "Device and tokenizer",
        facts(
            ("device", tag("strong", "stalled", class_="bad") if it.stalled else (it.suspect or "answers")),
            ("running pass", age),
            ("last pass ended", last),
            ("stalls since the start", stalls),
            ("known text sent", canary),
            ("device memory", memory),
            ("texts to run again", count(it.retry_items)),
        ),
        facts(
            ("tokenizer threads", count(pool.threads)),
            ("calls at the tokenizer", f"{count(pool.pending)} of {count(pool.max_pending)}"),
            ("wait for a thread", f"P50 {duration(pool.wait.p50_s)}, P95 {duration(pool.wait.p95_s)}"),
            ("pieces of work", rate(pool.pieces_per_s)),
        ),
    )


def requests(shown: Snapshot) -> Html:
    """Calls worth a look."""
    ago = duration(shown.recent_s)
    kept = shown.requests
    return section(
        "requests",
        "Requests",
        _calls(
            shown,
            "slow",
            f"Slowest unary calls of the last {ago}, and the slowest of those that were traced",
            kept.slow,
            slow=True,
        ),
        _calls(shown, "refused", "Last refused calls of each reason, latest first", kept.refused),
        _calls(shown, "failed", "Last failed calls, latest first; callers' own mistakes are left out", kept.failed),
    )


def process(shown: Snapshot) -> Html:
    """Who this is."""
    it, model = shown.process, shown.model
    steps: list[Part] = []
    for change in it.changes:
        steps += [f"{change.state} ", instant(change.at_s, shown.at_s), tag("br")]
    length = f"{model.dimension or NONE} floats; texts of up to {count(model.max_input_length)} tokens"
    computed = ", ".join(filter(None, (model.dtype, model.device, "compiled" if model.compiled else "")))
    return section(
        "process",
        "Process and model",
        facts(
            ("state", it.state),
            ("started", instant(it.started_s, shown.at_s)),
            ("up for", duration(it.uptime_s)),
            ("embedserve", it.version),
            ("host and process", [foreign(it.host), f", pid {it.pid}"]),
            *((("front ends", _front_ends(shown)),) if it.front_ends or it.silent else ()),
            ("gRPC listens on", [foreign(", ".join(it.addresses) or NONE)]),
            ("latest states", steps[:-1]),
        ),
        facts(
            ("model", foreign(model.name)),
            ("revision", foreign(model.revision)),
            ("kind", ", ".join(filter(None, (model.architecture, model.pooling))) or NONE),
            ("vectors", length),
            ("computed in", computed or "not loaded yet"),
            ("weights", tag("code", model.weights_digest)),
            ("tokenizer", tag("code", model.tokenizer_digest or NONE)),
        ),
        *_engines(shown),
    )


def _engines(shown: Snapshot) -> list[Html]:
    """Where there are several."""
    engines = shown.process.engines
    if not engines:
        return []
    own = next((engine.name for engine in engines if engine.shown), NONE)
    rows = [
        (
            engine.name,
            engine.device or NONE,
            tag("strong", engine.state, class_="bad") if engine.state in ("silent", "lost") else engine.state,
            count(engine.held_tokens),
            amount(engine.tokens_per_s),
            duration(engine.drain_s),
        )
        for engine in engines
    ]
    caption = (
        f"Engines: queue, passes, device and admission above are those of {own}, calls and event loops those of all"
    )
    heads = ("engine", "device", "state", "tokens held", "tokens/s when busy", "drain time")
    return [table("engines", caption, heads, rows, numbers="---nnn")]


def _front_ends(shown: Snapshot) -> list[Part]:
    told: list[Part] = [", ".join(shown.process.front_ends)]
    if shown.process.silent:
        silent = ", ".join(shown.process.silent)
        told += [tag("strong", f" {silent} did not answer: its calls are missing here", class_="bad")]
    return told


def _quantiles(of: Latency) -> tuple[str, str, str]:
    return duration(of.p50_s), duration(of.p95_s), duration(of.p99_s)


def _range(low: int, high: int) -> str:
    return count(low) if low == high else f"{count(low)} to {count(high)}"


def _figure(figure: Figure) -> str:
    write = {"s": duration, "share": share, "ratio": amount}.get(figure.unit, count)
    limit = f" of {write(figure.limit)}" if figure.limit is not None else ""
    return f"{figure.name} {write(figure.value)}{limit}"


def _gauge(figure: Figure) -> Html:
    """A figure, and a bar where it has a limit. A ratio is a signal: near its limit it is as it should be."""
    if not figure.limit:
        return tag("span", tag("span", _figure(figure)), class_="gauge")
    used = figure.value / figure.limit
    level = "warn" if used >= FULL and figure.unit != "ratio" else ""
    return tag("span", tag("span", _figure(figure)), bar(used, level=level), class_="gauge")


def _begun(history: History) -> History:
    """Without what lies before the process began, but for a minute, so that a line does not jump about."""
    known = sum(point is not None for point in history)
    return history[-max(known, MINUTE_POINTS) :]


def _status(call: Ended) -> str:
    """With the reason where the status alone does not say it."""
    said = call.reason in (None, call.status) or call.status == "DEADLINE_EXCEEDED"
    return call.status if said else f"{call.status} {call.reason}"


def _trace(trace_id: str | None) -> Part:
    return tag("code", trace_id) if trace_id else NONE


def _calls(shown: Snapshot, name: str, caption: str, calls: Sequence[Ended], *, slow: bool = False) -> Html:
    # What was refused has gone through no stage, and its texts were hardly looked at.
    whole = name != "refused"
    several_processes = bool(shown.process.front_ends or shown.process.silent)
    rows = [
        (
            instant(call.at_s, shown.at_s),
            duration(call.duration_s),
            *((f"{call.longest_stage} {duration(call.longest_s)}" if call.longest_stage else NONE,) if whole else ()),
            *((call.process,) if several_processes else ()),
            _status(call),
            call.method,
            foreign(call.tenant) if call.tenant else NONE,
            NONE if call.texts is None else count(call.texts),
            *((NONE if call.tokens is None else count(call.tokens),) if whole else ()),
            _trace(call.trace_id),
        )
        for call in calls
    ]
    heads: tuple[str, ...] = ("ended", "took", "status", "method", "tenant", "texts", "trace")
    if whole:
        heads = ("ended", "took", "longest stage", "status", "method", "tenant", "texts", "tokens", "trace")
    numbers = "-n----nn-" if whole else "-n---n-"
    if several_processes:
        place = heads.index("status")
        heads = (*heads[:place], "process", *heads[place:])
        numbers = numbers[:place] + "-" + numbers[place:]
    empty = "No call has ended in that time." if slow else "None since the start."
    return table(name, caption, heads, rows, numbers=numbers, empty=empty)
