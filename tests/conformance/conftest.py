"""One healthy server over fakes, in this process."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from embedserve.testing import FaultPlan, FaultyBackend
from embedserve.testing.server import InProcessServer, serving
from tests.integration.server.calls import until
from tests.log_fixtures import silent_log

__all__ = ["silent_log"]

PATIENT = {"health.stall_ms": "600000", "health.hang_ms": "1200000"}


@pytest.fixture
async def server() -> AsyncIterator[InProcessServer]:
    """Afterwards no call is in flight."""
    async with serving() as made:
        yield made
        await until(lambda: made.guard.in_flight == 0)


@contextlib.asynccontextmanager
async def sleeping(**settings: Any) -> AsyncIterator[InProcessServer]:
    """A server whose device does not answer before ``plan.gate`` is set, and which does not mind that it hangs."""
    plan = FaultPlan()
    plan.gate.clear()
    async with serving(FaultyBackend(plan), settings=PATIENT | settings) as made:
        yield made
        plan.gate.set()
        await until(lambda: made.guard.in_flight == 0)
