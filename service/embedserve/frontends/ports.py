"""The port that all front ends listen on, held before any of them does.

Decides which port it is where 0 is asked for, and that nobody else has it. Must never know gRPC. With SO_REUSEPORT a
second deployment that was started by mistake would take half of the connections in silence: so the port is bound
without it first, and shared only then. A socket that is bound and does not listen gets no connections.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from embedserve.address import split_address
from embedserve.errors import StartupError

__all__ = ["hold_ports"]


def hold_ports(addresses: Sequence[str], *, shared: bool) -> tuple[list[socket.socket], tuple[str, ...]]:
    """Sockets that hold ``addresses`` until they are closed, and the addresses with the ports that they got.

    ``shared``: other processes may have them too. Raises ``StartupError`` that names the address when one is taken.
    """
    held: list[socket.socket] = []
    bound: list[str] = []
    try:
        for address in addresses:
            one = _hold(address, shared=shared)
            held.append(one)
            bound.append(f"{address.rpartition(':')[0]}:{one.getsockname()[1]}")
    except BaseException:
        for one in held:
            one.close()
        raise
    return held, tuple(bound)


def _hold(address: str, *, shared: bool) -> socket.socket:
    host, port = split_address(address)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        holder = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartupError(f"cannot listen on {address!r}: {error.strerror or error}") from error
    try:
        # A connection of the last process that is not quite closed (TIME_WAIT) must not keep this one from its port.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(place)
        # From here on, for those who come after us.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError as error:
        holder.close()
        raise StartupError(f"cannot listen on {address!r}: {error.strerror or error}") from error
    return holder
