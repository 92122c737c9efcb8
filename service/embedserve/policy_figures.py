"""What each admission policy decides by, for people: its numbers, each beside its limit.

Decides which limit belongs to which number. Must never know how they are shown, nor ask a policy anything. A part of
the composition root, as ``wiring.py`` is.
"""

from __future__ import annotations

from collections.abc import Mapping

from embedserve.config import Config
from embedserve.scheduling.admission import LoadState
from embedserve.scheduling.item import Depth
from embedserve.snapshot import Figure
from embedserve.telemetry.seconds import NS

__all__ = ["policy_figures"]


def policy_figures(
    name: str, figures: Mapping[str, float], load: LoadState, depth: Depth, config: Config
) -> tuple[Figure, ...]:
    """What ``name`` decides by, each number beside its limit."""
    held_items, held_tokens = depth.waiting_items + depth.running_items, depth.waiting_tokens + depth.running_tokens
    match name:
        case "queue":
            return (
                Figure("tokens held", held_tokens, "tokens", figures["max_queue_tokens"]),
                Figure("texts held", held_items, "items", figures["max_queue_items"]),
            )
        case "deadline":
            return (
                Figure("predicted wait", load.predicted_wait_ns * max(load.theta, 1.0) / NS, "s"),
                Figure("correction", load.theta, "ratio"),
            )
        case "throughput":
            return (Figure("drain time", load.drain_ns / NS, "s", figures["max_drain_ns"] / NS),)
        case "latency_p95":
            latency = config.admission.latency_p95
            return (
                Figure("P95", figures["p95_ns"] / NS, "s", latency.hard_ms / 1000),
                Figure("predicted wait", load.predicted_wait_ns * load.theta / NS, "s", latency.slo_ms / 1000),
                Figure("share to shed", figures["shed_share"], "share", latency.max_shed),
            )
        case "gradient":
            tokens = max(held_tokens, held_items * figures["item_tokens"])
            return (
                Figure("tokens in flight", tokens, "tokens", figures["limit_tokens"]),
                Figure("wait over usual", figures["signal"], "ratio", config.admission.gradient.tolerance),
            )
        case _:
            return tuple(Figure(key, value, "ratio") for key, value in figures.items())
