"""A server's own metrics, before and after: what it computed, and what that cost it.

Decides which metrics become figures. Works on any server that exposes embedserve's names in Prometheus' text format;
what is not there is left out. Must never know how the load was made.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from typing import Any

__all__ = ["difference", "samples"]


def samples(url: str, timeout_s: float) -> dict[str, float]:
    """Every sample by its name and labels, those of one name added up under the bare name too.

    Raises:
        OSError: nobody answered.
    """
    if not url.startswith(("http://", "https://")):
        raise OSError(f"{url} is not an http address")
    with urllib.request.urlopen(url, timeout=timeout_s) as page:
        text = page.read().decode()
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.split(" # ")[0].rpartition(" ")
            found[name] = float(value)
            bare = name.split("{")[0]
            if bare != name:
                found[bare] = found.get(bare, 0.0) + float(value)
    return found


def difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    """What happened between two scrapes: batches and their size, padding, CPU time, memory, evictions of the queue."""

    def grew(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    found: dict[str, Any] = {}
    batches, padded = grew("embedserve_batch_items_count"), grew("embedserve_batch_padded_tokens_sum")
    if batches > 0:
        found["batches"] = int(batches)
        found["batch_items_mean"] = grew("embedserve_batch_items_sum") / batches
        found["batch_tokens_mean"] = grew("embedserve_batch_tokens_sum") / batches
        found["batch_sizes"] = _shares(before, after, "embedserve_batch_items_bucket", batches)
    if padded > 0:
        found["padding_efficiency"] = grew("embedserve_batch_tokens_sum") / padded
    if "process_cpu_time_seconds_total" in after:
        found["cpu_s"] = grew("process_cpu_time_seconds_total")
    if "process_memory_usage_bytes" in after:
        found["memory_mib_before"] = before.get("process_memory_usage_bytes", 0.0) / 2**20
        found["memory_mib_after"] = after["process_memory_usage_bytes"] / 2**20
    return found


def _shares(before: Mapping[str, float], after: Mapping[str, float], name: str, total: float) -> dict[str, float]:
    """Share of the observations in each bucket of a cumulative histogram, by its upper end; empty ones left out."""
    edges: list[tuple[float, float]] = []
    for sample, value in after.items():
        if sample.startswith(f'{name}{{le="'):
            edge = float(sample.removeprefix(f'{name}{{le="').partition('"')[0])
            edges.append((edge, value - before.get(sample, 0.0)))
    found, below = {}, 0.0
    for edge, count in sorted(edges):
        if count > below:
            found["more" if edge == float("inf") else f"{edge:g}"] = (count - below) / total
        below = max(below, count)
    return found
