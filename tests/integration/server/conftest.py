"""One healthy server over fakes, for tests that change nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from embedserve.testing.server import InProcessServer, serving
from tests.log_fixtures import silent_log

__all__ = ["silent_log"]


@pytest.fixture
async def server() -> AsyncIterator[InProcessServer]:
    async with serving() as made:
        yield made
