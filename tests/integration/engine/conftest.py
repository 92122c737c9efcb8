"""An engine over fake backends: everything real but the model."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from embedserve.engine.call import Call
from embedserve.engine.engine import Engine, EngineSettings
from embedserve.engine.observer import BatchRecord, SilentObserver
from embedserve.engine.stages import Stages
from embedserve.engine.tokenization import TokenizerSettings
from embedserve.errors import StartupError
from embedserve.model.tokenizer import TextTokenizer
from embedserve.scheduling.item import Rejection
from embedserve.scheduling.scheduler import Scheduler
from embedserve.scheduling.settings import SchedulerSettings
from embedserve.testing import FakeBackend, tiny_tokenizer


class RecordingObserver(SilentObserver):
    """Keeps every event."""

    def __init__(self) -> None:
        self.batches: list[BatchRecord] = []
        self.rejections: list[tuple[str, Rejection]] = []
        self.finished: list[tuple[str, Stages]] = []
        self.admissions: list[tuple[int, int]] = []
        self.tokenizations = 0
        self.stalls = 0
        self.canaries: list[str] = []
        self.verdicts: dict[str, int] = {}

    def admitted(self, items: int, tokens: int) -> None:
        self.admissions.append((items, tokens))

    def tokenized(self, texts: int, tokens: int, waited_ns: int, elapsed_ns: int) -> None:
        self.tokenizations += 1

    def stalled(self) -> None:
        self.stalls += 1

    def canary(self, outcome: str) -> None:
        self.canaries.append(outcome)

    def batch_dispatched(self, batch_id: int) -> object | None:
        return batch_id

    def batch_finished(self, record: BatchRecord) -> None:
        self.batches.append(record)

    def rejected(self, rejection: Rejection, *, stage: str) -> None:
        self.rejections.append((stage, rejection))

    def settled(self, verdict: str, items: int) -> None:
        self.verdicts[verdict] = self.verdicts.get(verdict, 0) + items

    def request_finished(self, stages: Stages, *, verdict: str) -> None:
        self.finished.append((verdict, stages))


class Bench:
    """An engine and what it told."""

    def __init__(self, engine: Engine, observer: RecordingObserver, fatal: list[str]) -> None:
        self.engine = engine
        self.observer = observer
        self.fatal = fatal
        self.health: list[str] = []
        """``stall``, ``recovery``: what the engine told of its health."""


def call(*texts: str, **options: object) -> Call:
    return Call(stages=Stages(arrived_ns=time.monotonic_ns()), texts=list(texts), **options)  # type: ignore[arg-type]


def engine_settings(**changes: object) -> EngineSettings:
    values: dict[str, object] = {
        "tokenizer": TokenizerSettings(threads=2, max_pending=64, inline_chars=256, chunk_texts=64),
        "max_requests_in_flight": 4096,
        "batches_in_flight": 2,
        "prepare_ahead_ns": 1_000_000,
        "overlap_ahead_ns": 1_000_000,
        "warm_up_tokens": 128,
        "stream_window_items": 64,
        **changes,
    }
    values["tokenizer"] = values.pop("tokenizing", values["tokenizer"])
    return EngineSettings(**values)  # type: ignore[arg-type]


@asynccontextmanager
async def running(
    backend: FakeBackend | Callable[[], FakeBackend] | None = None,
    *,
    scheduler: SchedulerSettings | None = None,
    policies: tuple[object, ...] = (),
    tokenizer: TextTokenizer | None = None,
    observer: RecordingObserver | None = None,
    **changes: object,
) -> AsyncIterator[Bench]:
    observer = observer or RecordingObserver()
    health: list[str] = []
    fatal: list[str] = []
    made = backend or FakeBackend()
    engine = Engine(
        factory=made if not isinstance(made, FakeBackend) else lambda: made,
        tokenizer=tokenizer or tiny_tokenizer(),
        max_input_length=128,
        scheduler=Scheduler(scheduler or SchedulerSettings(bucket_edges=(16, 32, 64, 128)), policies),  # type: ignore[arg-type]
        settings=engine_settings(**changes),
        observer=observer,
        on_fatal=fatal.append,
        on_stall=lambda _age: health.append("stall"),
        on_recovery=lambda _lasted: health.append("recovery"),
    )
    try:
        await engine.start()
    except StartupError:
        await engine.stop(1.0)
        raise
    try:
        bench = Bench(engine, observer, fatal)
        bench.health = health
        yield bench
    finally:
        assert await engine.stop(5.0)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running() as made:
        yield made
