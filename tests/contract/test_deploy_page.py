"""``deploy/README.md``: what it tells to type is there, and what it names exists."""

from __future__ import annotations

import re

import pytest

from embedserve.cli import commands
from embedserve.config import Config
from embedserve.settings import settings_of
from tests.contract.deployment import DEPLOY, ROOT, SETTINGS, dockerfile, documented_metrics, documented_variables

PREFIXES = tuple(f"{section}." for section in Config.model_fields)


@pytest.fixture(scope="module")
def page() -> str:
    return (DEPLOY / "README.md").read_text(encoding="utf-8")


class TestPage:
    """Names, links and commands."""

    def test_every_link_leads_somewhere(self, page: str) -> None:
        headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^## (.+)$", page, re.MULTILINE)}
        for link in re.findall(r"\]\(([^)]+)\)", page):
            assert link[1:] in headings if link.startswith("#") else (DEPLOY / link).exists(), link

    def test_every_file_that_a_command_names_is_there(self, page: str) -> None:
        named = set(re.findall(r"\bdeploy/[\w./-]*[\w]", page))
        assert len(named) > 4
        for path in named:
            assert (ROOT / path).exists(), path
        for name in re.findall(r"--file (\w[\w.]*\.yaml)", page):
            assert (DEPLOY / "compose" / name).exists(), name

    def test_settings_metrics_and_variables_exist(self, page: str) -> None:
        words = set(re.findall(r"`([a-z]+\.[\w.]+)`", page))
        settings = {setting.path for setting in settings_of(Config)}
        assert {word for word in words if word.startswith(PREFIXES) and not word.endswith((".py", ".toml"))} <= settings
        assert set(re.findall(r"\bEMBEDSERVE_[A-Z_]+", page)) <= SETTINGS
        assert set(re.findall(r"\bOTEL_[A-Z_]+", page)) <= documented_variables()
        metrics = set(re.findall(r"`((?:embedserve|process|rpc)_[a-z_]+)`", page))
        assert metrics
        assert metrics <= documented_metrics()

    def test_build_arguments_are_the_dockerfiles_with_their_defaults(self, page: str) -> None:
        rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (?:`([^`]+)`|[^|]+) \|", page, re.MULTILINE))
        arguments = dict(line.rest.split("=", 1) for line in dockerfile() if line.word == "ARG")
        assert set(rows) == set(arguments)
        for name, default in rows.items():
            assert default in ("", arguments[name]), name

    def test_every_command_of_ours_exists(self, page: str) -> None:
        used = set(re.findall(r"`embedserve ([a-z-]+)", page))
        assert used
        assert used <= set(commands.commands)

    def test_every_way_has_its_two_commands(self, page: str) -> None:
        for title in ("A container", "Compose", "Kubernetes", "systemd"):
            section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
            (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
            assert len(block.replace("\\\n", " ").strip().splitlines()) == 2, title
