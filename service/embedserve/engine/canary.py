"""A known text on its way through everything, so that silence is not taken for health.

Decides when one is sent and what its vector must be: what the same text gave right after warm-up. An idle server asks
its device nothing, and would learn of a lost one from its next caller. A device that computes wrong numbers raises
nothing at all. Must never know batches, threads or who is told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from embedserve.engine.wall import sentence
from embedserve.errors import EmbedServeError, EngineFailed, Refusal, StartupError

__all__ = ["CANARY_TEXT", "Canary", "CanarySettings"]

CANARY_TEXT: Final = "The quick brown fox jumps over the lazy dog."
COSINE_MIN: Final = 0.99
"""Batches of other shapes and 8 bits of mantissa move a vector by less than 0.001; a broken device by much more."""
LATE_NS: Final = 100_000_000
"""A timeout that comes later than this says that the process was stopped, or its loop was: it proves nothing."""


@dataclass(frozen=True, slots=True)
class CanarySettings:
    """``config.Health``'s, in nanoseconds."""

    interval_ns: int = 30_000_000_000
    """Time without a good pass after which one is sent; 0: never, but for the one of the start."""
    timeout_ns: int = 5_000_000_000


class Canary:
    """Sends the known text when no pass has ended well for a while. One timer; lives on the event loop."""

    def __init__(
        self,
        settings: CanarySettings,
        *,
        send: Callable[[], Awaitable[npt.NDArray[np.float32]]],
        last_good_ns: Callable[[], int],
        on_outcome: Callable[[str], None],
        on_wrong: Callable[[str], None],
        on_overdue: Callable[[int], None],
    ) -> None:
        """``send`` gives the text's vector and may be cancelled; ``last_good_ns`` is when a pass last ended well.

        ``on_wrong`` is told why the device cannot be trusted, ``on_overdue`` since when nothing at all has come back,
        and ``on_outcome`` each outcome: ``ok``, ``timed_out``, ``refused`` or ``wrong``.
        """
        self._settings = settings
        self._send = send
        self._last_good_ns = last_good_ns
        self._on_outcome = on_outcome
        self._on_wrong = on_wrong
        self._on_overdue = on_overdue
        self._reference: npt.NDArray[np.float32] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def first(self, dimension: int, timeout_ns: int) -> None:
        """Learn the vector. Raises ``StartupError`` where none comes, or none that can be served."""
        try:
            async with asyncio.timeout(timeout_ns / 1e9):
                vector = await self._send()
        except TimeoutError:
            raise StartupError(f"the first text had no answer within {timeout_ns / 1e9:g} s (health.hang_ms)") from None
        except EmbedServeError as error:
            raise StartupError(f"the first text could not be embedded: {error}") from error
        if vector.shape != (dimension,) or not np.isfinite(vector).all() or not np.linalg.norm(vector) > 0:
            raise StartupError("the vector of the first text is zero, not finite or of a wrong dimension")
        self._reference = vector.copy()

    def judge(self, vector: npt.NDArray[np.float32]) -> str | None:
        """What is wrong with the known text's vector."""
        known = self._reference
        if known is None:
            return None if np.isfinite(vector).all() else "its vector is not finite"
        if vector.shape != known.shape:
            return f"its vector has the shape {vector.shape}, after warm-up it had {known.shape}"
        if not np.isfinite(vector).all():
            return "its vector is not finite"
        cosine = float(vector @ known) / max(float(np.linalg.norm(vector) * np.linalg.norm(known)), 1e-30)
        return None if cosine >= COSINE_MIN else f"its vector has the cosine {cosine:.4f} to the one after warm-up"

    def start(self) -> None:
        """Watch from now on."""
        if self._settings.interval_ns:
            self._arm(self._settings.interval_ns)

    def stop(self) -> None:
        """Send no more; one that is on its way leaves the queue."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _arm(self, wait_ns: int) -> None:
        self._timer = asyncio.get_running_loop().call_later(wait_ns / 1e9, self._due)

    def _due(self) -> None:
        quiet_ns = time.monotonic_ns() - self._last_good_ns()
        if quiet_ns < self._settings.interval_ns:
            self._arm(self._settings.interval_ns - quiet_ns)
            return
        self._task = asyncio.get_running_loop().create_task(self._try())

    async def _try(self) -> None:
        """Send one, say what came of it, and set the next."""
        begun = time.monotonic_ns()
        next_ns = self._settings.interval_ns
        try:
            outcome = await self._outcome(begun)
        except Exception as broken:  # noqa: BLE001 - a task that nobody waits for: this is its wall
            self._on_wrong(f"the canary broke: {sentence(broken)}")
            return
        if outcome is None:
            return
        if outcome != "ok":
            next_ns = min(next_ns, self._settings.timeout_ns)
        self._on_outcome(outcome)
        self._task = None
        self._arm(next_ns)

    async def _outcome(self, begun: int) -> str | None:
        """What came of one that was sent at ``begun``; ``None`` where nothing more is to be sent."""
        timeout_ns = self._settings.timeout_ns
        try:
            async with asyncio.timeout(timeout_ns / 1e9):
                vector = await self._send()
        except TimeoutError:
            # Other passes ended well meanwhile: a long queue, not a silent device.
            if time.monotonic_ns() - begun - timeout_ns < LATE_NS and self._last_good_ns() < begun:
                self._on_overdue(begun)
            return "timed_out"
        except Refusal:
            return "refused"
        except EngineFailed:
            return None
        except EmbedServeError as error:
            wrong: str | None = str(error)
        else:
            wrong = self.judge(vector)
        if wrong is None:
            return "ok"
        self._on_outcome("wrong")
        self._on_wrong(f"a text that is known to be good went wrong: {wrong}")
        return None
