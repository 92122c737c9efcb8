"""The configuration that we ship to start from is one that the service takes."""

from __future__ import annotations

from pathlib import Path

from embedserve.config import load_config

EXAMPLE = Path(__file__).parents[2] / "deploy" / "embedserve.toml"


class TestExample:
    """``deploy/embedserve.toml``."""

    def test_it_loads_and_every_line_of_it_changes_a_default(self) -> None:
        loaded = load_config({}, {}, file=str(EXAMPLE), on_this_machine=False)
        named = [path for path, origin in loaded.provenance.items() if origin.source == "file"]
        redundant = {"telemetry.log_requests", "telemetry.trace_sample_ratio"}  # shown because they are often asked for

        assert loaded.config.admission.policies == ("throughput", "latency_p95")
        assert len(named) == 9
        defaults = load_config({}, {}, on_this_machine=False).config
        for path in set(named) - redundant:
            section, _, name = path.rpartition(".")
            value, default = loaded.config, defaults
            for part in section.split("."):
                value, default = getattr(value, part), getattr(default, part)
            assert getattr(value, name) != getattr(default, name), path
