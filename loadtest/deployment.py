"""What ``--target`` means: a server that listens somewhere, or one that is started for the test.

Decides how an address becomes targets, and where the server's own metrics are. Must never know a scenario's load.

    HOST:PORT      a deployment of yours
    serve:         ``embedserve serve`` on this machine, for the time of the test
    null:          the same on a model that costs nothing: the ceiling of the service path
    echo:          a bare grpc.aio server that sends as many bytes: the ceiling of gRPC
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from loadtest import scrape
from loadtest.drive import MakeTarget, TargetFailed
from loadtest.native.volley import Unavailable
from loadtest.nullmodel import write_checkpoint
from loadtest.scenario import Scenario
from loadtest.server import Server, echo_server, null_server, product
from loadtest.target import Target
from loadtest.targets.embedserve import AioTarget, NativeTarget, Options, WireTarget

__all__ = ["AUTO", "CLIENTS", "STARTED", "Deployment", "Reach", "deployed"]

STARTED: Final = ("serve:", "null:", "echo:")
CLIENTS: Final[dict[str, Callable[[Options], Target]]] = {
    "native": NativeTarget,
    "wire": WireTarget,
    "grpc": AioTarget,
}
AUTO: Final = "auto"
"""The one that takes least: ``native`` where it can be built and there is no TLS, ``wire`` otherwise."""
SCRAPE_S: Final = 5.0
NULL_DIMENSION: Final = 384
"""all-MiniLM-L6-v2's: the default model's answers have so many floats a vector."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How calls get to the server, whichever it is."""

    client: str = AUTO
    """``AUTO`` or a key of ``CLIENTS``."""
    connections: int = 4
    metadata: tuple[tuple[str, str], ...] = ()
    tls: bool = False
    ca_file: str | None = None
    metrics: str | None = None
    """Where the server's metrics are, such as ``http://localhost:8001/metrics``; absent: not looked at."""
    settings: tuple[str, ...] = ()
    """For ``serve:`` and ``null:``, as to ``embedserve serve``."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A server that can be driven."""

    name: str
    make_target: MakeTarget
    metrics_url: str | None
    server: Server | None = None
    """Where it was started for the test."""
    client: str = ""
    """Which of ``CLIENTS`` sends the calls."""

    def sample(self) -> dict[str, float]:
        """Its metrics now; nothing where they are not known. Raises ``TargetFailed`` when nobody answers there."""
        if self.metrics_url is None:
            return {} if self.server is None else {"process_cpu_time_seconds_total": self.server.cpu_ns() / 1e9}
        try:
            return scrape.samples(self.metrics_url, SCRAPE_S)
        except OSError as error:
            raise TargetFailed(f"no metrics at {self.metrics_url}: {error}") from None

    def lost(self) -> str | None:
        """A sentence when nobody takes a connection there any more, ``None`` where somebody does."""

        async def look() -> None:
            target = self.make_target()
            try:
                await target.open()
            finally:
                await target.close()

        try:
            asyncio.run(look())
        except ConnectionError as error:
            return f"the server was lost: after the run {error}"
        return None

    def difference(self, before: dict[str, float]) -> dict[str, Any]:
        """What happened in it since ``before``; an empty dict where its metrics are not known."""
        return scrape.difference(before, self.sample())


@contextlib.contextmanager
def deployed(spec: str, scenario: Scenario, reach: Reach) -> Iterator[Deployment]:
    """The server that ``spec`` names; one that is started ends with the block.

    Raises:
        TargetFailed: ``spec`` is none of the forms above, or the scenario asks for what the target has not.
    """
    with contextlib.ExitStack() as stack:
        server = _started(spec, scenario, reach, stack) if spec in STARTED else None
        if server is None and not _is_address(spec):
            raise TargetFailed(f"a target is HOST:PORT or one of {', '.join(STARTED)}, not {spec!r}")
        address = spec if server is None else server.target
        options = Options(
            address=address,
            method=scenario.method,
            connections=reach.connections,
            metadata=reach.metadata,
            tls=reach.tls and server is None,
            ca_file=reach.ca_file,
        )
        metrics = reach.metrics
        if server is not None:
            metrics = f"http://{server.ready['operations']}/metrics" if "operations" in server.ready else None
        client = _client(reach.client, options)
        yield Deployment(spec, partial(CLIENTS[client], options), metrics, server, client)


def _client(wanted: str, options: Options) -> str:
    """The client to use. It is tried here once, so that what it needs is built before clients are begun."""
    if wanted not in (AUTO, "native"):
        return wanted
    try:
        NativeTarget(options)
    except Unavailable as why:
        if wanted == "native":
            raise TargetFailed(str(why)) from None
        return "wire"
    return "native"


def _started(spec: str, scenario: Scenario, reach: Reach, stack: contextlib.ExitStack) -> Server:
    # Its log has a line for each call, which nobody wants between a table and a bar.
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    log = folder / "server.log"
    if spec == "serve:":
        return stack.enter_context(product(*reach.settings, log=log))
    if spec == "null:":
        checkpoint = write_checkpoint(folder / "null-384", NULL_DIMENSION)
        return stack.enter_context(null_server(checkpoint, *reach.settings, log=log))
    if scenario.method != "embed":
        raise TargetFailed("echo: answers Embed only; choose a scenario whose method is embed")
    return stack.enter_context(echo_server(scenario.texts.per_call, NULL_DIMENSION))


def _is_address(spec: str) -> bool:
    host, _, port = spec.rpartition(":")
    return bool(host) and port.isdigit() and 0 < int(port) < 65_536
