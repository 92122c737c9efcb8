"""What the pages tell people to type works: clients and commands run against a server, the rest exists."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import click
import pytest

from embedserve import cli
from embedserve.api.encoding import Encoding, row_bytes
from embedserve.api.wire import max_texts_unary
from embedserve.config import Config
from embedserve.settings import render, settings_of
from embedserve.testing.backends import FakeBackend, fake_identity
from embedserve.testing.server import InProcessServer, serving
from tests.log_fixtures import silent_log  # noqa: F401 - an autouse fixture of this module

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "service" / "embedserve"
PAGES = sorted(ROOT.glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
SAID_ADDRESS = "localhost:50051"
GRPCURL = shutil.which("grpcurl", path=str(Path(sys.executable).parent)) or shutil.which("grpcurl")
LIMIT_S = 30.0
DIMENSION = fake_identity().dimension


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def _commands(page: str) -> list[str]:
    """Every line of a shell block and every span of code that begins with a word, without comments."""
    lines = [line for block in _blocks(page, "sh") for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in (*lines, *re.findall(r"`([a-zA-Z][^`\n]*)`", prose))]


def _has_grpc_js() -> bool:
    node = shutil.which("node")
    if node is None:
        return False
    return not subprocess.run(
        [node, "-e", "require.resolve('@grpc/grpc-js'), require.resolve('@grpc/proto-loader')"],
        capture_output=True, check=False,
    ).returncode  # fmt: skip


@pytest.fixture
async def server() -> AsyncIterator[InProcessServer]:
    async with serving(FakeBackend(), settings={"server.reflection": "true"}) as made:
        yield made


async def _output(server: InProcessServer, *command: str, cwd: Path = ROOT) -> str:
    """What ``command`` prints when it is told the real address; it must end well."""
    told = [word.replace(SAID_ADDRESS, server.address) for word in command]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "service")}
    process = await asyncio.create_subprocess_exec(
        *told, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


class TestClients:
    """Both are at most ten lines, and answer."""

    async def test_python(self, server: InProcessServer) -> None:
        (block,) = _blocks(README, "python")

        assert len(block.splitlines()) <= 10
        assert (await _output(server, sys.executable, "-c", block)).startswith(f"(2, {DIMENSION}) fake/model ")

    @pytest.mark.skipif(
        not _has_grpc_js(), reason="node, or @grpc/grpc-js on its NODE_PATH, is not here: .ci/run has them where npm is"
    )
    async def test_node(self, server: InProcessServer) -> None:
        (block,) = _blocks(README, "js")

        assert await _output(server, "node", "-e", block) == f"2 {DIMENSION} fake/model\n"

    def test_ci_installs_what_node_needs(self) -> None:
        """Otherwise the test above is skipped there, and nobody sees it."""
        (told,) = re.findall(r"`npm install ([^`]+)`", README)
        script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
        installed = dict(re.findall(r"(@grpc/[a-z-]+)@(\d+\.\d+\.\d+)", script))

        assert set(installed) == set(told.split())
        assert re.search(r"^  export NODE_PATH=", script, re.MULTILINE)

    def test_node_is_ten_lines_and_names_what_the_proto_has(self) -> None:
        """Whether node is here or not: the path, the service, the fields."""
        (block,) = _blocks(README, "js")
        proto = (ROOT / re.findall(r'loadSync\("(.*?)"', block)[0]).read_text(encoding="utf-8")
        package, service = re.findall(r"new proto\.([\w.]+)\.(\w+)\(", block)[0]

        assert len(block.splitlines()) <= 10
        assert f"package {package};" in proto
        assert f"service {service} {{" in proto
        fields = re.findall(r"answer\.(\w+)(?:\[0\])?\.(\w+)", block)
        assert {name for pair in fields for name in pair} == {"embeddings", "length", "values", "model", "name"}
        assert all(re.search(rf" {name} = \d", proto) for name in ("embeddings", "values", "model", "name"))


class TestCommands:
    """The lines that a stranger copies."""

    @pytest.mark.skipif(GRPCURL is None, reason="grpcurl is not installed")
    @pytest.mark.parametrize("verb", ["-d", "describe"])
    async def test_grpcurl(self, server: InProcessServer, verb: str) -> None:
        assert GRPCURL is not None
        (line,) = [c for c in _commands(README) if c.startswith("grpcurl ") and verb in shlex.split(c)]
        out = await _output(server, GRPCURL, *shlex.split(line)[1:])

        if verb == "-d":
            assert line == (
                'grpcurl -plaintext -d \'{"texts":["hello world"]}\' localhost:50051 '
                "embedserve.v1.EmbeddingService/Embed"
            )
            assert len(json.loads(out)["embeddings"][0]["values"]) == DIMENSION
        else:
            assert "rpc EmbedStream" in out

    async def test_embed(self, server: InProcessServer, tmp_path: Path) -> None:
        (line,) = [c for c in _commands(README) if c.startswith("embedserve embed ")]
        (tmp_path / "texts.txt").write_text("one\ntwo\n", encoding="utf-8")
        await _output(server, sys.executable, "-m", *shlex.split(line), cwd=tmp_path)
        rows = [json.loads(row) for row in (tmp_path / "vectors.jsonl").read_text(encoding="utf-8").splitlines()]

        assert [len(row["embedding"]) for row in rows] == [DIMENSION, DIMENSION]

    @pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
    def test_every_command_and_flag_of_ours_exists(self, path: Path) -> None:
        wrong = [c for c in _commands(path.read_text(encoding="utf-8")) if not _is_known(c)]
        assert wrong == []

    @pytest.mark.parametrize(
        "command", ["embedserve serv", "embedserve serve --adress x", "embedserve embed --servr x", "make tests"]
    )
    def test_a_wrong_one_is_found(self, command: str) -> None:
        assert not _is_known(command)


def _is_known(command: str) -> bool:
    """Whether ``command`` is none of ours, or one that there is with flags that it takes."""
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    if words[:1] == ["make"] and len(words) > 1:
        return bool(
            re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        )
    if words[:1] != ["embedserve"] or len(words) < 2:
        return True
    context = click.Context(cli.commands)
    found = cli.commands if words[1].startswith("-") else cli.commands.get_command(context, words[1])
    if found is None:
        return False
    taken = {option for parameter in found.get_params(context) for option in parameter.opts}
    return {word for word in words[1:] if word.startswith("-")} <= taken


class TestFacts:
    """Figures and defaults in the README."""

    def test_defaults_in_the_table_of_settings(self) -> None:
        defaults = {setting.path: render(setting.default) for setting in settings_of(Config)}
        rows = re.findall(r"^\| (`[a-z_]+\.[^|]+) \| ([^|]+) \|", README, re.MULTILINE)
        assert len(rows) >= 8
        for names, shown in rows:
            paths, said = re.findall(r"`([^`]+)`", names), re.findall(r"`([^`]+)`", shown)
            if said:  # otherwise in words, for what is chosen for the machine
                assert {defaults[path] for path in paths} == set(said), names

    def test_texts_that_fit_one_answer(self) -> None:
        count, dimensions = re.findall(r"one 4 MiB answer \(([\d,]+) at (\d+) dimensions\)", README)[0]
        limit = Config().server.max_send_message_bytes

        assert limit == 4 << 20
        assert int(count.replace(",", "")) == max_texts_unary(row_bytes(Encoding.FLOAT32, int(dimensions)), limit)


class TestPlaces:
    """Files, folders and links."""

    @pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
    def test_every_file_that_is_named_is_there(self, path: Path) -> None:
        assert _missing(path.read_text(encoding="utf-8")) == []

    def test_one_that_is_not_there_is_found(self) -> None:
        assert _missing("`scheduling/polcy.py`, `engine/`, `tests/nit/`") == ["scheduling/polcy.py", "tests/nit/"]

    @pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
    def test_every_link_leads_somewhere(self, path: Path) -> None:
        targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
        assert [t for t in targets if not t.startswith("https://") and not (ROOT / t).exists()] == []


FOREIGN = {"modules.json"}
"""Of a checkpoint."""


def _missing(page: str) -> list[str]:
    """Files and folders in ``page`` that are neither in the root, the package, nor the scheduler's folder."""
    spans = re.findall(r"`([^`\s]+)`", page)
    named = [s for s in spans if re.fullmatch(r"[\w.-]+(/[\w.-]+)*(/|\.(py|md|toml|proto|txt|json|binpb))", s)]
    places = (ROOT, PACKAGE, PACKAGE / "scheduling")
    return [name for name in named if name not in FOREIGN and not any((place / name).exists() for place in places)]
