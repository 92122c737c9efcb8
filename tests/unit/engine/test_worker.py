"""The worker looks at its device while it serves."""

from __future__ import annotations

import queue

import numpy as np
import pytest

from embedserve.engine import worker as module
from embedserve.engine.worker import Part, Pass, PassResult, Worker
from embedserve.model.backend import DeviceReport
from embedserve.testing import FakeBackend


class GrowingBackend(FakeBackend):
    """Holds a byte more each time that it is asked, and is compiled after its warm-up."""

    def __init__(self) -> None:
        super().__init__()
        self.reports = 0

    def report(self) -> DeviceReport:
        self.reports += 1
        return DeviceReport("cpu", self.reports, 100, compiled=self.reports > 1, packed=True)


def run_passes(backend: FakeBackend, count: int) -> Worker:
    """A worker that has run ``count`` passes and ended."""
    results: queue.SimpleQueue[PassResult] = queue.SimpleQueue()
    worker = Worker(
        lambda: backend,
        warm_up_tokens=16,
        on_ready=lambda _outcome: None,
        on_result=results.put,
        on_death=lambda death: pytest.fail(str(death)),
    )
    worker.start()
    ids = np.array([5, 6, 7], dtype=np.int32)
    for number in range(count):
        worker.submit(Pass(number, [Part(ids, np.array([0, 3]), (0,), True, 0)], rows=1, pad_to=None))
    for _ in range(count):
        results.get(timeout=10)
    assert worker.stop(10)
    return worker


class TestDevice:
    def test_it_is_looked_at_after_a_pass_and_not_after_each(self) -> None:
        backend = GrowingBackend()
        worker = run_passes(backend, 20)

        assert worker.device == DeviceReport("cpu", 2, 100, compiled=True, packed=True)
        assert backend.reports == 2  # once when it was ready, once for 20 passes within a second

    def test_a_later_pass_shows_what_has_changed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "REPORT_INTERVAL_NS", 0)
        worker = run_passes(GrowingBackend(), 20)

        assert worker.device is not None
        assert worker.device.memory_used_bytes == 21
