"""What a server says of itself: its metrics as numbers, its memory, its load."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.integration.server.process import ServerProcess

LIMIT_S = 15.0


class Figures:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self._samples = [s for family in text_string_to_metric_families(text) for s in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """The sum of all series of ``name`` that have ``labels``; fails when there is none."""
        found = [s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items()]
        assert found, f"no series {name} {labels}"
        return sum(found)

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Sums by the values of ``label``, without zeros."""
        sums: dict[str, float] = {}
        for sample in self._samples:
            if sample.name == name and labels.items() <= sample.labels.items() and sample.value:
                sums[sample.labels[label]] = sums.get(sample.labels[label], 0.0) + sample.value
        return sums

    def passes(self) -> float:
        return self.total("embedserve_batch_items_count")

    def assert_balanced(self) -> None:
        """What was let in has come out, and nothing is in flight."""
        admitted = self.total("embedserve_items_admitted_total")
        settled = self.by("embedserve_items_settled_total", "verdict")
        active = self.by("embedserve_rpc_active_calls", "rpc_method")
        waiting, runs = self.total("embedserve_queue_items"), self.total("embedserve_running_items")
        assert (sum(settled.values()), active, waiting, runs) == (admitted, {}, 0, 0), settled


def get(url: str, timeout_s: float = 5.0) -> tuple[int, bytes]:
    """Status and body, whatever the status."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def figures(server: ServerProcess) -> Figures:
    status, body = get(server.operations + "/metrics")
    assert status == 200
    return Figures(body.decode())


def load(server: ServerProcess) -> dict[str, Any]:
    return dict(json.loads(get(server.operations + "/health")[1]))


def settled(server: ServerProcess) -> Figures:
    """The figures once nothing is in flight any more; metrics of a call are counted after its answer."""
    ends = time.monotonic() + LIMIT_S
    while True:
        found = figures(server)
        try:
            found.assert_balanced()
        except AssertionError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.02)
        else:
            return found


def wait_for(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """What ``condition`` gives, once it is something."""
    ends = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < ends, f"{what} never came"
        time.sleep(0.01)
    return found


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def slope(values: Iterable[float]) -> float:
    """Least squares: what a value gains from one to the next."""
    points = list(enumerate(values))
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def quantile(values: Iterable[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
