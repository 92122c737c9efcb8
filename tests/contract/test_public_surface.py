"""What a module says it exports exists, and what exists without an underscore is meant."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from pathlib import Path

import pytest

import embedserve

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(embedserve.__path__, "embedserve.")
    if ".v1" not in module.name and not module.name.endswith("__main__")
)


class TestExports:
    """``__all__`` of each module."""

    @pytest.mark.parametrize("name", MODULES)
    def test_every_exported_name_exists(self, name: str) -> None:
        module = importlib.import_module(name)

        assert [n for n in getattr(module, "__all__", []) if not hasattr(module, n)] == []

    @pytest.mark.parametrize("name", MODULES)
    def test_a_module_says_what_it_is_for(self, name: str) -> None:
        assert (importlib.import_module(name).__doc__ or "").strip()


class TestTesting:
    """What users may build their own tests on."""

    def test_the_fakes_are_these(self) -> None:
        module = importlib.import_module("embedserve.testing")

        assert module.__all__ == [
            "FakeBackend", "FaultPlan", "FaultProxy", "Faults", "FaultyBackend", "ManualClock", "fake_checkpoint",
            "tiny_tokenizer",
        ]  # fmt: skip


class TestDependencies:
    """Packages that break the OTLP exporter are never installed."""

    @pytest.mark.parametrize("package", ["xds-protos", "grpcio-csds", "grpcio-admin"])
    def test_it_is_not_pinned_and_not_installed(self, package: str) -> None:
        pins = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")

        assert f"\n{package}==" not in pins
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
