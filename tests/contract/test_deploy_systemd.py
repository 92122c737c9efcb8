"""``deploy/systemd``: a unit that systemd takes, that lets the service drain and gives it as little as it needs."""

from __future__ import annotations

import configparser
from collections import defaultdict
from pathlib import Path

import pytest

from embedserve.lifecycle import ExitCode
from tests.contract.deployment import DEPLOY, EXAMPLE, assert_time_to_stop, configured, run, tool

UNIT = DEPLOY / "systemd" / "embedserve.service"
EXPOSURE_MAX = 20
"""Tenths, as ``systemd-analyze security`` counts; below 20 it says OK. A unit without any hardening has 96."""
EXECUTABLE = "/opt/embedserve/bin/embedserve"


def directives(path: Path) -> dict[str, list[str]]:
    """All values of each directive, in order."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[name].append(value)
    return found


@pytest.fixture
def unit() -> dict[str, list[str]]:
    return directives(UNIT)


class TestUnit:
    """``embedserve.service``."""

    def test_systemd_takes_it(self, tmp_path: Path) -> None:
        """With a program in the place of the one that is not installed here."""
        copy = tmp_path / UNIT.name
        copy.write_text(UNIT.read_text(encoding="utf-8").replace(EXECUTABLE, "/bin/true"), encoding="utf-8")
        assert run(tool("systemd-analyze", "Debian: systemd"), "verify", copy) == ""

    def test_it_is_hardened(self) -> None:
        said = run(
            tool("systemd-analyze", "Debian: systemd"), "security", "--offline=yes", f"--threshold={EXPOSURE_MAX}", UNIT
        )
        assert "Overall exposure level" in said

    def test_the_drain_has_the_time_that_it_needs(self, unit: dict[str, list[str]]) -> None:
        (seconds,) = unit["TimeoutStopSec"]
        assert_time_to_stop(float(seconds), configured(EXAMPLE, {}))
        assert unit["KillSignal"] == ["SIGTERM"]

    def test_what_a_restart_cannot_mend_is_not_restarted(self, unit: dict[str, list[str]]) -> None:
        assert unit["Restart"] == ["on-failure"]
        assert unit["RestartPreventExitStatus"] == [str(int(ExitCode.BAD_CONFIG))]
        assert int(unit["StartLimitBurst"][0]) * float(unit["RestartSec"][0]) < float(unit["StartLimitIntervalSec"][0])

    def test_an_end_that_was_asked_for_is_no_failure(self, unit: dict[str, list[str]]) -> None:
        (codes,) = unit["SuccessExitStatus"]
        assert set(map(int, codes.split())) == {int(ExitCode.GRACE_EXCEEDED), 128 + 2, 128 + 15}

    def test_it_names_settings_and_folders_that_there_are(self, unit: dict[str, list[str]]) -> None:
        environment = dict(entry.split("=", 1) for entry in unit["Environment"])
        configured(EXAMPLE, environment)
        assert environment["EMBEDSERVE_CONFIG"].startswith(f"/etc/{unit['ConfigurationDirectory'][0]}/")
        assert unit["CacheDirectory"] == ["embedserve"]
        assert unit["CacheDirectoryMode"] == ["0700"], "what it holds is run"
        assert environment["XDG_CACHE_HOME"] == "/var/cache"

    def test_only_commands_of_the_package_are_run(self, unit: dict[str, list[str]]) -> None:
        assert unit["ExecStart"] == [f"{EXECUTABLE} serve"]
        (after,) = unit["ExecStartPost"]
        assert f"{EXECUTABLE} healthcheck" in after


class TestCuda:
    """``cuda.conf``, laid over the unit."""

    def test_it_opens_devices_and_nothing_else(self, unit: dict[str, list[str]]) -> None:
        path = UNIT.with_name("cuda.conf")
        over = directives(path)
        assert set(over) == {"Environment", "PrivateDevices", "DevicePolicy", "DeviceAllow"}
        assert unit["PrivateDevices"] == ["yes"]
        assert over["PrivateDevices"] == ["no"]
        assert all(device.startswith("char-nvidia") for device in over["DeviceAllow"])
        assert configured(EXAMPLE, dict(e.split("=", 1) for e in over["Environment"])).model.device == "cuda"

    def test_both_are_files_that_systemd_can_read(self) -> None:
        for path in UNIT.parent.iterdir():
            parser = configparser.ConfigParser(strict=False, interpolation=None)
            parser.read(path, encoding="utf-8")
            assert "Service" in parser.sections(), path
