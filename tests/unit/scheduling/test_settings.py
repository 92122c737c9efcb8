"""Limits that do not fit together are refused with a sentence."""

import pytest

from embedserve.scheduling.settings import GradientSettings, LatencyP95Settings, SchedulerSettings, ThroughputSettings

WRONG = [
    ({"bucket_edges": ()}, "at least one edge"),
    ({"bucket_edges": (16, 8)}, "ascend"),
    ({"max_batch_tokens": 511}, "less than the last bucket edge"),
    ({"max_batch_items": 0}, "max_batch_items"),
    ({"max_queue_items": 0}, "max_queue_items"),
    ({"max_queue_tokens": 1}, "max_queue_tokens"),
    ({"batch_sizes": (0, 1)}, "batch_sizes"),
    ({"batch_sizes": (2, 1)}, "batch_sizes"),
    ({"max_queue_delay_ns": -1}, "negative"),
    ({"lowest_class_share": 0.5}, "lowest_class_share"),
    ({"failures_alike_max": 0}, "failures_alike_max"),
    ({"oom_cut": 1.0}, "oom_cut"),
    ({"initial_token_ns": 0}, "initial cost"),
    ({"cost_memory": 1.0}, "cost_memory"),
    ({"wait_quantile": 1.0}, "wait_quantile"),
]


class TestSchedulerSettings:
    @pytest.mark.parametrize(("changes", "word"), WRONG)
    def test_refuses(self, changes, word):
        with pytest.raises(ValueError, match=word):
            SchedulerSettings(**changes)


class TestPolicySettings:
    @pytest.mark.parametrize("changes", [{"soft_ns": 2_000_000_000}, {"release_fraction": 1.0}, {"max_shed": 1.0}])
    def test_latency_refuses(self, changes):
        with pytest.raises(ValueError, match=r"\S"):
            LatencyP95Settings(**changes)

    def test_throughput_refuses(self):
        with pytest.raises(ValueError, match="max_drain_ns"):
            ThroughputSettings(max_drain_ns=0)

    @pytest.mark.parametrize(
        "changes",
        [
            {"tolerance": 0.9},
            {"batching_ratio": 0},
            {"smoothing": 0},
            {"gradient_min": 1.0},
            {"headroom_batches": 0},
            {"min_batches": 0.5},
            {"min_batches": 3, "max_batches": 2},
            {"max_batch_tokens": 0},
        ],
    )
    def test_gradient_refuses(self, changes):
        with pytest.raises(ValueError, match=next(iter(changes))):
            GradientSettings(**changes)
