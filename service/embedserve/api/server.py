"""The gRPC server itself: its channel options and the addresses that it listens on.

Decides what the transport allows before any handler runs. Must never know a service. Every option of gRPC Core that has
a bearing on safety is set here, so that no default of a new version changes it silently.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from embedserve.errors import StartupError

__all__ = ["ServerOptions", "bind", "build_server"]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Limits of the transport. Each field is a setting of the same name under ``server``."""

    so_reuseport: bool = False
    """Let several processes listen on one port. Off: a second server on a port then fails instead of taking half the
    connections silently, which is gRPC's default."""
    max_receive_message_bytes: int = 16 << 20
    """One request, also after decompression; gRPC's own 4 MiB would refuse 16384 texts of 300 bytes."""
    max_send_message_bytes: int = 4 << 20
    """One answer: what clients accept by default."""
    max_metadata_bytes: int = 16 << 10
    """All headers of one call; above it gRPC answers RESOURCE_EXHAUSTED."""
    max_concurrent_streams: int = 1024
    """Calls at once on one connection; Core has no limit by default, and would run whatever one client sends."""
    max_pending_calls: int = 16_384
    """Calls that gRPC Core holds until the event loop takes them; from twice as many on it drops them all. Core's own
    figures are 1000 and 3000, and a dropped call ends with CANCELLED, which no client retries and nothing counts. The
    guard turns a call away in some 50 us, with a reason and a hint: these are 0.8 s of that, some 200 MB of memory."""
    keepalive_time_ms: int = 60_000
    """A connection this long without a frame is pinged."""
    keepalive_timeout_ms: int = 20_000
    """A ping this long without an answer ends the connection."""
    keepalive_permit_without_calls: bool = True
    """Ping, and let clients ping, when no call is running: load balancers drop silent connections."""
    min_ping_interval_ms: int = 10_000
    """Clients that ping more often than this are sent away (GOAWAY, too_many_pings)."""
    max_connection_idle_ms: int = 300_000
    """A connection this long without a call is closed."""
    max_connection_age_ms: int = 600_000
    """A connection this old is asked to come back (GOAWAY; 10 % jitter, gRFC A9): spreads clients over new servers
    behind a balancer of connections, and ends a connection whose request never arrives whole."""
    max_connection_age_grace_ms: int = 60_000
    """How long its running calls may then take."""


def channel_options(options: ServerOptions) -> tuple[tuple[str, int], ...]:
    """``options`` under the names of gRPC Core's ``channel_arg_names.h``."""
    return (
        ("grpc.so_reuseport", int(options.so_reuseport)),
        ("grpc.max_receive_message_length", options.max_receive_message_bytes),
        ("grpc.max_send_message_length", options.max_send_message_bytes),
        ("grpc.max_metadata_size", options.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", options.max_metadata_bytes),
        ("grpc.max_concurrent_streams", options.max_concurrent_streams),
        ("grpc.server.max_pending_requests", options.max_pending_calls),
        ("grpc.server.max_pending_requests_hard_limit", 2 * options.max_pending_calls),
        ("grpc.keepalive_time_ms", options.keepalive_time_ms),
        ("grpc.keepalive_timeout_ms", options.keepalive_timeout_ms),
        ("grpc.keepalive_permit_without_calls", int(options.keepalive_permit_without_calls)),
        ("grpc.http2.min_ping_interval_without_data_ms", options.min_ping_interval_ms),
        ("grpc.max_connection_idle_ms", options.max_connection_idle_ms),
        ("grpc.max_connection_age_ms", options.max_connection_age_ms),
        ("grpc.max_connection_age_grace_ms", options.max_connection_age_grace_ms),
    )


def build_server(options: ServerOptions, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> grpc.aio.Server:
    """A server that listens nowhere yet. ``interceptors`` outermost first.

    ``maximum_concurrent_rpcs`` stays unset: it refuses without details or a retry hint, and admission is ours. Answers
    are not compressed: vectors do not compress, and it costs more than the bytes.
    """
    return grpc.aio.server(interceptors=tuple(interceptors), options=channel_options(options))


def bind(
    server: grpc.aio.Server, addresses: Sequence[str], credentials: grpc.ServerCredentials | None = None
) -> list[int]:
    """Listen on every address (``host:port``, ``[v6]:port``, ``unix:path``), with TLS if ``credentials`` are given.

    Returns the port of each, chosen by the system where 0 is asked for, 1 for unix sockets. Raises ``StartupError``
    that names the address when one is taken or wrong.
    """
    ports = []
    for address in addresses:
        _refuse_live_socket(address)
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise StartupError(
                f"cannot listen on {address!r}: the address is taken, not of this machine, or not allowed"
            ) from error
        asked = address.rpartition(":")[2]
        if asked.isdecimal() and int(asked) not in {0, port}:  # gRPC takes a port modulo 65536
            raise StartupError(f"cannot listen on {address!r}: {asked} is not a port")
        ports.append(port)
    return ports


def _refuse_live_socket(address: str) -> None:
    """Fail when somebody answers on a unix socket: gRPC would unlink it and take its clients over in silence.

    A socket file that nobody answers on is what a killed process leaves behind, and is replaced.
    """
    if not address.startswith("unix:"):
        return
    path = Path(address.removeprefix("unix:").removeprefix("//"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.settimeout(1)
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except OSError as error:
            raise StartupError(f"cannot listen on {address!r}: {error.strerror or error}") from error
    raise StartupError(f"cannot listen on {address!r}: another process is listening there")
