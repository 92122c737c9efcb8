"""Addresses to listen on or to call: ``host:port``, ``[ipv6]:port`` and ``unix:/path``.

Decides what a well-formed address is and when two of them collide. Must never know sockets or gRPC: nothing is resolved
or bound here.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["addresses_collide", "bound_addresses", "listens", "listens_once", "split_address", "split_addresses"]

PORT_MAX = 65535
WILDCARDS = frozenset({"0.0.0.0", "[::]"})  # noqa: S104 (compared with, never bound)


def split_address(address: str) -> tuple[str, int]:
    """Host and port; ``("unix:/path", 0)`` for a socket. Raises ``ValueError`` that says what is allowed."""
    if address.startswith("unix:"):
        if not address.removeprefix("unix:").startswith("/"):
            raise ValueError(f"{address!r} needs an absolute path, as in unix:/run/embedserve.sock")
        return address, 0
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > PORT_MAX:
        raise ValueError(f"{address!r} is not host:port with a port from 0 to {PORT_MAX}, nor unix:/path")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{address!r} has an IPv6 host without brackets; write it as in [::1]:50051")
    if any(character.isspace() for character in host):
        raise ValueError(f"{address!r} has a space in its host")
    return host, int(port)


def split_addresses(addresses: str) -> tuple[str, ...]:
    """The addresses of a comma-separated list. Raises ``ValueError`` where one is wrong, missing or repeated."""
    parts = tuple(part.strip() for part in addresses.split(","))
    for part in parts:
        split_address(part)
    if len(set(parts)) < len(parts):
        raise ValueError(f"{addresses!r} names one address twice")
    return parts


def listens(addresses: str) -> str:
    """``addresses`` itself, if a server could listen on all of them. Raises ``ValueError`` otherwise."""
    split_addresses(addresses)
    return addresses


def listens_once(address: str) -> str:
    """``address`` itself, if it is one ``host:port``. Raises ``ValueError`` otherwise."""
    if address.startswith("unix:") or "," in address:
        raise ValueError("it listens on one port only")
    split_address(address)
    return address


def addresses_collide(one: str, other: str) -> bool:
    """Whether both ask for the same port of the same host; port 0 asks for any free one and never collides."""
    (host, port), (other_host, other_port) = split_address(one), split_address(other)
    if host.startswith("unix:") or other_host.startswith("unix:"):
        return host == other_host
    same_host = host == other_host or not WILDCARDS.isdisjoint({host, other_host})
    return same_host and port == other_port != 0


def bound_addresses(asked: tuple[str, ...], ports: Sequence[int]) -> tuple[str, ...]:
    """The addresses as they are: port 0 replaced by what the system chose."""
    return tuple(
        address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
        for address, port in zip(asked, ports, strict=True)
    )
