"""What metrics show of an engine now, taken from its parts.

Decides which figure of which part each field of ``LoadSnapshot`` is, and what stands for it in a process whose engine
is elsewhere. Must never know a metric, and only reads. A part of the composition root, as ``wiring.py`` is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from embedserve.engine.engine import Engine
from embedserve.engine.surface import EngineSurface
from embedserve.model.backend import GraphReport
from embedserve.telemetry.load import LoadSnapshot

__all__ = ["load_snapshot"]


def load_snapshot(
    engine: EngineSurface, lifecycle_state: str, silent: Mapping[str, bool] | None = None
) -> LoadSnapshot:
    """What metrics show of the engine now, and of the processes that it shares calls with. It only reads."""
    if not isinstance(engine, Engine):  # it is in another process, which shows the rest
        use = engine.tokenizer_use
        return LoadSnapshot(
            lifecycle_state=lifecycle_state,
            accepting=engine.load().accepting_requests,
            tokenizer_threads=use.threads,
            tokenizer_busy=use.busy,
            tokenizer_waiting=use.waiting,
            silent_engines=dict(silent or {}),
        )
    scheduler = engine.scheduler
    now = time.monotonic_ns()
    depth, load = scheduler.depth, scheduler.load(now)
    figures = scheduler.figures(now)
    report = engine.load()
    device = engine.device if engine.loaded else None
    census, tokenizer = scheduler.census(now), engine.tokenizer_use
    return LoadSnapshot(
        lifecycle_state=lifecycle_state,
        accepting=report.accepting_requests,
        waiting_items_by_bucket=depth.waiting_by_bucket,
        waiting_tokens_by_bucket=census.tokens_by_bucket,
        oldest_age_s_by_bucket={edge: age / 1e9 for edge, age in census.oldest_ns_by_bucket.items()},
        retry_items=census.retry_items,
        retry_budget_s=census.retry_credit_ns / 1e9,
        quarantined_tenants=census.tenants_apart,
        running_items=depth.running_items,
        running_tokens=depth.running_tokens,
        pass_age_s=engine.pass_age_ns / 1e9,
        service_rate_tokens_per_s=load.tokens_per_second,
        drain_s=load.drain_ns / 1e9,
        p95_s=(load.p95_sojourn_ns or 0) / 1e9,
        shed_probability=figures.get("latency_p95", {}).get("shed_share", 0.0),
        theta=scheduler.theta,
        policies=tuple(figures),
        limit_tokens=figures.get("gradient", {}).get("limit_tokens", 0.0),
        limit_signal=figures.get("gradient", {}).get("signal", 0.0),
        tokenizer_threads=tokenizer.threads,
        tokenizer_busy=tokenizer.busy,
        tokenizer_waiting=tokenizer.waiting,
        max_batch_tokens=scheduler.max_batch_tokens,
        cost_fixed_s=scheduler.cost.batch_ns / 1e9,
        cost_per_token_s=scheduler.cost.token_ns / 1e9,
        device_memory_used_bytes=device.memory_used_bytes if device else 0,
        device_memory_total_bytes=device.memory_total_bytes if device else 0,
        graphs=device.graphs if device else GraphReport(),
        variant="" if device is None else "compiled" if device.compiled else "eager",
        warm_up_s=engine.warm_up_ns / 1e9 if engine.loaded else 0.0,
        silent_front_ends=dict(silent or {}),
    )
