"""Every value that a setting allows, to either end, makes a scheduler or is told to be wrong: none breaks the start."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import pytest

from embedserve.config import Config, load_config
from embedserve.errors import ConfigError
from embedserve.settings import settings_of
from embedserve.testing import fake_checkpoint
from embedserve.wiring import build_scheduler

SECTIONS = ("scheduling.", "admission.", "limits.")


def _bounds(annotation: Any) -> Iterator[float]:
    """``ge`` and ``le`` of an annotation, wherever in it they are."""
    for metadata in (*getattr(annotation, "__metadata__", ()), *getattr(annotation, "metadata", ())):
        yield from _bounds(metadata)
    for name in ("ge", "le"):
        if isinstance(value := getattr(annotation, name, None), (int, float)):
            yield value
    for part in typing.get_args(annotation):
        yield from _bounds(part)


def extremes() -> Iterator[tuple[str, str]]:
    """Setting and value, for both ends of every range."""
    for setting in settings_of(Config):
        if setting.path.startswith(SECTIONS):
            *sections, name = setting.path.split(".")
            tree: Any = Config
            for section in sections:
                tree = tree.model_fields[section].annotation
            field = tree.model_fields[name]
            for bound in {*_bounds(field.annotation), *(b for m in field.metadata for b in _bounds(m))}:
                yield setting.path, str(bound)


EXTREMES = sorted(set(extremes()))


class TestExtremes:
    @pytest.mark.parametrize(("path", "value"), EXTREMES)
    def test_it_is_taken_or_named(self, path: str, value: str) -> None:
        """With every policy in force, and a model whose texts have up to 128 tokens."""
        given = {"admission.policies": "throughput,latency_p95,gradient", path: value}
        problem = path
        try:
            build_scheduler(load_config(given, {}, on_this_machine=False).config, fake_checkpoint())
        except ConfigError as wrong:
            problem = str(wrong)

        assert path in problem

    def test_both_ends_of_each_range_are_there(self) -> None:
        """The search above finds ranges within optional settings too."""
        assert {("scheduling.max_queue_tokens", "16"), ("limits.max_texts", "1000000")} <= set(EXTREMES)
        assert len(EXTREMES) > 40
