"""The operations port: liveness, readiness, load, metrics and a page for people over plain HTTP.

Decides paths and HTTP statuses. Must never know gRPC or the engine's insides: it is given functions. aiohttp rather
than uvicorn, whose main loop wakes ten times a second: an idle server must use no CPU.

    GET /livez         200 while the process can answer; 503 once it has failed. Never depends on load.
    GET /readyz        200 while calls are accepted; 503 while starting, warming, draining or failed.
    GET /health        the fields of GetLoad as JSON; 503 when a request sent now would not be taken.
    GET /metrics       Prometheus text, or OpenMetrics with exemplars when the scraper accepts it.
    GET /statusz       this process at a glance, for people; /statusz.json has the same for machines. Always 200,
                       but for several engines of which none is ready or answers.

Every path answers HEAD too, and nothing can be changed here: other methods get 405.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable

import orjson
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from embedserve.engine.load import LoadReport
from embedserve.errors import NotServing, StartupError
from embedserve.http.statusz.page import CONTENT_SECURITY_POLICY, render
from embedserve.http.statusz.verdict import judge
from embedserve.snapshot import Snapshot

__all__ = ["OperationsPort"]

SHUTDOWN_S = 1.0
"""A scrape that hangs must not hold the exit."""

STATUSZ_OFF = "statusz is off: operations.statusz = false"
GUARDED = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""What a browser is told of everything that shows names: keep nothing, guess nothing, lend it to nobody."""
_PROTOCOL_LOG = logging.getLogger("embedserve.http.protocol")
_PROTOCOL_LOG.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError)))
"""aiohttp's own words, but for those on bytes that are no HTTP: they quote them, and any port scanner sends some."""
_FACTS = dataclasses.fields(Snapshot)


class OperationsPort:
    """The HTTP listener. ``start`` binds, ``stop`` closes."""

    def __init__(
        self,
        *,
        alive: Callable[[], bool],
        ready: Callable[[], bool],
        load: Callable[[], LoadReport],
        render_metrics: Callable[[str], tuple[str, bytes]] | None,
        lifecycle_state: Callable[[], str],
        snapshot: Callable[[], Awaitable[Snapshot]] | None = None,
    ) -> None:
        """``render_metrics(accept_header)`` gives content type and body, and may be called in another thread.

        Without ``snapshot`` there is no page for people; it raises ``NotServing`` where another process has its facts
        and does not answer.
        """
        self._alive = alive
        self._ready = ready
        self._load = load
        self._render = render_metrics
        self._state = lifecycle_state
        self._snapshot = snapshot
        application = web.Application()
        application.add_routes(
            [
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.get("/statusz", self._statusz),
                web.get("/statusz.json", self._statusz_json),
            ]
        )
        self._runner = web.AppRunner(
            application, access_log=None, logger=_PROTOCOL_LOG, shutdown_timeout=SHUTDOWN_S, handle_signals=False
        )

    async def start(self, address: str) -> str:
        """Bind ``host:port`` and return the address with the port that was given. Raises ``StartupError``."""
        host, _, port = address.rpartition(":")
        await self._runner.setup()
        site = web.TCPSite(self._runner, host.strip("[]") or None, int(port), reuse_address=True)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise StartupError(f"operations.address {address} cannot be bound: {error.strerror or error}") from error
        bound = self._runner.addresses[0]
        return f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"

    async def stop(self) -> None:
        """Close the listener and its connections."""
        await self._runner.cleanup()

    async def _livez(self, _request: web.Request) -> web.Response:
        return _text("ok" if self._alive() else "failed", 200 if self._alive() else 503)

    async def _readyz(self, _request: web.Request) -> web.Response:
        return _text("ready" if self._ready() else f"not ready: {self._state()}", 200 if self._ready() else 503)

    async def _health(self, _request: web.Request) -> web.Response:
        load = self._load()
        body = {"status": load.state, **{k: v for k, v in dataclasses.asdict(load).items() if k != "state"}}
        return web.Response(
            body=orjson.dumps(body),
            status=200 if load.accepting_requests else 503,
            content_type="application/json",
            headers={"Cache-Control": "no-store"},
        )

    async def _metrics(self, request: web.Request) -> web.Response:
        if self._render is None:
            return _text("metrics are off: telemetry.prometheus = false", 404)
        accept = request.headers.get("Accept", "")
        # Rendering takes milliseconds; in a thread it shares the GIL but not the event loop's turn.
        content_type, body = await asyncio.get_running_loop().run_in_executor(None, self._render, accept)
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _statusz(self, _request: web.Request) -> web.Response:
        if self._snapshot is None:
            return _text(STATUSZ_OFF, 404)
        # Taken on the event loop, where nothing moves meanwhile; written in a thread, since that takes milliseconds.
        try:
            shown = await self._snapshot()
        except NotServing as nobody:
            return _text(str(nobody), 503)
        page = await asyncio.get_running_loop().run_in_executor(None, render, shown)
        headers = {**GUARDED, "Content-Security-Policy": CONTENT_SECURITY_POLICY}
        return web.Response(text=page, content_type="text/html", headers=headers)

    async def _statusz_json(self, _request: web.Request) -> web.Response:
        if self._snapshot is None:
            return _text(STATUSZ_OFF, 404)
        try:
            snapshot = await self._snapshot()
        except NotServing as nobody:
            return _text(str(nobody), 503)
        body = orjson.dumps({"verdict": judge(snapshot), **{f.name: getattr(snapshot, f.name) for f in _FACTS}})
        return web.Response(body=body, content_type="application/json", headers=GUARDED)


def _text(sentence: str, status: int) -> web.Response:
    return web.Response(text=sentence + "\n", status=status, headers={"Cache-Control": "no-store"})
