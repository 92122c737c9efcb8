"""The *Scheduler* board: buckets, batches, padding, waits, policies.

Decides how a queue that grows, a batch that is not full and a policy that refuses are told apart. Must never show what
the device does with a batch: *Engine* does.
"""

from __future__ import annotations

from typing import Final

from dashboards.board import Board, Row
from dashboards.panels import Limits, Target, figure, heat, lines, timeline
from dashboards.query import BOARD, share
from embedserve.telemetry import instruments as m

__all__ = ["SCHEDULER"]

OK: Final = {"outcome": "ok"}
EACH: Final = ("instance",)
TOKENS_PER_S: Final = "si:tok/s"
TOKENS: Final = "si:tok"


def _glance() -> Row:
    wait = BOARD.quantile(0.95, m.QUEUE_WAIT, ("bucket",))
    efficiency = share(BOARD.rate(m.BATCH_TOKENS, part="_sum"), BOARD.rate(m.BATCH_PADDED_TOKENS, part="_sum"))
    refused = BOARD.rate(m.DECISIONS, ("policy", "reason"), where={"decision": "rejected"})
    return Row(
        "At a glance",
        (
            figure("Waiting", "How many texts wait?", Target(BOARD.gauge(m.QUEUE_ITEMS), "texts"), unit="short"),
            figure(
                "Oldest", "How long has the oldest text waited?", Target(BOARD.gauge(m.QUEUE_OLDEST, "max"), "oldest"),
                unit="s", limits=Limits(0.5, 2),
            ),
            figure(
                "Slowest bucket", "Which length waits longest (P95 of the wait), and how long?",
                Target(f"topk(1, {wait} >= 0)", "to {{bucket}} tokens"), unit="s", limits=Limits(0.25, 0.5), named=True,
            ),
            figure(
                "Efficiency", "Which part of what is computed is text, not padding?", Target(efficiency, "useful"),
                unit="percentunit", limits=Limits(0.8, 0.5), none="no passes",
            ),
            figure(
                "Batch", "How full are batches: texts in one, on average?",
                Target(BOARD.mean(m.BATCH_ITEMS), "texts"), unit="short", none="no passes", decimals=1,
            ),
            figure(
                "Refused most", "Which limit refuses most?", Target(f"topk(1, {refused} > 0)", "{{reason}}"),
                unit="reqps", named=True, none="nothing refused",
            ),
        ),
    )  # fmt: skip


def _buckets() -> Row:
    return Row(
        "Buckets: which lengths wait?",
        (
            lines(
                "Waiting by bucket", "In which length bucket do texts pile up, and since when?",
                Target(BOARD.gauge(m.QUEUE_ITEMS, "sum", ("bucket",)), "to {{bucket}} tokens"), unit="short",
                stacked=True, width=6,
            ),
            lines(
                "Oldest text by bucket", "Which bucket is passed over, and since when?",
                Target(BOARD.gauge(m.QUEUE_OLDEST, "max", ("bucket",)), "to {{bucket}} tokens"), unit="s", width=6,
            ),
            lines(
                "P95 wait by bucket", "Which bucket is slow? Time from the queue to the worker.",
                Target(
                    f"{BOARD.quantile(0.95, m.QUEUE_WAIT, ('bucket',))} >= 0", "to {{bucket}} tokens"
                ), unit="s", slow_from_s=0.25, width=6,
            ),
            lines(
                "Requests by bucket", "How long are the texts that come? A request counts by its longest.",
                Target(BOARD.rate(m.QUEUE_WAIT, ("bucket",), part="_count"), "to {{bucket}} tokens"), unit="reqps",
                stacked=True, width=6,
            ),
        ),
    )  # fmt: skip


def _queue() -> Row:
    return Row(
        "Queue: does more come than can be done?",
        (
            lines(
                "Tokens that wait and run", "How much work is there, and since when?",
                Target(BOARD.gauge(m.QUEUE_TOKENS), "wait"), Target(BOARD.gauge(m.RUNNING_TOKENS), "run"), unit=TOKENS,
                stacked=True, width=6,
            ),
            lines(
                "Tokens in and out", "Does more come than the device can do? Admitted at the capacity: it is full.",
                Target(BOARD.rate(m.TOKENS_ADMITTED), "admitted"),
                Target(BOARD.rate(m.BATCH_TOKENS, part="_sum"), "embedded"),
                Target(BOARD.gauge(m.SERVICE_RATE), "capacity"), unit=TOKENS_PER_S, width=6,
            ),
            lines(
                "Texts in and out", "Are texts let in as fast as they leave?",
                Target(BOARD.rate(m.ITEMS_ADMITTED), "admitted"), Target(BOARD.rate(m.ITEMS_SETTLED), "settled"),
                unit="cps", width=6,
            ),
            lines(
                "Time to work it off", "How long would a newcomer wait? The worst process.",
                Target(BOARD.gauge(m.DRAIN_TIME, "max"), "estimate"),
                Target(BOARD.gauge(m.QUEUE_OLDEST, "max"), "oldest text"),
                unit="s", width=6,
            ),
        ),
    )  # fmt: skip


def _batches() -> Row:
    useful, computed = (BOARD.rate(b, part="_sum") for b in (m.BATCH_TOKENS, m.BATCH_PADDED_TOKENS))
    return Row(
        "Batches: are they full, and of text?",
        (
            lines(
                "Texts a pass", "How full are batches?", *(
                    Target(BOARD.quantile(q, m.BATCH_ITEMS), f"P{q * 100:g}") for q in (0.5, 0.95)
                ), Target(BOARD.mean(m.BATCH_ITEMS), "mean"),
                Target(BOARD.gauge(m.RUNNING_ITEMS), "in all passes now"), unit="short",
            ),
            lines(
                "Tokens a pass", "How near are batches to their budget? It falls where a pass would take too long.",
                Target(BOARD.mean(m.BATCH_TOKENS), "useful"), Target(BOARD.mean(m.BATCH_PADDED_TOKENS), "computed"),
                Target(BOARD.gauge(m.MAX_BATCH_TOKENS, "min"), "budget"), unit=TOKENS,
            ),
            lines(
                "Padding", "Which part of the device's work is padding, and how bad is a bad batch?",
                Target(share(f"({computed} - {useful})", computed), "padding"),
                Target(f"1 - {BOARD.quantile(0.1, m.BATCH_EFFICIENCY)}", "of one batch in ten, at least"),
                unit="percentunit", high=1,
            ),
        ),
    )  # fmt: skip


def _predictions() -> Row:
    return Row(
        "Predictions: may admission be believed?",
        (
            lines(
                "Wait, predicted and actual", "What does admission expect of those it lets in, and what comes? P95.",
                Target(BOARD.quantile(0.95, m.WAIT_PREDICTED), "predicted"),
                Target(BOARD.quantile(0.95, m.WAIT_ACTUAL), "actual"), unit="s", width=6,
            ),
            lines(
                "Actual over predicted wait", "Are waits predicted well? Above 1 too many are let in, below too few.",
                *(Target(BOARD.quantile(q, m.WAIT_PREDICTION), f"P{q * 100:g}") for q in (0.5, 0.95)),
                Target(BOARD.gauge(m.THETA, "max", EACH), "correction {{instance}}"), unit="none",
                limits=Limits(1, 1.5), width=6,
            ),
            lines(
                "Actual over predicted pass", "Is the cost of a pass predicted well? It decides how large batches are.",
                *(Target(BOARD.quantile(q, m.BATCH_PREDICTION), f"P{q * 100:g}") for q in (0.5, 0.95)), unit="none",
                limits=Limits(1.5, 2.25), width=6,
            ),
            heat(
                "Waits", "Are all waits alike, or do some calls wait much longer? Points are traces.",
                Target(
                    BOARD.rate(m.STAGE_DURATION, ("le",), where={"stage": "queue"}, part="_bucket"), "{{le}}",
                    exemplar=True,
                ), unit="s", width=6,
            ),
        ),
    )  # fmt: skip


def _policies() -> Row:
    refused = {"decision": "rejected"}
    return Row(
        "Policies: what is refused, and why?",
        (
            lines(
                "Refusals by policy", "Which policy refuses, and since when?",
                Target(BOARD.rate(m.DECISIONS, ("policy",), where=refused), "{{policy}}"), unit="reqps", stacked=True,
                width=6,
            ),
            lines(
                "Refusals by reason", "What exactly was over its limit?",
                Target(BOARD.rate(m.DECISIONS, ("reason",), where=refused), "{{reason}}"), unit="reqps", stacked=True,
                width=6,
            ),
            lines(
                "Decisions by stage",
                "Are refusals cheap? unread is before all else, estimate before tokenising, exact last.",
                Target(BOARD.rate(m.DECISIONS, ("decision", "stage")), "{{decision}} on {{stage}}"), unit="reqps",
                stacked=True, width=6,
            ),
            timeline(
                "Policies in force", "Which policies may refuse at all?",
                Target(BOARD.gauge(m.ADMISSION_POLICY, "max", ("policy",)), "{{policy}}"),
                states={0: ("off", "text"), 1: ("on", "green")}, width=6,
            ),
            lines(
                "latency_p95: P95", "What does the latency policy see, timeouts included?",
                Target(BOARD.gauge(m.LATENCY_P95, "max", EACH), "{{instance}}"), unit="s", width=6,
            ),
            lines(
                "latency_p95: shed", "Which share does the latency policy refuse for past latency?",
                Target(BOARD.gauge(m.SHED_PROBABILITY, "max", EACH), "{{instance}}"), unit="percentunit", high=1,
                width=6,
            ),
            lines(
                "gradient: limit", "How much may wait and run, as the gradient policy finds? 0 without that policy.",
                Target(BOARD.gauge(m.ADMISSION_LIMIT, "min", EACH), "{{instance}}"), unit=TOKENS, width=6,
            ),
            lines(
                "gradient: signal", "Why does its limit move? Over 1: calls wait longer than batching explains.",
                Target(BOARD.gauge(m.ADMISSION_SIGNAL, "max", EACH), "{{instance}}"), unit="none", width=6,
            ),
        ),
    )  # fmt: skip


def _failures() -> Row:
    return Row(
        "Failed passes: who pays for bad texts?",
        (
            lines(
                "Passes run again", "How much is run again to find the texts that fail?",
                Target(BOARD.rate(m.BATCH_RETRIES, EACH), "{{instance}}"), unit="ops", width=4,
            ),
            lines(
                "Time for it", "Which share of the device's work is that?",
                Target(share(BOARD.rate(m.RETRY_BUSY, EACH), BOARD.rate(m.DEVICE_BUSY, EACH)), "{{instance}}"),
                unit="percentunit", high=1, width=5,
            ),
            lines(
                "Texts under suspicion", "Do texts of failed passes pile up?",
                Target(BOARD.gauge(m.RETRY_ITEMS, "max", EACH), "{{instance}}"), unit="short", width=5,
            ),
            lines(
                "Budget for it", "Must they wait for others? At 0 s of device time and below they do.",
                Target(BOARD.gauge(m.RETRY_BUDGET, "min", EACH), "{{instance}}"), unit="s", width=5, low=None,
            ),
            lines(
                "Tenants in quarantine", "Does a caller keep sending texts that fail, and since when?",
                Target(BOARD.gauge(m.QUARANTINE, "max", EACH), "{{instance}}"), unit="short", width=5,
            ),
        ),
    )  # fmt: skip


SCHEDULER: Final = Board(
    "scheduler",
    "Scheduler",
    "Which bucket is slow, are batches full, how long are waits, which policy refuses and why?",
    (_glance(), _buckets(), _queue(), _batches(), _predictions(), _policies(), _failures()),
)
