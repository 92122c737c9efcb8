"""Pipelines that are closed when their test ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from tests.unit.telemetry.pipeline import Pipeline
from tests.unit.telemetry.pipeline import make_pipeline as make_one


@pytest.fixture
def make_pipeline() -> Iterator[Callable[..., Pipeline]]:
    made: list[Pipeline] = []

    def make(*args: Any, **kwargs: Any) -> Pipeline:
        made.append(make_one(*args, **kwargs))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.exporter.gate.set()
        pipeline.queue.close(10)


@pytest.fixture
def pipeline(make_pipeline: Callable[..., Pipeline]) -> Pipeline:
    return make_pipeline()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No OTEL_* variable of the machine changes a test, and no test's log set-up outlives it."""
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    yield
    structlog.reset_defaults()
