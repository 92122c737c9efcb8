"""The example clients run as they stand, against two servers of which one is gone; where their language is here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from tests.integration.clients.fleet import CLIENTS, CONFIG_FILE
from tests.integration.server.calls import DIMENSION, expected
from tests.integration.server.process import FAKE, ServerProcess, environment, running

TEXTS = ["hello world", "the text"]
NOBODY = "127.0.0.1:1"
README = (CLIENTS / "README.md").read_text(encoding="utf-8")


def _has_grpc_js() -> bool:
    node = shutil.which("node")
    resolve = "require.resolve('@grpc/grpc-js'), require.resolve('@grpc/proto-loader')"
    return node is not None and not subprocess.run([node, "-e", resolve], capture_output=True, check=False).returncode


COMMANDS = [
    pytest.param((sys.executable, str(CLIENTS / "python" / "embed.py")), id="python"),
    pytest.param(
        ("node", str(CLIENTS / "node" / "embed.js")),
        id="node",
        marks=pytest.mark.skipif(
            not _has_grpc_js(),
            reason="node, or @grpc/grpc-js on its NODE_PATH, is not here: .ci/run has them where npm is",
        ),
    ),
]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running(command=FAKE) as made:
        yield made


def run(command: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments], env=environment(), capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("command", COMMANDS)
class TestExamples:
    """Short programs that people copy."""

    def test_it_prints_each_vector(self, server: ServerProcess, command: tuple[str, ...]) -> None:
        """Though one address of the list answers nobody."""
        done = run(command, f"ipv4:{NOBODY},{server.address}", *TEXTS)
        rows = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]

        assert done.returncode == 0, done.stderr
        assert [row[0] for row in rows] == [DIMENSION, DIMENSION]
        for row, text in zip(rows, TEXTS, strict=True):
            assert np.allclose(row[1:], expected(text)[:3], atol=1e-4)

    def test_it_says_what_is_wrong(self, server: ServerProcess, command: tuple[str, ...]) -> None:
        done = run(command, server.address, "a", "")

        assert done.returncode == 1
        assert done.stdout == ""
        assert "INVALID_ARGUMENT" in done.stderr
        assert "texts[1]" in done.stderr

    def test_it_says_that_nobody_answers(self, server: ServerProcess, command: tuple[str, ...]) -> None:
        done = run(command, f"ipv4:{NOBODY}", "hello")

        assert done.returncode == 1
        assert "UNAVAILABLE" in done.stderr


class TestFiles:
    """What can be said of the examples without running them."""

    @pytest.mark.parametrize("name", ["python/embed.py", "node/embed.js", "go/embed.go"])
    def test_each_reads_the_service_config_and_sets_a_deadline_and_keepalive(self, name: str) -> None:
        source = (CLIENTS / name).read_text(encoding="utf-8")

        assert CONFIG_FILE.name in source
        assert re.search(r"timeout=5|deadline: Date\.now\(\) \+ 5000|context\.WithTimeout", source)
        assert re.search(r"keepalive_time_ms\W+30_?000|Time: 30 \* time\.Second", source)

    @pytest.mark.skipif(shutil.which("gofmt") is None, reason="go is not here")
    def test_the_go_example_parses_and_is_formatted(self) -> None:
        done = subprocess.run(
            ["gofmt", "-l", str(CLIENTS / "go")], capture_output=True, text=True, timeout=30, check=False
        )

        assert (done.returncode, done.stdout) == (0, ""), done.stderr

    def test_the_readmes_links_lead_somewhere(self) -> None:
        links = re.findall(r"\]\(([\w./]+)\)", README)

        assert {"service_config.json", "python/embed.py", "node/embed.js", "go/embed.go"} <= set(links)
        assert all((CLIENTS / link).exists() for link in links)
