"""A collector that is gone or silent costs neither a request nor the shutdown more than its limit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.integration.telemetry.collector import free_port

LIMIT_S = 1.0
SLACK_S = 1.5
"""The interpreter's own exit, on a loaded machine."""

PROGRAM = f"""
import asyncio, json, time
from embedserve.telemetry.settings import TelemetrySettings
from embedserve.telemetry.setup import setup_telemetry
from tests.integration.telemetry.traffic import ride_together

telemetry = setup_telemetry(TelemetrySettings())

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

async def serve():
    worst, filled = 0.0, 0
    for number in range(3000):
        if number == 1500:
            filled = resident()
        begun = time.perf_counter()
        ride_together(telemetry, [[], []])
        worst = max(worst, time.perf_counter() - begun)
        await asyncio.sleep(0)
    return worst, resident() - filled

worst, grown = asyncio.run(serve())
begun = time.monotonic()
sent = telemetry.shutdown({LIMIT_S})
told = {{"worst_s": worst, "shutdown_s": time.monotonic() - begun, "sent": sent, "grown": grown}}
print(json.dumps(told), flush=True)
"""


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield listener.getsockname()[1]


@pytest.fixture(params=["gone", "silent"])
def dead_port(request: pytest.FixtureRequest, silent_port: int) -> int:
    return silent_port if request.param == "silent" else free_port()


@pytest.mark.process
@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
class TestDeadCollector:
    def test_shutdown_is_bounded_and_requests_do_not_wait(self, dead_port: int, protocol: str) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(["service", "."]),
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{dead_port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_TRACES_SAMPLER": "always_on",
            "OTEL_BSP_SCHEDULE_DELAY": "10",
        }
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            shut_down = time.monotonic()
            process.communicate(timeout=30)
            exit_s = time.monotonic() - shut_down

        assert told["shutdown_s"] < LIMIT_S + 0.5
        assert exit_s < SLACK_S
        assert not told["sent"]
        # Two calls and a pass: 0.1 ms of work. A wait for the collector would be seconds, a turn of a thread 5 ms.
        assert told["worst_s"] < 0.25
        # 4,500 records came after the queue of 2,048 was full. Kept, they would be some 10 MB.
        assert told["grown"] < 3 << 20
        assert process.returncode == 0
