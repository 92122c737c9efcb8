"""What telemetry wants to know of the engine at a scrape.

Decides which figures of load are shown. Must never know where they come from: the composition root gives a function
that makes a ``LoadSnapshot``. That function is called from a scraper's thread, so it must only read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from embedserve.model.backend import GraphReport

__all__ = ["LoadSnapshot", "LoadSource", "SharedSnapshot"]


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """The load, the policies and the device now. The defaults are those of a process that has only just begun."""

    lifecycle_state: str = "starting"
    """``starting``, ``warming``, ``serving``, ``stalled``, ``draining``, ``stopped`` or ``failed``."""
    accepting: bool = False
    waiting_items_by_bucket: Mapping[int, int] = field(default_factory=dict)
    """Bucket edge to texts that wait, all edges present; ``scheduling.item.Depth.waiting_by_bucket``."""
    waiting_tokens_by_bucket: Mapping[int, int] = field(default_factory=dict)
    oldest_age_s_by_bucket: Mapping[int, float] = field(default_factory=dict)
    retry_items: int = 0
    retry_budget_s: float = 0.0
    quarantined_tenants: int = 0
    running_items: int = 0
    running_tokens: int = 0
    pass_age_s: float = 0.0
    service_rate_tokens_per_s: float = 0.0
    drain_s: float = 0.0
    p95_s: float = 0.0
    shed_probability: float = 0.0
    theta: float = 0.0
    policies: Collection[str] = ()
    """Admission policies that are selected, by name."""
    limit_tokens: float = 0.0
    limit_signal: float = 0.0
    tokenizer_threads: int = 0
    tokenizer_busy: int = 0
    tokenizer_waiting: int = 0
    max_batch_tokens: int = 0
    cost_fixed_s: float = 0.0
    cost_per_token_s: float = 0.0
    device_memory_used_bytes: int = 0
    device_memory_total_bytes: int = 0
    variant: str = ""
    """``eager`` or ``compiled``; empty until a model is loaded."""
    warm_up_s: float = 0.0
    silent_front_ends: Mapping[str, bool] = field(default_factory=dict)
    """Each front end, and whether it did not answer when it was last asked; empty where there is one process."""
    silent_engines: Mapping[str, bool] = field(default_factory=dict)
    """In a front end: each engine process, and whether it is sent nothing; empty elsewhere."""
    graphs: GraphReport = field(default_factory=GraphReport)


LoadSource = Callable[[], LoadSnapshot]

_SHARED_S: Final = 0.05
"""How long one snapshot serves. A scrape asks twenty gauges within milliseconds; all should tell of one moment."""


class SharedSnapshot:
    """One snapshot for all gauges of a scrape. Thread-safe."""

    def __init__(self) -> None:
        """Begin with the defaults, until a source is registered."""
        self._source: LoadSource = LoadSnapshot
        self._lock = threading.Lock()
        self._taken_s = float("-inf")
        self._snapshot = LoadSnapshot()

    def register(self, source: LoadSource) -> None:
        """Ask ``source`` from now on; it may raise ``TimeoutError`` where it cannot tell in time."""
        with self._lock:
            self._source = source
            self._taken_s = float("-inf")

    def read(self) -> LoadSnapshot:
        """The load, at most 50 ms old."""
        with self._lock:
            if time.monotonic() - self._taken_s > _SHARED_S:
                # A source that waits for a stalled event loop gives up with TimeoutError. The last snapshot stands in:
                # a source asked again for each of twenty gauges would hold the scrape twenty times as long.
                with suppress(TimeoutError):
                    self._snapshot = self._source()
                self._taken_s = time.monotonic()
            return self._snapshot
