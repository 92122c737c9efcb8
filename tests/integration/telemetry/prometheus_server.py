"""A real Prometheus, and its HTTP API."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from tests.integration.telemetry.collector import READY_S, free_port, running, wait_for_port

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
JOB = "embedserve"


@contextmanager
def scraping(targets: Sequence[str], folder: Path, rules: Sequence[Path] = (), *, every: str = "1s") -> Iterator[str]:
    """The URL of a Prometheus that scrapes ``targets`` as one job and evaluates ``rules``, both ``every`` so often.

    It looks for its targets 5 s after its start (``updatert`` of its discovery manager), whatever it is told: who needs
    it starts it early, or once.
    """
    assert PROMETHEUS is not None
    config = folder / "prometheus.yml"
    config.write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
                "rule_files": [str(path) for path in rules],
                "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": list(targets)}]}],
            }
        )
    )
    port = free_port()
    command = [
        PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage",
    ]  # fmt: skip
    with running(command, folder / "prometheus.log") as process:
        wait_for_port(port, process)
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url)
        yield url


def _wait_until_ready(url: str) -> None:
    """Until Prometheus has opened its storage; before, it answers 503 to everything."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with suppress(urllib.error.HTTPError), urllib.request.urlopen(f"{url}/-/ready", timeout=5):
            return
        time.sleep(0.05)
    raise AssertionError(f"{url} is not ready after {READY_S} s")


def ask_now(url: str, path: str, **parameters: str) -> Any:
    """The data of one API call. Fails with Prometheus's own words where it refuses the query."""
    try:
        with urllib.request.urlopen(f"{url}{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{parameters}: {error.read().decode()}") from None


def ask(url: str, path: str, **parameters: str) -> list[dict[str, Any]]:
    """The data of one API call, once there is some."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        data = ask_now(url, path, **parameters)
        found: list[dict[str, Any]] = data["result"] if isinstance(data, dict) else data
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"Prometheus has nothing for {parameters}")
