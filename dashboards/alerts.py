"""Recording rules and alerts.

Decides what is worth a ticket, what wakes somebody, and what each says. Must never know a dashboard's layout. Symptoms
come first: budgets that burn, calls that are refused, a job that does not serve. Causes are tickets: they say where to
look, and a cause without a symptom can wait until morning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dashboards.objectives import BURNS, EMBEDDING, OBJECTIVES, PAGE_CALLS_MIN, SHED, WINDOWS, Objective
from dashboards.query import RULE, share
from embedserve.telemetry import instruments as m

__all__ = ["ALERTS", "RECORDS", "Alert", "Condition", "Record", "alert_groups", "record_groups"]

STATUS: Final = "rpc_response_status_code"
EACH: Final = RULE.each("instance")


@dataclass(frozen=True, slots=True)
class Record:
    """A series that is computed once for all who ask for it."""

    name: str
    query: str
    labels: tuple[tuple[str, str], ...] = ()

    def selector(self) -> str:
        """The series, as a query names it."""
        inner = ",".join(f'{label}="{value}"' for label, value in self.labels)
        return self.name + (f"{{{inner}}}" if inner else "")


@dataclass(frozen=True, slots=True)
class Condition:
    """A figure and the bound that it passes."""

    query: str
    comparison: str
    bound: float
    matching: str = ""
    """How it is matched with the condition before it, where their labels differ: ``on (job)``."""

    def __str__(self) -> str:
        return f"{self.query} {self.comparison} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert: fires where all conditions of any of its cases hold, for as long as ``lasting``."""

    name: str
    severity: str
    """``page``: callers are hurt now. ``ticket``: within working hours."""
    cases: Sequence[Sequence[Condition]]
    lasting: str
    summary: str
    description: str
    runbook: str
    """Heading of OPERATIONS.md."""
    board: str
    labels: tuple[tuple[str, str], ...] = ()

    def expression(self) -> str:
        """As Prometheus evaluates it."""
        cases = [" and ".join(" ".join((one.matching, str(one))).strip() for one in case) for case in self.cases]
        return " or ".join(f"({case})" for case in cases) if len(cases) > 1 else cases[0]


def _error_ratio(objective: Objective, window: str) -> Record:
    return Record(f"slo:sli_error:ratio_rate{window}", objective.ratio(RULE.over(window)), (("slo", objective.name),))


def _errors(objective: Objective, window: str) -> Record:
    return Record(
        f"slo:sli_error:increase{window}",
        objective.bad(RULE.over(window), grows="increase"),
        (("slo", objective.name),),
    )


def _month(objective: Objective) -> Record:
    five = _error_ratio(objective, "5m").selector()
    query = f"sum_over_time({five}[30d]) / count_over_time({five}[30d])"
    return Record("slo:sli_error:ratio_rate30d", query, (("slo", objective.name),))


BUSY: Final = Record(
    "job_instance:embedserve_device_busy:ratio_rate5m",
    RULE.worst(lambda each: each.rate(m.DEVICE_BUSY), ("instance",)),
)
TOKENIZING: Final = Record(
    "job_instance:embedserve_tokenizer_busy:ratio_rate5m",
    RULE.worst(
        lambda each: share(each.rate(m.TOKENIZER_DURATION, part="_sum"), each.gauge(m.TOKENIZER_THREADS)), ("instance",)
    ),
)
SHED_SHARE: Final = Record(
    "job:embedserve_calls_shed:ratio_rate5m",
    share(
        RULE.rate(m.RPC_DURATION, where={**EMBEDDING, STATUS: SHED}, part="_count"),
        RULE.rate(m.RPC_DURATION, where=EMBEDDING, part="_count"),
    ),
)
WAITING: Final = Record("job:embedserve_queue_tokens:sum", RULE.gauge(m.QUEUE_TOKENS))
PAGING: Final = tuple(dict.fromkeys(burn.long for burn in BURNS if burn.severity == "page"))
"""Windows in which bad calls are counted, so that a handful wakes nobody."""

RECORDS: Final = (
    *(_error_ratio(objective, window) for objective in OBJECTIVES for window in WINDOWS),
    *(_errors(objective, window) for objective in OBJECTIVES for window in PAGING),
    *map(_month, OBJECTIVES),
    SHED_SHARE,
    BUSY,
    TOKENIZING,
    WAITING,
)


def _burn(objective: Objective, severity: str, speed: str, spent: str) -> Alert:
    cases = []
    for burn in BURNS:
        if burn.severity == severity:
            bound = round(burn.factor * objective.budget, 9)
            case = [Condition(_error_ratio(objective, w).selector(), ">", bound) for w in (burn.long, burn.short)]
            if severity == "page":
                case.append(Condition(_errors(objective, burn.long).selector(), ">=", PAGE_CALLS_MIN))
            cases.append(case)
    return Alert(
        f"Embedserve{objective.name.title()}Burn",
        severity,
        cases,
        "0m",
        f"{{{{ $labels.job }}}} spends its {objective.name} budget {speed}",
        f"{{{{ $value | humanizePercentage }}}} of the calls are bad, and {objective.target * 100:g} % should be good "
        f"({objective.counts}). {spent}",
        objective.runbook,
        "service",
        (("slo", objective.name),),
    )


def _symptoms() -> tuple[Alert, ...]:
    serving = f"sum by (job) ({EACH.of_takers().gauge(m.LIFECYCLE, 'min', where={'state': 'serving'})})"
    known = f"count by (job) (count_over_time({RULE.series(m.ACCEPTING)}[1d]))"
    return (
        *(
            _burn(objective, severity, speed, spent)
            for objective in OBJECTIVES
            for severity, speed, spent in (
                ("page", "fast", "At this speed the budget of 30 days ends within 5 days or less."),
                ("ticket", "slowly", "At this speed the budget does not last for 30 days."),
            )
        ),
        Alert(
            "EmbedserveNobodyServes", "page", [[Condition(serving, "==", 0)], [Condition("sum by (job) (up)", "==", 0),
            Condition(known, ">", 0, "on (job)")]], "2m", "No process of {{ $labels.job }} serves",
            "Every process starts, is stalled, has failed or cannot be scraped. Callers get UNAVAILABLE or no answer.",
            "NOT_SERVING", "service",
        ),
        Alert(
            "EmbedserveShedding", "page", [[Condition(SHED_SHARE.selector(), ">", 0.5)]], "5m",
            "{{ $labels.job }} refuses more calls than it takes",
            "{{ $value | humanizePercentage }} of the calls get RESOURCE_EXHAUSTED.", "Shedding", "service",
        ),
        Alert(
            "EmbedserveShedding", "ticket", [[Condition(SHED_SHARE.selector(), ">", 0.05)]], "15m",
            "{{ $labels.job }} sheds load", "{{ $value | humanizePercentage }} of the calls get RESOURCE_EXHAUSTED.",
            "Shedding", "service",
        ),
    )  # fmt: skip


def _device_causes() -> tuple[Alert, ...]:
    quarter = EACH.over("15m")
    # Not its growth: it happens during a start, and the first scrape of a new process sees it done.
    failed = EACH.total(m.MODEL_COMPILE_DURATION, where={"outcome": "failed"}, part="_count")
    # A machine without a compiler, and a model that has no compiled form, are no news.
    ran = f"max by (job) (max_over_time({RULE.series(m.MODEL_VARIANT, '', {'variant': 'compiled'})}[1d]))"
    return (
        Alert(
            "EmbedserveDeviceStalled", "ticket", [[Condition(quarter.increase(m.STALLS), ">", 0)]], "0m",
            "The device of {{ $labels.instance }} was silent",
            "A pass, or a known text, took longer than it may, in the last 15 minutes. Meanwhile it did not serve.",
            "Stalled", "engine",
        ),
        Alert(
            "EmbedserveCanaryFails", "ticket",
            [[Condition(quarter.increase(m.CANARIES, where={"outcome": "timed_out|wrong"}), ">", 0)]], "0m",
            "A known text did not come back right from {{ $labels.instance }}",
            "It was sent through the whole path while the server was idle, in the last 15 minutes.",
            "Known text fails", "service",
        ),
        Alert(
            "EmbedserveOutOfMemory", "ticket",
            [[Condition(
                quarter.increase(m.BATCH_DURATION, where={"outcome": "out_of_memory"}, part="_count"), ">=", 3
            )]], "0m", "Passes of {{ $labels.instance }} run out of device memory",
            "{{ $value | humanize }} passes in 15 minutes. They are halved and run again: callers wait longer.",
            "Out of memory", "engine",
        ),
        Alert(
            "EmbedserveCompileFailed", "ticket",
            [[Condition(failed, ">", 0), Condition(ran, ">", 0, "on (job)")]], "0m",
            "{{ $labels.instance }} could not compile its model",
            "Others of its job run compiled, or did within a day. It serves with the eager model, which is slower.",
            "Compiling fails", "engine",
        ),
    )  # fmt: skip


def _queue_causes() -> tuple[Alert, ...]:
    full = {"decision": "rejected", "policy": "queue", "reason": "QUEUE_FULL"}
    return (
        Alert(
            "EmbedserveQueueFull", "ticket", [[Condition(EACH.rate(m.DECISIONS, where=full), ">", 0)]], "10m",
            "The queue of {{ $labels.instance }} is full",
            "Its hard limit refuses {{ $value | humanize }} calls a second: no policy was nearer.",
            "Queue saturated", "scheduler",
        ),
        Alert(
            "EmbedserveDeviceSaturated", "ticket", [[Condition(BUSY.selector(), ">", 0.95)]], "30m",
            "The device of {{ $labels.instance }} never rests",
            "Busy {{ $value | humanizePercentage }} of the time. More traffic will wait or be refused.",
            "Queue saturated", "engine",
        ),
        Alert(
            "EmbedserveTokenizerSaturated", "ticket", [[Condition(TOKENIZING.selector(), ">", 0.95)]], "30m",
            "The tokenizer threads of {{ $labels.instance }} never rest",
            "They work {{ $value | humanizePercentage }} of the time, and the device waits for them.",
            "Queue saturated", "engine",
        ),
        Alert(
            "EmbedserveQuarantine", "ticket", [[Condition(EACH.gauge(m.QUARANTINE, "max"), ">", 0)]], "15m",
            "A caller of {{ $labels.instance }} keeps sending texts that fail",
            "{{ $value | humanize }} tenants have been in quarantine for 15 minutes: each failing text renews it.",
            "Texts that fail", "scheduler",
        ),
        Alert(
            "EmbedserveTextsFail", "ticket",
            [[Condition(
                EACH.over("15m").increase(m.ITEMS_SETTLED, where={"verdict": "item_error|non_finite"}), ">=", 3
            )]], "0m", "Texts fail alone on {{ $labels.instance }}",
            "{{ $value | humanize }} texts in 15 minutes made a pass raise, or gave NaN. Their callers get INTERNAL.",
            "Texts that fail", "service",
        ),
    )  # fmt: skip


def _process_causes() -> tuple[Alert, ...]:
    ours = f"count by (job, instance) (count_over_time({RULE.series(m.ACCEPTING)}[1d]))"
    quarter = EACH.over("15m")
    lost = " + ".join(
        (
            quarter.increase(m.SPANS, where={"outcome": "failed|dropped|unbuilt"}),
            quarter.increase(m.LOG_RECORDS, where={"outcome": "failed|dropped"}),
            quarter.increase(m.METRIC_EXPORTS, where={"outcome": "failed"}),
        )
    )
    dropped = quarter.increase(m.LOG_LINES, where={"outcome": "dropped"})
    return (
        Alert(
            "EmbedserveInstanceDown", "ticket",
            [[Condition("up", "==", 0), Condition(ours, ">", 0, "on (job, instance)")]], "5m",
            "{{ $labels.instance }} cannot be scraped",
            "It could within the last day. The process is gone, or its operations port is out of reach.",
            "Restarts", "service",
        ),
        Alert(
            "EmbedserveCrashLoop", "ticket",
            [[Condition(f"max by (job, instance) (changes({EACH.series(m.PROCESS_START)}[30m]))", ">=", 3)]], "0m",
            "{{ $labels.instance }} starts again and again", "{{ $value | humanize }} starts in 30 minutes.",
            "Restarts", "service",
        ),
        Alert(
            "EmbedserveFrontEndSilent", "ticket",
            [[Condition(EACH.gauge(m.FRONT_END_SILENT, "max", ("frontend",)), ">", 0)]], "2m",
            "{{ $labels.frontend }} of {{ $labels.instance }} does not answer",
            "Its calls are missing in all other figures. It is stopped, or its event loop stands still.",
            "Front end silent", "service",
        ),
        Alert(
            "EmbedserveEngineSilent", "ticket",
            [[Condition(EACH.gauge(m.ENGINE_SILENT, "max", ("engine",)), ">", 0)]], "2m",
            "{{ $labels.engine }} of {{ $labels.instance }} gets no calls",
            "Its device does not answer, or its process. The other engines serve, and the rate is theirs alone.",
            "Engine silent", "service",
        ),
        Alert(
            "EmbedserveTelemetryLost", "ticket", [[Condition(f"({lost})", ">", 0)]], "15m",
            "Telemetry of {{ $labels.instance }} does not reach the collector",
            "{{ $value | humanize }} spans, log records and pushes of metrics in 15 minutes. Calls are not affected.",
            "Collector down", "service",
        ),
        Alert(
            "EmbedserveLogLinesDropped", "ticket", [[Condition(dropped, ">", 0)]], "0m",
            "{{ $labels.instance }} cannot write its log",
            "{{ $value | humanize }} lines in 15 minutes were dropped: nobody reads them, or the disk is full.",
            "Log lines dropped", "service",
        ),
    )  # fmt: skip


ALERTS: Final = (*_symptoms(), *_device_causes(), *_queue_causes(), *_process_causes())


def record_groups() -> Mapping[str, list[dict[str, object]]]:
    """Recording rules as Prometheus reads them, by file: the objectives, and what alerts and autoscalers ask for."""
    rules: dict[str, list[dict[str, object]]] = {"objectives": [], "recording": []}
    for record in RECORDS:
        rule: dict[str, object] = {"record": record.name, "expr": record.query}
        if record.labels:
            rule["labels"] = dict(record.labels)
        rules["objectives" if record.labels else "recording"].append(rule)
    return {file: [{"name": f"embedserve-{file}", "rules": group}] for file, group in rules.items()}


def alert_groups(anchors: Mapping[str, str], operations: str) -> list[dict[str, object]]:
    """Alerts, as Prometheus reads them. ``anchors`` by heading of the page that ``operations`` is the address of."""
    symptoms = {alert.name for alert in _symptoms()}
    groups: dict[str, list[dict[str, object]]] = {"embedserve-symptoms": [], "embedserve-causes": []}
    for alert in ALERTS:
        rule: dict[str, object] = {"alert": alert.name, "expr": alert.expression()}
        if alert.lasting != "0m":
            rule["for"] = alert.lasting
        rule["labels"] = {"severity": alert.severity, **dict(alert.labels)}
        rule["annotations"] = {
            "summary": alert.summary,
            "description": alert.description,
            "runbook_url": f"{operations}#{anchors[alert.runbook]}",
            "dashboard": f"/d/embedserve-{alert.board}",
        }
        groups["embedserve-symptoms" if alert.name in symptoms else "embedserve-causes"].append(rule)
    return [{"name": name, "rules": rules} for name, rules in groups.items()]
