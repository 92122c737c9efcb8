"""What is packed: the source distribution is the whole repository, the wheel the package alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hatchling.builders.plugin.interface import BuilderInterface
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]


def packed(builder: type[BuilderInterface]) -> dict[str, str]:
    """Where each file of the repository lies in the distribution that ``builder`` would make."""
    files = builder(str(ROOT)).recurse_included_files()
    return {str(Path(file.path).relative_to(ROOT)): file.distribution_path for file in files}


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this is no clone: {done.stderr.strip()}")
    return {name for name in done.stdout.split("\0") if (ROOT / name).is_file()}


class TestSourceDistribution:
    def test_holds_every_file_that_is_tracked(self, tracked: set[str]) -> None:
        """Who has it can run `make check` and `make test`: dashboards, load test and CI belong to that."""
        held = packed(SdistBuilder)

        assert {"dashboards/service.json", "loadtest/__main__.py", ".ci/run"} <= tracked
        assert tracked - set(held) == set()
        assert all(held[name] == name for name in tracked)

    def test_holds_nothing_of_a_folder_that_is_not_ours(self, tracked: set[str]) -> None:
        """A clone may have a virtual environment, results and notes lying about."""
        assert {name.split("/")[0] for name in packed(SdistBuilder)} == {name.split("/")[0] for name in tracked}


class TestWheel:
    def test_is_the_package_alone(self, tracked: set[str]) -> None:
        held = packed(WheelBuilder)
        package = {name for name in tracked if name.startswith("service/embedserve/")}

        assert {held[name] for name in package} == {name.removeprefix("service/") for name in package}
        assert all(path.startswith("embedserve/") for path in held.values())
