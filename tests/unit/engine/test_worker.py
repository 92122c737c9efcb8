"""The worker looks at its device while it serves."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from embedserve.engine import worker as module
from embedserve.engine.worker import Part, Pass, PassResult, Worker
from embedserve.model.backend import BatchResult, DeviceLost, DeviceReport, TokenBatch
from embedserve.scheduling.item import Fatal, Succeeded
from embedserve.testing import FakeBackend


class GrowingBackend(FakeBackend):
    """Holds a byte more each time that it is asked, and is compiled after its warm-up."""

    def __init__(self) -> None:
        super().__init__()
        self.reports = 0

    def report(self) -> DeviceReport:
        self.reports += 1
        return DeviceReport("cpu", self.reports, 100, compiled=self.reports > 1, packed=True)


def run_passes(backend: FakeBackend, count: int, told: list[DeviceReport] | None = None) -> Worker:
    """A worker that has run ``count`` passes and ended; ``told`` gets how a compilation went."""
    results: queue.SimpleQueue[PassResult] = queue.SimpleQueue()
    worker = Worker(
        lambda: backend,
        warm_up_tokens=16,
        on_ready=lambda _outcome: None,
        on_result=results.put,
        on_death=lambda death: pytest.fail(str(death)),
        on_compilation=(told if told is not None else []).append,
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


class TestCompilation:
    """The rest of the engine hears once how it went, whenever that is."""

    def test_a_model_that_is_compiled_while_it_serves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "REPORT_INTERVAL_NS", 0)
        told: list[DeviceReport] = []
        run_passes(GrowingBackend(), 5, told)

        assert [report.compiled for report in told] == [True]
        assert told[0].memory_used_bytes == 2, "the first look after a pass, not the one when it was ready"

    def test_a_compilation_that_fails(self) -> None:
        class Uncompiled(FakeBackend):
            def report(self) -> DeviceReport:
                return DeviceReport("cpu", 0, 0, compiled=False, packed=True, compile_s=1.5, compile_failure="no g++")

        told: list[DeviceReport] = []
        run_passes(Uncompiled(), 3, told)

        assert [(report.compile_failure, report.compile_s) for report in told] == [("no g++", 1.5)]

    def test_a_model_that_is_not_to_be_compiled(self) -> None:
        told: list[DeviceReport] = []
        run_passes(FakeBackend(), 3, told)

        assert told == []

    def test_an_idle_server_that_compiles_learns_how_it_went(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a pass: whoever waits for compiled code before sending traffic would wait in vain."""
        monkeypatch.setattr(module, "COMPILATION_LOOK_S", 0.001)

        class Compiling(FakeBackend):
            looks = 0

            def report(self) -> DeviceReport:
                self.looks += 1
                return DeviceReport("cpu", 0, 0, compiled=self.looks > 3, compiling=self.looks <= 3, packed=True)

        told: queue.SimpleQueue[DeviceReport] = queue.SimpleQueue()
        worker = Worker(
            Compiling,
            warm_up_tokens=16,
            on_ready=lambda _outcome: None,
            on_result=lambda _result: None,
            on_death=lambda death: pytest.fail(str(death)),
            on_compilation=told.put,
        )
        worker.start()

        assert told.get(timeout=10).compiled
        assert worker.stop(10)


class MeetingBackend(FakeBackend):
    """Takes two passes at once: none ends before there are two."""

    def __init__(self) -> None:
        super().__init__()
        self.together = threading.Barrier(2, timeout=10)

    @property
    def passes_at_once(self) -> int:
        return 2

    def embed(self, batch: TokenBatch) -> BatchResult:
        begun = time.monotonic_ns()
        self.together.wait()
        result = super().embed(batch)
        return dataclasses.replace(result, times=dataclasses.replace(result.times, start_ns=begun))


class TestTwoPassesAtOnce:
    def test_each_is_reported_once_and_shared_time_counts_once(self) -> None:
        results: queue.SimpleQueue[PassResult] = queue.SimpleQueue()
        worker = quiet_worker(MeetingBackend, results)
        begun = time.monotonic_ns()
        submit(worker, 20)
        told = [results.get(timeout=10) for _ in range(20)]
        took = time.monotonic_ns() - begun

        assert sorted(result.batch_id for result in told) == list(range(20))
        assert all(isinstance(result.outcome, Succeeded) for result in told)
        assert sum(result.shared_ns > 0 for result in told) >= 10, "of each two that met, one"
        assert sum(result.outcome.elapsed_ns for result in told if isinstance(result.outcome, Succeeded)) <= took
        assert worker.stop(10)

    def test_none_begins_once_the_device_is_lost(self) -> None:
        class Losing(MeetingBackend):
            taken_up = 0

            def embed(self, batch: TokenBatch) -> BatchResult:
                self.taken_up += 1
                result = super().embed(batch)
                if batch.ids[0] == 9:
                    raise DeviceLost("gone")
                return result

        backend = Losing()
        results: queue.SimpleQueue[PassResult] = queue.SimpleQueue()
        worker = quiet_worker(lambda: backend, results)
        submit(worker, 1)
        submit(worker, 1, first_id=9)
        outcomes = {type(results.get(timeout=10).outcome) for _ in range(2)}
        worker.stop(10)
        submit(worker, 3)

        assert outcomes == {Succeeded, Fatal}
        assert worker.stop(0)
        assert backend.taken_up == 2

    def test_the_death_of_either_thread_is_told(self) -> None:
        class Dying(MeetingBackend):
            def embed(self, batch: TokenBatch) -> BatchResult:
                super().embed(batch)
                raise KeyboardInterrupt

        deaths: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        worker = quiet_worker(Dying, queue.SimpleQueue(), deaths)
        submit(worker, 2)

        assert [type(deaths.get(timeout=10)) for _ in range(2)] == [KeyboardInterrupt] * 2
        assert worker.stop(10)


def quiet_worker(
    factory: Callable[[], FakeBackend],
    results: queue.SimpleQueue[PassResult],
    deaths: queue.SimpleQueue[BaseException] | None = None,
) -> Worker:
    """One that runs."""
    ready = threading.Event()
    worker = Worker(
        factory,
        warm_up_tokens=16,
        on_ready=lambda _outcome: ready.set(),
        on_result=results.put,
        on_death=lambda death: pytest.fail(str(death)) if deaths is None else deaths.put(death),
        on_compilation=lambda _report: None,
    )
    worker.start()
    assert ready.wait(10)
    return worker


def submit(worker: Worker, count: int, first_id: int = 5) -> None:
    """``count`` passes over one text of three tokens."""
    ids = np.array([first_id, 6, 7], dtype=np.int32)
    for number in range(count):
        worker.submit(Pass(number, [Part(ids, np.array([0, 3]), (0,), True, 0)], rows=1, pad_to=None))
