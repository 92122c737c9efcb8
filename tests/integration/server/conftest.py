"""One healthy server over fakes, for tests that change nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import structlog

from embedserve.testing.server import InProcessServer, serving


@pytest.fixture(autouse=True)
def silent_log() -> Iterator[None]:
    """The server's log, without a handler of its own here, is dropped."""
    structlog.configure(processors=[_drop])
    yield
    structlog.reset_defaults()


def _drop(*_: object) -> dict[str, object]:
    raise structlog.DropEvent


@pytest.fixture
async def server() -> AsyncIterator[InProcessServer]:
    async with serving() as made:
        yield made
