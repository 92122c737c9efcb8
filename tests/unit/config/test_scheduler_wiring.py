"""Every number of admission and scheduling reaches the part that decides by it, and no other."""

from dataclasses import asdict, dataclass

import pytest

from embedserve.config import Config, load_config
from embedserve.settings import settings_of
from embedserve.wiring import build_scheduler, gradient_settings, latency_p95_settings, throughput_settings
from tests.unit.config.test_sources import another

ELSEWHERE = {
    "admission.policies",
    "scheduling.batches_in_flight",
    "scheduling.prepare_ahead_us",
    "scheduling.overlap_ahead_us",
}
"""Not numbers of the scheduler's: which policies there are, and the engine's."""
SETTINGS = [
    setting
    for setting in settings_of(Config)
    if setting.path.startswith(("admission.", "scheduling.")) and setting.path not in ELSEWHERE
]
MEANT = {"scheduling.max_batch_tokens": 3, "scheduling.max_batch_items": 2}
"""The scheduler's own, its share in max_queue_tokens, and the unit of gradient's limits."""


@dataclass(frozen=True)
class Checkpoint:
    """As much of a checkpoint as the scheduler is built from."""

    max_input_length: int = 512
    packs: bool = True


def numbers(config):
    """Every field of every settings object of the core."""
    scheduler = build_scheduler(config, Checkpoint())
    core = scheduler._settings
    parts = {
        "scheduler": core,
        "throughput": throughput_settings(config),
        "latency_p95": latency_p95_settings(config),
        "gradient": gradient_settings(config, core.max_batch_tokens),
    }
    return {(part, name): value for part, settings in parts.items() for name, value in asdict(settings).items()}


class TestNumbers:
    @pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.path)
    def test_each_moves_one_number(self, setting):
        text = "1024" if setting.path == "scheduling.max_batch_tokens" else another(setting)
        if setting.path == "scheduling.max_queue_tokens":
            text = "8192"
        if setting.path == "scheduling.shape":
            text = "bucketed"
        before = numbers(Config())
        after = numbers(load_config({setting.path: text}, {}, on_this_machine=False).config)
        moved = {key for key in before if before[key] != after[key]}

        assert len(moved) == MEANT.get(setting.path, 1), moved

    @pytest.mark.parametrize("part", ["throughput", "latency_p95", "gradient"])
    def test_each_number_has_a_setting(self, part):
        """But for the seed of the coin, which is there to make runs alike."""
        fields = {name for key, name in numbers(Config()) if key == part} - {
            "seed",
            "max_batch_tokens",
            "max_batch_items",
        }
        names = {s.path.rpartition(".")[2] for s in settings_of(Config) if s.path.startswith(f"admission.{part}.")}

        assert {name.removesuffix("_ns") for name in fields} == {name.removesuffix("_ms") for name in names}


class TestPolicies:
    @pytest.mark.parametrize(
        "names", ["none", "gradient", "gradient,throughput", "latency_p95,gradient", "throughput,latency_p95,gradient"]
    )
    def test_any_combination_is_asked(self, names):
        config = load_config({"admission.policies": names}, {}, on_this_machine=False).config
        figures = build_scheduler(config, Checkpoint()).figures(0)

        assert set(figures) == {"queue", "deadline", *(() if names == "none" else names.split(","))}
