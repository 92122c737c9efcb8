"""When two sides differ."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest.comparison import NO_DIFFERENCE, ONE_EACH, compared, verdict
from loadtest.summary import spread
from tests.unit.loadtest.scenarios import scenario


def repetition(rate: float, p99: float, void: tuple[str, ...] = ()) -> dict[str, Any]:
    latency = {"p50": p99 / 2, "p95": p99 * 0.9, "p99": p99}
    rates = {"rate": None, "calls_per_s": rate, "texts_per_s": rate, "tokens_per_s": 10 * rate}
    phase = {"name": "p0", "callers": 4, **rates, "failed_share": 0.0, "latency_ms": latency}
    client = {"cpu_share": 0.1}
    return {
        "void": list(void),
        "phases": [phase],
        "capacity": None,
        "recovery_s": None,
        "clients": [client],
        "server": {},
    }


def side(name: str, *rates: float, void: int = 0) -> dict[str, Any]:
    runs = [repetition(rate, 1000 / rate) for rate in rates]
    runs += [repetition(1.0, 1.0, void=("offered 50 %",)) for _ in range(void)]
    facts = {"target": name, "machine": "m", "scenario": scenario({"callers": 4}).model_dump(mode="json")}
    return {**facts, "repetitions": runs}


def rows(a: dict[str, Any], b: dict[str, Any], *, interleaved: bool = True) -> dict[str, dict[str, Any]]:
    return {row["figure"]: row for row in compared(a, b, interleaved=interleaved)["rows"]}


class TestVerdicts:
    def test_ranges_that_overlap_show_no_difference(self):
        found = rows(side("a", 100, 110, 120), side("b", 90, 101, 95))
        assert found["calls_per_s"]["verdict"] == NO_DIFFERENCE

    def test_ranges_apart_name_the_better_side_and_by_how_much(self):
        found = rows(side("a", 200, 210, 190), side("b", 100, 105, 95))
        assert found["calls_per_s"]["verdict"] == "A is better, 2.00 x"
        # Half the latency is better, not worse.
        assert found["p99_ms"]["verdict"] == "A is better, 2.00 x"
        swapped = rows(side("a", 100, 105, 95), side("b", 200, 210, 190))
        assert swapped["calls_per_s"]["verdict"] == "B is better, 2.00 x"

    def test_pairs_that_disagree_show_no_difference(self):
        a, b = spread([100.0, 101.0]), spread([98.0, 99.0])
        assert verdict(a, b, {"median": 1.0, "lowest": 0.9, "highest": 1.1}, more_is_better=True) == NO_DIFFERENCE

    def test_equal_figures_show_no_difference(self):
        assert rows(side("a", 5, 5, 5), side("b", 5, 5, 5))["failed_share"]["verdict"] == NO_DIFFERENCE

    def test_one_repetition_has_no_range_and_shows_nothing(self):
        assert rows(side("a", 200), side("b", 100))["calls_per_s"]["verdict"] == ONE_EACH

    def test_void_repetitions_do_not_count(self):
        comparison = compared(side("a", 200, 210, void=1), side("b", 100, 105, void=1), interleaved=True)
        assert comparison["repetitions"] == [2, 2]
        row = next(row for row in comparison["rows"] if row["figure"] == "calls_per_s")
        assert row["a"] == {"median": 205, "lowest": 200, "highest": 210}
        assert any("void" in note for note in comparison["notes"])


class TestRatio:
    def test_of_sides_run_in_turns_is_taken_pair_by_pair(self):
        """A machine that slows down by half for one pair hurts both, and the ratio not at all."""
        found = rows(side("a", 200, 100, 200), side("b", 100, 50, 100))
        assert found["calls_per_s"]["ratio"] == {"median": 2.0, "lowest": 2.0, "highest": 2.0}

    def test_of_two_folders_spans_all_that_the_ranges_allow(self):
        found = rows(side("a", 200, 220), side("b", 100, 110), interleaved=False)
        assert found["calls_per_s"]["ratio"] == {"median": 2.0, "lowest": pytest.approx(200 / 110), "highest": 2.2}


class TestSameTest:
    """Different tests are not compared; the sentence names the first setting that differs."""

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"texts": {"per_call": 2}}, "texts.per_call is 1 in A and 2 in B"),
            ({"seed": 99}, "seed is 17 in A and 99 in B"),
            ({"timeout_s": 3.0}, r"timeout_s is [\d.]+ in A and 3.0 in B"),
        ],
    )
    def test_a_setting(self, changes, sentence):
        a, b = side("a", 100), side("b", 100)
        for key, value in changes.items():
            b["scenario"][key] = {**b["scenario"][key], **value} if isinstance(value, dict) else value
        with pytest.raises(ValueError, match=f"^these are different tests: {sentence}; run both with one scenario$"):
            compared(a, b, interleaved=False)

    def test_a_phase(self):
        a, b = side("a", 100), side("b", 100)
        b["scenario"]["phases"][0] |= {"callers": None, "rate": 50.0}
        with pytest.raises(ValueError, match=r"phases\[1\]\.callers is 4 in A and not set in B"):
            compared(a, b, interleaved=False)
        b["scenario"]["phases"] *= 2
        with pytest.raises(ValueError, match=r"the number of phases is 1 in A and 2 in B"):
            compared(a, b, interleaved=False)

    def test_a_phase_by_another_name_is_the_same(self):
        a, b = side("a", 100), side("b", 100)
        b["scenario"]["phases"][0]["name"] = "another"
        assert compared(a, b, interleaved=False)["rows"]
