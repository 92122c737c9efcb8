"""Small scenarios."""

from __future__ import annotations

from typing import Any

from loadtest.scenario import Scenario

SMALL_TEXTS = {"distinct": 64}


def scenario(*phases: dict[str, Any], **more: Any) -> Scenario:
    """Of ``phases``, named p0, p1 and so on; half a second each where nothing else is said."""
    named = [{"name": f"p{i}", "seconds": 0.5} | phase for i, phase in enumerate(phases)]
    given = {"name": "test", "about": "a test", "warm_up_s": 0, "texts": SMALL_TEXTS} | more
    return Scenario.model_validate({**given, "phases": named})
