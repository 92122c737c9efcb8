"""What is asked over HTTP of several engines, answered in the supervisor.

Decides what the probes say of all engines together, whom the metrics and the page are asked of, and when an engine
process that says nothing is to be ended. Must never know calls or front ends. Where there is one engine its own process
opens this port; of several none can, because the one that stands still would take all others out of their balancer.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace

from pydantic import TypeAdapter

from embedserve.config import Config
from embedserve.engine.load import NO_LOAD, LoadReport, add_loads
from embedserve.errors import NotServing
from embedserve.frontends import frames
from embedserve.frontends.host import ASK_S
from embedserve.frontends.processes import ALONE, WITH_FRONT_ENDS
from embedserve.frontends.watch import EngineWatch
from embedserve.http.operations import OperationsPort
from embedserve.lifecycle import State
from embedserve.snapshot import EngineFacts, Snapshot
from embedserve.telemetry.exposition import merge_expositions
from embedserve.wiring import stall_limits

__all__ = ["Operations"]

SHOW_S = 2 * ASK_S
"""An engine process asks the front ends first, and waits ``ASK_S`` for them."""
SCRAPE_S = 3 * SHOW_S
"""Two that do not answer before one that does; Prometheus waits 10 s unless told otherwise."""
METRICS_FORM = "text/plain; version=0.0.4; charset=utf-8"
"""Where no engine process answers there are no series, in the plain form."""
_SNAPSHOT = TypeAdapter(Snapshot)


class Operations:
    """The port, and an eye on each engine process. Lives on the supervisor's event loop."""

    def __init__(
        self,
        config: Config,
        *,
        state: Callable[[], State],
        on_hung: Callable[[str, str], None],
        on_change: Callable[[], None],
    ) -> None:
        """``state`` is what the supervisor knows: STARTING until all are ready, SERVING, DRAINING or FAILED.

        ``on_hung`` is told the name of an engine process that has said nothing for ``health.hang_ms``, and why it is
        given up; ``on_change`` that an engine is ready.
        """
        self._config = config
        self._state = state
        self._on_hung = on_hung
        self._on_change = on_change
        self._watches: list[EngineWatch] = []
        self._starting: list[asyncio.Task[object]] = []
        self._questions = itertools.count(1)
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        metrics = config.telemetry.prometheus
        self._port = OperationsPort(
            alive=lambda: state() is not State.FAILED,
            ready=lambda: self._lifecycle() is State.SERVING,
            load=self.load,
            render_metrics=self._render if metrics else None,
            lifecycle_state=lambda: self._lifecycle().value,
            snapshot=self._snapshot if config.operations.statusz else None,
        )
        self._loop = asyncio.get_running_loop()

    async def open(self) -> str | None:
        """Bind, before any engine is there: probes must meet a server that loads. Raises ``StartupError``."""
        operations = self._config.operations
        return await self._port.start(operations.address) if operations.enabled else None

    def watch(self, name: str, descriptor: int) -> None:
        """Hear the engine process ``name``; ``descriptor`` is this process's end."""
        one = EngineWatch(name, descriptor, stall_limits(self._config), self)
        self._watches.append(one)
        task: asyncio.Task[object] = self._loop.create_task(one.start())
        task.add_done_callback(self._started)
        self._starting.append(task)

    def _started(self, task: asyncio.Task[object]) -> None:
        if not task.cancelled():
            task.exception()  # who ends before it is ready is the supervisor's to tell of
        self._on_change()

    @property
    def ready(self) -> bool:
        """Whether every engine has said what it serves."""
        return all(one.identity is not None for one in self._watches)

    async def close(self) -> None:
        """Close the port and look no more."""
        for task in self._starting:
            task.cancel()
        for one in self._watches:
            one.stop()
        await self._port.stop()

    def load(self) -> LoadReport:
        """Of all engines together."""
        load = add_loads([one.load for one in self._watches] or [NO_LOAD])
        if self._state() in {State.SERVING, State.DRAINING}:  # while they drain, engines say themselves what they take
            return load
        return replace(load, state="not_serving", accepting_requests=False)

    def _lifecycle(self) -> State:
        state = self._state()
        if state is State.SERVING and not any(one.usable for one in self._watches):
            return State.STALLED
        return state

    # ------------------------------------------------------------------------------------------------- as ``Watcher``

    def take(self, watch: EngineWatch, kind: int, call_id: int, body: bytes) -> None:  # noqa: ARG002 - the question says
        """An answer, in time or not."""
        if kind == frames.SHOWN and (asked := self._asked.get(call_id)) is not None and not asked.done():
            asked.set_result(body)

    def see(self, watch: EngineWatch) -> None:
        """Read when somebody asks."""

    def lose(self, watch: EngineWatch) -> None:
        """Its end is heard of otherwise; but who says nothing does not end."""
        if watch.hung:
            self._on_hung(watch.name, watch.failure or "")

    # -------------------------------------------------------------------------------------------------------- questions

    async def _ask(self, watch: EngineWatch, kind: int, body: bytes, within_s: float = SHOW_S) -> bytes | None:
        """Its answer; ``None`` where there is none in time."""
        question = next(self._questions)
        asked = self._asked[question] = self._loop.create_future()
        watch.send(kind, question, body)
        try:
            async with asyncio.timeout(within_s):
                answer = await asked
        except TimeoutError:
            return None
        finally:
            del self._asked[question]
        return None if answer.startswith(frames.UNSHOWN) else answer

    def _answering(self) -> list[EngineWatch]:
        """Who can be asked, who was heard last first: one that has just stopped is not known to be silent yet."""
        return sorted((one for one in self._watches if one.usable), key=lambda one: -one.heard_ns)

    def _render(self, accept_header: str) -> tuple[str, bytes]:
        """The metrics of all processes that answer, in a scraper's thread."""
        header = accept_header.encode(errors="surrogateescape")
        asked = asyncio.run_coroutine_threadsafe(self._scrape(header), self._loop)
        given = [answer.split(b"\n", 1) for answer in asked.result(SCRAPE_S)]
        content_type = given[0][0].decode() if given else METRICS_FORM
        return content_type, merge_expositions([("", text) for _, text in given])

    async def _scrape(self, accept_header: bytes) -> list[bytes]:
        """Of each engine, and with one of them of the front ends; with the next where that one does not answer."""
        left = self._answering()
        while left:
            first, *left = left
            asked = [self._ask(first, frames.SHOW_METRICS, WITH_FRONT_ENDS + accept_header)]
            asked += [self._ask(one, frames.SHOW_METRICS, ALONE + accept_header, ASK_S) for one in left]
            with_front_ends, *alone = await asyncio.gather(*asked)
            if with_front_ends is not None:
                return [answer for answer in (with_front_ends, *alone) if answer is not None]
            left = [one for one, answer in zip(left, alone, strict=True) if answer is not None]
        return []

    async def _snapshot(self) -> Snapshot:
        """The page of the first engine that answers, with a line for each. Raises ``NotServing`` where none does."""
        for one in self._watches:
            answer = await self._ask(one, frames.SHOW_PAGE, b"") if one.usable else None
            if answer is not None:
                snapshot = _SNAPSHOT.validate_json(answer)
                engines = tuple(_facts(each, shown=each is one) for each in self._watches)
                state = self._lifecycle().value
                return replace(snapshot, process=replace(snapshot.process, state=state, engines=engines))
        raise NotServing("no engine process answers", reason="NOT_SERVING", retry_after_ms=None)


def _facts(watch: EngineWatch, *, shown: bool) -> EngineFacts:
    load, state = watch.load, watch.load.state
    if not watch.usable:
        state = "lost" if watch.failure is not None else "silent" if watch.identity is not None else "starting"
    return EngineFacts(
        name=watch.name,
        device=watch.identity.device if watch.identity else None,
        state=state,
        held_tokens=load.queued_tokens + load.running_tokens,
        tokens_per_s=load.service_rate_tokens_per_second,
        drain_s=load.estimated_drain_time_ms / 1000,
        shown=shown,
    )
