"""The texts that are sent."""

from __future__ import annotations

import pytest

from loadtest.corpus import calls_of, texts_of_scenario
from loadtest.scenario import Texts, load_scenario


class TestTexts:
    @pytest.mark.parametrize("name", ["short", "mixed", "docs", "ingest"])
    def test_are_the_same_for_the_same_seed(self, name):
        scenario = load_scenario(name)
        assert calls_of(scenario) == calls_of(scenario)
        other = scenario.model_copy(update={"seed": 18})
        assert calls_of(scenario) != calls_of(other)

    def test_words_do_not_depend_on_the_machine(self):
        # Whoever compares servers on two machines sends the same: Python's generator and words.txt decide.
        assert texts_of_scenario(Texts(words=(3, 3), distinct=2), seed=1) == [
            "recent rock history",
            "at didn san",
        ]

    def test_lengths_keep_to_their_range_and_reach_both_ends(self):
        lengths = {len(text.split()) for text in texts_of_scenario(Texts(words=(5, 12)), seed=1)}
        assert lengths == set(range(5, 13))

    def test_log_spread_makes_each_doubling_equally_likely(self):
        texts = texts_of_scenario(Texts(words=(4, 255), spread="log", distinct=12_000), seed=1)
        lengths = [len(text.split()) for text in texts]
        for low in (4, 8, 16, 32, 64, 128):
            assert sum(low <= length < 2 * low for length in lengths) / len(lengths) == pytest.approx(1 / 6, abs=0.02)

    def test_docs_are_paragraphs_of_about_fifty_tokens(self):
        words = [len(text.split()) for text in texts_of_scenario(Texts(kind="docs"), seed=1)]
        assert min(words) >= 12
        assert max(words) <= 160
        assert 25 <= sum(words) / len(words) <= 45  # docstrings have about 1.5 tokens a word

    def test_calls_hold_as_many_texts_as_asked(self):
        calls = calls_of(load_scenario("ingest", {"texts.per_call": 7, "texts.distinct": 50}))
        assert [len(call) for call in calls] == [7] * 8
