"""The *Service* board: is it healthy, who is hurt, what is shed.

Decides what an engineer on call sees first. Must never show how the scheduler or the device got there: *Scheduler* and
*Engine* do.
"""

from __future__ import annotations

from typing import Final

from dashboards.board import Board, Row
from dashboards.objectives import EMBED, EMBEDDING, FAILED, LATENCY_BOUND_S, OBJECTIVES, SHED
from dashboards.panels import Limits, Target, facts, figure, heat, lines, timeline
from dashboards.query import BOARD, share, short_method
from embedserve.telemetry import instruments as m
from embedserve.telemetry.instruments import prometheus_label

__all__ = ["SERVICE"]

STATUS: Final = "rpc_response_status_code"
STATES: Final = {
    "serving": "green", "starting": "blue", "warming": "blue", "draining": "yellow", "stalled": "orange",
    "stopped": "text", "failed": "red",
}  # fmt: skip
"""Colours of the life of a process."""
STATUS_COLORS: Final = {
    "OK": "green", "RESOURCE_EXHAUSTED": "orange", "INTERNAL": "dark-red", "UNAVAILABLE": "red",
    "DEADLINE_EXCEEDED": "purple", "INVALID_ARGUMENT": "blue", "CANCELLED": "text",
}  # fmt: skip
LOST: Final = "failed|dropped"
LOST_SPANS: Final = LOST + "|unbuilt"
WITH_TEXTS: Final = {"rpc_method": EMBEDDING["rpc_method"]}


def _calls(*statuses: str, by: tuple[str, ...] = ()) -> str:
    where = {**WITH_TEXTS, STATUS: "|".join(statuses)} if statuses else WITH_TEXTS
    return BOARD.rate(m.RPC_DURATION, by, where=where, part="_count")


P95: Final = BOARD.quantile(0.95, m.RPC_DURATION, where={**EMBED, STATUS: "OK"})
BUSY: Final = f"max ({BOARD.each('instance').rate(m.DEVICE_BUSY)})"


def _glance() -> Row:
    states = BOARD.gauge(m.LIFECYCLE, "sum", ("state",))
    return Row(
        "At a glance",
        (
            figure(
                "State", "Is it healthy: how many processes are in which state?", Target(f"{states} > 0", "{{state}}"),
                unit="short", colors=STATES, none="not scraped", decimals=0,
            ),
            figure(
                "Traffic", "How many calls with texts come in a second?", Target(_calls(), "calls"), unit="reqps",
            ),
            figure(
                "Errors", "Which share of the calls fails by our fault (INTERNAL, UNAVAILABLE, DEADLINE_EXCEEDED)?",
                Target(share(_calls(*FAILED), _calls()), "failed"), unit="percentunit", limits=Limits(0.001, 0.01),
            ),
            figure(
                "P95", f"How long does a call of Embed take that is answered? Yellow at half of {LATENCY_BOUND_S:g} s.",
                Target(P95, "P95"), unit="s", limits=Limits(LATENCY_BOUND_S / 2, LATENCY_BOUND_S),
            ),
            figure(
                "Shed", "Which share of the calls is refused for load?", Target(share(_calls(SHED), _calls()), "shed"),
                unit="percentunit", limits=Limits(0.01, 0.05),
            ),
            figure(
                "Busy", "Is the device the limit: which share of the time does the busiest one work?",
                Target(BUSY, "busiest"), unit="percentunit", limits=Limits(0.8, 0.95),
            ),
        ),
    )  # fmt: skip


def _state_number() -> str:
    """One series for each process, whose value is the number of its state."""
    states = (
        f"{BOARD.series(m.LIFECYCLE, where={'state': state})} * {number}" for number, state in enumerate(STATES, 1)
    )
    return f"max by (instance) ({' or '.join(states)})"


def _healthy() -> Row:
    burn = (
        Target(f"{objective.ratio(BOARD.over('1h'))} / {objective.budget:g}", objective.name)
        for objective in OBJECTIVES
    )
    return Row(
        "Is it healthy?",
        (
            timeline(
                "State of each process", "Which process does not serve, and since when?",
                Target(_state_number(), "{{instance}}"),
                states={number: (state, color) for number, (state, color) in enumerate(STATES.items(), 1)},
            ),
            lines(
                "Calls by status", "What do callers get, and since when?",
                Target(f"{_calls(by=(STATUS,))} > 0", "{{rpc_response_status_code}}"), unit="reqps", stacked=True,
                width=12, colors=STATUS_COLORS,
            ),
            lines(
                "Error budget burn", "How fast is the error budget spent, over the last hour? At 1 it lasts for "
                "30 days; 14.4 wakes somebody.", *burn, unit="none", limits=Limits(1, 14.4),
            ),
            lines(
                "Taken now", "Would a call sent now be taken? 0: this process sheds or does not serve.",
                Target(BOARD.of_takers().gauge(m.ACCEPTING, "min", ("instance",)), "{{instance}}"), unit="none", high=1,
            ),
            lines(
                "Known texts", "Does a known text still come back right while the server is idle?",
                Target(BOARD.increase(m.CANARIES, ("outcome",)), "{{outcome}}"), unit="short",
                colors={"ok": "green", "wrong": "red", "timed_out": "orange", "refused": "yellow"},
            ),
        ),
    )  # fmt: skip


def _hurt() -> Row:
    answered = {**EMBED, STATUS: "OK"}
    quantiles = [
        Target(BOARD.quantile(q, m.RPC_DURATION, where=answered), f"P{q * 100:g}", exemplar=True)
        for q in (0.5, 0.95, 0.99)
    ]
    # Means, because they add up: the stages of a call fill it, and so do their means.
    stages = share(
        BOARD.rate(m.STAGE_DURATION, ("stage",), part="_sum"),
        BOARD.rate(m.STAGE_DURATION, where={"stage": "forward"}, part="_count"),
        spread=("stage",),
    )
    return Row(
        "Who is hurt?",
        (
            lines(
                "Latency", "How long do answered calls of Embed take? Points are sampled traces: a click opens one.",
                *quantiles, unit="s", slow_from_s=LATENCY_BOUND_S, limits=Limits(LATENCY_BOUND_S, LATENCY_BOUND_S * 4),
            ),
            heat(
                "Latency of all answered calls", "Is everybody slow, or a few? Two bands are two kinds of callers.",
                Target(
                    BOARD.rate(m.RPC_DURATION, ("le",), where=answered, part="_bucket"), "{{le}}", exemplar=True
                ), unit="s",
            ),
            lines(
                "Where a call's time goes", "Which stage makes calls slow? Mean time in each, one upon another.",
                Target(stages, "{{stage}}"), unit="s", stacked=True, slow_from_s=LATENCY_BOUND_S,
            ),
            lines(
                "P95 wait by length", "Whose waits are long: which length bucket is slow, and since when?",
                Target(
                    f"{BOARD.quantile(0.95, m.QUEUE_WAIT, ('bucket',))} >= 0", "to {{bucket}} tokens"
                ), unit="s", slow_from_s=LATENCY_BOUND_S,
            ),
            lines(
                "Calls under way", "How many calls are open, and of which kind? Growing without more traffic: waiting.",
                Target(short_method(BOARD.gauge(m.ACTIVE_CALLS, "sum", ("rpc_method",))), "{{method}}"), unit="short",
            ),
            lines(
                "P95 by method", "Which method is slow, all endings together?",
                Target(f"{short_method(BOARD.quantile(0.95, m.RPC_DURATION, ('rpc_method',)))} >= 0", "{{method}}"),
                unit="s",
            ),
        ),
    )  # fmt: skip


def _failing() -> Row:
    failed = "|".join(FAILED)
    return Row(
        "What fails?",
        (
            lines(
                "Failed calls", "Which calls fail by our fault, and how?",
                Target(
                    short_method(
                        BOARD.rate(
                            m.RPC_DURATION, ("rpc_method", STATUS), where={**WITH_TEXTS, STATUS: failed}, part="_count"
                        )
                    ), "{{method}} {{rpc_response_status_code}}",
                ), unit="reqps", width=6,
            ),
            lines(
                "Texts that got no vector", "What becomes of texts that were let in and are not embedded?",
                Target(BOARD.rate(m.ITEMS_SETTLED, ("verdict",), where={"verdict": "!done"}), "{{verdict}}"),
                unit="cps", width=6,
            ),
            lines(
                "Errors, ours and theirs", "Is it us? unexpected errors are our fault; expected ones are wrong calls, "
                "refused, late or given up.", Target(BOARD.rate(m.RPC_ERRORS, ("kind",)), "{{kind}}"), unit="reqps",
                width=6, colors={"expected": "blue", "unexpected": "red"},
            ),
            lines(
                "Requests", "How do requests end that reached the engine?",
                Target(BOARD.rate(m.REQUESTS, ("verdict",)), "{{verdict}}"), unit="reqps", width=6,
            ),
        ),
    )  # fmt: skip


def _shed() -> Row:
    refused = BOARD.rate(m.DECISIONS, ("policy", "reason"), where={"decision": "rejected"})
    return Row(
        "What is shed?",
        (
            lines(
                "Refusals by reason", "What is shed, why, and since when? The runbook, Shedding, has each reason.",
                Target(refused, "{{policy}}: {{reason}}"), unit="reqps", stacked=True, width=12,
            ),
            lines(
                "Share that is shed", "How much of the traffic is refused, by each process?",
                Target(
                    share(
                        BOARD.rate(m.DECISIONS, ("instance",), where={"decision": "rejected"}),
                        BOARD.rate(m.DECISIONS, ("instance",)),
                    ), "{{instance}}",
                ), unit="percentunit", high=1, limits=Limits(0.01, 0.05), width=6,
            ),
            lines(
                "Retries", "Are those who come new callers, or the same ones again?",
                Target(BOARD.rate(m.RETRIES, ("attempt",)), "attempt {{attempt}}"), unit="reqps", width=6,
            ),
        ),
    )  # fmt: skip


def _models() -> str:
    """One row for each instance and model, however many processes tell of it."""
    return BOARD.gauge(
        m.MODEL_INFO, "max", ("instance", *(prometheus_label(label.name) for label in m.MODEL_INFO.labels))
    )


def _blind() -> Row:
    return Row(
        "What runs, and are we blind?",
        (
            facts(
                "Models", "Which model does each process serve?", Target(_models()),
                columns=("instance", "name", "revision", "dtype", "device", "pooling", "dimension", "weights_digest"),
            ),
            lines(
                "Lost telemetry", "Are we blind: what is lost on its way to the collector, or to the log?",
                Target(BOARD.rate(m.SPANS, ("outcome",), where={"outcome": LOST_SPANS}), "spans {{outcome}}"),
                Target(BOARD.rate(m.LOG_RECORDS, ("outcome",), where={"outcome": LOST}), "log records {{outcome}}"),
                Target(BOARD.rate(m.METRIC_EXPORTS, where={"outcome": "failed"}), "pushes of metrics failed"),
                Target(BOARD.rate(m.LOG_LINES, where={"outcome": "dropped"}), "log lines dropped"), unit="cps",
                width=4,
            ),
            lines(
                "Uptime", "Which process is new? A fall is a restart.",
                Target(BOARD.gauge(m.PROCESS_UPTIME, "min", ("instance",)), "{{instance}}"), unit="s", width=4,
            ),
            lines(
                "Silent processes", "Which front end does not answer a scrape, so that its calls are missing here? "
                "Which engine gets no calls?",
                Target(BOARD.gauge(m.FRONT_END_SILENT, "max", ("instance", "frontend")), "{{instance}} {{frontend}}"),
                Target(BOARD.gauge(m.ENGINE_SILENT, "max", ("instance", "engine")), "{{instance}} {{engine}}"),
                unit="none", high=1, width=4,
            ),
        ),
    )  # fmt: skip


SERVICE: Final = Board(
    "service",
    "Service",
    "Is it healthy, who is hurt, what is shed? Begin here; Scheduler and Engine say why.",
    (_glance(), _healthy(), _hurt(), _failing(), _shed(), _blind()),
)
