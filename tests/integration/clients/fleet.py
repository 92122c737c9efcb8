"""What a client has and sees: channels by the published service config, and how often servers were asked."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import grpc

from tests.integration.server.process import ROOT, ServerProcess

SERVICE = "embedserve.v1.EmbeddingService"
CLIENTS = ROOT / "deploy" / "clients"
CONFIG_FILE: Path = CLIENTS / "service_config.json"


def published(**parts: Any) -> dict[str, Any]:
    """The published service config, with other ``parts``; ``None`` leaves one out."""
    config = {**json.loads(CONFIG_FILE.read_text(encoding="utf-8")), **parts}
    return {part: value for part, value in config.items() if value is not None}


def connect(
    *addresses: str, config: dict[str, Any] | None = None, options: tuple[tuple[str, Any], ...] = ()
) -> grpc.aio.Channel:
    """A channel with connections of its own to all ``addresses``."""
    said = json.dumps(published() if config is None else config)
    own = (("grpc.service_config", said), ("grpc.use_local_subchannel_pool", 1), *options)
    return grpc.aio.insecure_channel(f"ipv4:{','.join(addresses)}", options=own)


def metric(server: ServerProcess, name: str, *labels: str) -> float:
    """The sum of the series of ``name`` that have all of ``labels``, as text."""
    with urllib.request.urlopen(f"{server.operations}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith((f"{name} ", f"{name}{{")) and all(label in line for label in labels)
    )


def attempts(server: ServerProcess) -> float:
    """Calls of Embed that have ended here, retries included."""
    return metric(server, "rpc_server_call_duration_seconds_count", f'"{SERVICE}/Embed"')
