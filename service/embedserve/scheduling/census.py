"""Who waits where, and what failures have left behind: figures for whoever watches.

Decides nothing, and no decision reads it. Must never change what it counts, nor look at more than a bounded part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from embedserve.scheduling.cost import Buckets
from embedserve.scheduling.flight import Flight
from embedserve.scheduling.item import Depth
from embedserve.scheduling.retry import RetryLadder
from embedserve.scheduling.waiting import WaitingQueue

__all__ = ["Census", "take_census", "take_depth"]

SCAN_ITEMS_MAX = 4096
"""Items that are looked at for ages: 0.3 ms of the event loop at a scrape, and more than a device takes in a second."""


class Census(NamedTuple):
    """What waits now, by length bucket (edge, all edges present), and what failed passes have left behind."""

    tokens_by_bucket: Mapping[int, int]
    """Useful tokens; what waits to run again is left out."""
    oldest_ns_by_bucket: Mapping[int, int]
    """How long the item has waited that waits longest there; 0 for an empty bucket. An upper bound for a bucket whose
    first item is behind ``SCAN_ITEMS_MAX`` others."""
    retry_items: int
    """Items of failed passes that wait to run again."""
    retry_tokens: int
    retry_credit_ns: int
    """Device time that retries of failures may take now; at 0 and below they wait for those that never failed."""
    tenants_apart: int
    """Tenants in quarantine."""


def take_depth(queue: WaitingQueue, ladder: RetryLadder, flight: Flight, buckets: Buckets) -> Depth:
    """What waits, what waits to run again, and what runs."""
    by_bucket = list(queue.by_bucket)
    if ladder:
        for length in ladder.lengths():
            by_bucket[buckets.ordinal[length]] += 1
    oldest = [ns for ns in (queue.oldest_ns(), ladder.oldest_ns()) if ns is not None]
    return Depth(
        queue.items + ladder.items,
        queue.tokens + ladder.tokens,
        flight.items,
        flight.tokens,
        min(oldest, default=None),
        dict(zip(buckets.edges, by_bucket, strict=True)),
    )


def take_census(queue: WaitingQueue, ladder: RetryLadder, edges: Sequence[int], now_ns: int) -> Census:
    """Count, at ``now_ns``."""
    oldest = queue.oldest_by_bucket(SCAN_ITEMS_MAX)
    apart = {
        key for klass in queue.classes for key, tenant in klass.tenant_by_key.items() if tenant.apart_until_ns > now_ns
    }
    return Census(
        dict(zip(edges, queue.tokens_by_bucket, strict=True)),
        {edge: 0 if ns is None else max(0, now_ns - ns) for edge, ns in zip(edges, oldest, strict=True)},
        ladder.items,
        ladder.tokens,
        ladder.credit_ns,
        len(apart),
    )
