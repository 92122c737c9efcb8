"""The *Engine* board: forward time, busy fraction, memory, compiling, and who is the bottleneck.

Decides how a slow device, a slow tokenizer and a late event loop are told apart. Must never show callers: *Service*
does.
"""

from __future__ import annotations

from typing import Final

from dashboards.board import Board, Row
from dashboards.panels import Limits, Target, figure, heat, lines, timeline
from dashboards.query import BOARD, share
from embedserve.telemetry import instruments as m

__all__ = ["ENGINE"]

EACH: Final = ("instance",)
OK: Final = {"outcome": "ok"}
TOKENS_PER_S: Final = "si:tok/s"
BUSY: Final = BOARD.worst(lambda each: each.rate(m.DEVICE_BUSY), EACH)
"""Of the busiest device of each instance."""
TOKENIZING: Final = BOARD.worst(
    lambda each: share(each.rate(m.TOKENIZER_DURATION, part="_sum"), each.gauge(m.TOKENIZER_THREADS)), EACH
)
"""Share of the tokenizer threads that work, in the busiest process: over a window, as the device's is, and not at the
instant of a scrape."""


def _lag(q: float) -> str:
    return BOARD.worst(lambda each: each.quantile(q, m.LOOP_LAG))


def _glance() -> Row:
    return Row(
        "At a glance",
        (
            figure("Busy", "Which share of the time does the busiest device work?", Target(f"max ({BUSY})", "busiest"),
                   unit="percentunit", limits=Limits(0.8, 0.95)),
            figure("P95 of a pass", "How long does a pass take?",
                   Target(BOARD.quantile(0.95, m.BATCH_DURATION, where=OK), "P95"), unit="s", none="no passes"),
            figure("Tokens", "How much is embedded?", Target(BOARD.rate(m.BATCH_TOKENS, part="_sum"), "tokens"),
                   unit=TOKENS_PER_S),
            figure(
                "Tokenizer", "Is the tokenizer the limit: which share of its threads work, in the busiest process?",
                Target(f"max ({TOKENIZING})", "busiest"), unit="percentunit", limits=Limits(0.8, 0.95),
            ),
            figure("Event loop", "Is a process itself too slow: how late is the latest event loop, P95?",
                   Target(_lag(0.95), "P95"), unit="s", limits=Limits(0.01, 0.1), none="idle"),
            figure("Form", "How many processes run compiled, how many eager?",
                   Target(f"{BOARD.gauge(m.MODEL_VARIANT, 'sum', ('variant',))} > 0", "{{variant}}"), unit="short",
                   none="none loaded", named=True),
        ),
    )  # fmt: skip


def _bottleneck() -> Row:
    calls = BOARD.rate(m.STAGE_DURATION, where={"stage": "forward"}, part="_count")
    groups = {
        "tokenizer": "tokenize",
        "device": "queue|assemble|forward",
        "this process": "validate|admit|respond",
        "caller's upload": "receive",
    }
    return Row(
        "Is the device or the tokenizer the bottleneck?",
        (
            lines(
                "Time of a call, by who makes it wait", "Who is the bottleneck, and since when? device: queue and "
                "passes; tokenizer: wait for a thread and its work.",
                *(
                    Target(share(BOARD.rate(m.STAGE_DURATION, where={"stage": stages}, part="_sum"), calls), name)
                    for name, stages in groups.items()
                ),
                unit="s", stacked=True,
            ),
            lines(
                "How near to its limit", "Which of them is at its limit, device or tokenizer? 100 %: it never rests.",
                Target(BUSY, "device {{instance}}"), Target(TOKENIZING, "tokenizer {{instance}}"), unit="percentunit",
                high=1, limits=Limits(0.8, 0.95),
            ),
            lines(
                "Tokenizer threads", "How many threads work now, and how many requests wait for one?",
                Target(BOARD.gauge(m.TOKENIZER_THREADS), "threads"), Target(BOARD.gauge(m.TOKENIZER_BUSY), "at work"),
                Target(BOARD.gauge(m.TOKENIZER_QUEUE), "requests that wait"), unit="short",
            ),
            lines(
                "Time in the tokenizer", "How long do requests wait for a tokenizer thread, and keep it?",
                *(Target(BOARD.quantile(q, m.TOKENIZER_WAIT), f"wait P{q * 100:g}") for q in (0.5, 0.95)),
                *(Target(BOARD.quantile(q, m.TOKENIZER_DURATION), f"work P{q * 100:g}") for q in (0.5, 0.95)), unit="s",
            ),
            lines(
                "Tokenizer's output", "How much does the tokenizer do?",
                Target(BOARD.rate(m.TOKENIZER_TOKENS), "tokens"), Target(BOARD.rate(m.TOKENIZER_TEXTS), "texts"),
                unit="cps",
            ),
            lines(
                "Event loop lag", "Is a process too busy to serve, whatever the device does? That of the latest one.",
                *(Target(_lag(q), f"P{q * 100:g}") for q in (0.5, 0.95, 0.99)), unit="s",
            ),
        ),
    )  # fmt: skip


def _passes() -> Row:
    return Row(
        "Passes",
        (
            lines(
                "Duration of a pass", "How long do passes take, and since when? Points are traces of batches.",
                *(
                    Target(BOARD.quantile(q, m.BATCH_DURATION, where=OK), f"P{q * 100:g}", exemplar=True)
                    for q in (0.5, 0.95, 0.99)
                ), unit="s",
            ),
            lines(
                "Where a pass's time goes", "Is it the model, or copying and gathering? Mean of each stage.",
                Target(
                    share(
                        BOARD.rate(m.BATCH_STAGE_DURATION, ("stage",), part="_sum"),
                        BOARD.rate(m.BATCH_STAGE_DURATION, where={"stage": "forward"}, part="_count"),
                        spread=("stage",),
                    ), "{{stage}}",
                ), unit="s", stacked=True,
            ),
            heat(
                "All passes", "Are passes alike, or are some much longer?",
                Target(BOARD.rate(m.BATCH_DURATION, ("le",), where=OK, part="_bucket"), "{{le}}", exemplar=True),
                unit="s",
            ),
            lines(
                "Passes by outcome", "Do passes fail, run out of memory, or give NaN?",
                Target(BOARD.rate(m.BATCH_DURATION, ("outcome",), part="_count"), "{{outcome}}"), unit="ops",
                colors={"ok": "green", "failed": "red", "fatal": "dark-red", "out_of_memory": "orange"},
            ),
            lines(
                "Age of the running pass", "Does a pass hang, and since when?",
                Target(BOARD.gauge(m.PASS_AGE, "max", EACH), "{{instance}}"), unit="s", limits=Limits(1, 5),
            ),
            lines(
                "Stalls", "How often was a device silent for longer than a pass may take?",
                Target(BOARD.increase(m.STALLS, EACH), "{{instance}}"), unit="short",
            ),
        ),
    )  # fmt: skip


def _speed() -> Row:
    return Row(
        "Speed",
        (
            lines(
                "Tokens in a second of work",
                "How fast are all devices of an instance? Falling under the same traffic: they slow.",
                Target(BOARD.gauge(m.SERVICE_RATE, "sum", EACH), "{{instance}}"), unit=TOKENS_PER_S,
            ),
            lines(
                "Cost of an empty pass", "What does a pass cost whatever is in it? High: larger batches pay.",
                Target(BOARD.gauge(m.COST_FIXED, "max", EACH), "{{instance}}"), unit="s",
            ),
            lines(
                "Cost of a token", "What does one more token cost?",
                Target(BOARD.gauge(m.COST_PER_TOKEN, "max", EACH), "{{instance}}"), unit="s",
            ),
        ),
    )  # fmt: skip


def _memory() -> Row:
    return Row(
        "Memory",
        (
            lines(
                "Device memory", "How near is the device to its memory's end? On a CPU: the process, and the machine.",
                Target(BOARD.gauge(m.DEVICE_MEMORY_USED, "sum", EACH), "used {{instance}}"),
                Target(BOARD.gauge(m.DEVICE_MEMORY_TOTAL, "sum", EACH), "all {{instance}}"), unit="bytes",
            ),
            lines(
                "Token budget", "How much may ride in a pass? Less where it would take too long, or memory ran out.",
                Target(BOARD.gauge(m.MAX_BATCH_TOKENS, "min", EACH), "{{instance}}"), unit="si:tok",
            ),
            lines(
                "Process memory", "Does an instance grow? Its processes together; what they share counts in each.",
                Target(BOARD.gauge(m.PROCESS_MEMORY, "sum", EACH), "{{instance}}"), unit="bytes",
            ),
        ),
    )  # fmt: skip


def _compiling() -> Row:
    return Row(
        "Compiling and start",
        (
            timeline(
                "Form of the model", "Which processes run a compiled model, and since when?",
                Target(BOARD.gauge(m.MODEL_VARIANT, "min", EACH, where={"variant": "compiled"}), "{{instance}}"),
                states={0: ("eager", "blue"), 1: ("compiled", "green")}, width=8,
            ),
            lines(
                "Compiled models", "How many were made, from a cache or anew, and how many in vain? Since each start.",
                Target(BOARD.total(m.MODEL_COMPILE_DURATION, ("outcome",), part="_count"), "{{outcome}}"), unit="short",
                width=4,
            ),
            lines(
                "Time to compile", "How long did compiling take in all, since each start?",
                Target(BOARD.total(m.MODEL_COMPILE_DURATION, EACH, part="_sum"), "{{instance}}"), unit="s", width=4,
            ),
            lines(
                "Swaps", "How often did another form of the model take over?",
                Target(BOARD.total(m.MODEL_SWAPS, ("variant",)), "to {{variant}}"), unit="short", width=4,
            ),
            lines(
                "Start", "How long did loading and warm-up take?",
                Target(BOARD.gauge(m.WARM_UP, "max", EACH), "{{instance}}"), unit="s", width=4,
            ),
            lines(
                "CUDA graphs", "How many graphs are there, of those that were asked for? None without a GPU.",
                Target(BOARD.gauge(m.GRAPHS_PLANNED, "sum", EACH), "planned {{instance}}"),
                Target(BOARD.gauge(m.GRAPHS_CAPTURED, "sum", EACH), "captured {{instance}}"), unit="short", width=6,
            ),
            lines(
                "Graph hits", "How many passes replay a graph, and how many does none fit?",
                Target(BOARD.rate(m.GRAPHS_PASSES, ("outcome",)), "{{outcome}}"), unit="ops", width=6,
            ),
            lines(
                "Capture", "How long did capturing take in all?",
                Target(BOARD.gauge(m.GRAPHS_CAPTURE_DURATION, "max", EACH), "{{instance}}"), unit="s", width=6,
            ),
            lines(
                "Graph memory", "How much of the device's memory do graphs share?",
                Target(BOARD.gauge(m.GRAPHS_MEMORY, "sum", EACH), "{{instance}}"), unit="bytes", width=6,
            ),
        ),
    )  # fmt: skip


def _process() -> Row:
    return Row(
        "Process",
        (
            lines(
                "Cores", "How many cores does an instance keep busy, all its processes together?",
                Target(BOARD.rate(m.PROCESS_CPU, ("instance", "cpu_mode")), "{{instance}} {{cpu_mode}}"), unit="none",
                stacked=True, width=12,
            ),
            lines(
                "File descriptors", "Do connections pile up?",
                Target(BOARD.gauge(m.PROCESS_FDS, "sum", EACH), "{{instance}}"), unit="short", width=12,
            ),
        ),
    )  # fmt: skip


ENGINE: Final = Board(
    "engine",
    "Engine",
    "Is the device or the tokenizer the bottleneck? Passes, speed, memory, compiling.",
    (_glance(), _bottleneck(), _passes(), _speed(), _memory(), _compiling(), _process()),
)
