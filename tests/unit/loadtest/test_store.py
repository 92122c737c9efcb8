"""What is read back is a result, or a sentence that says what is wrong with it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from loadtest import store

PHASE = dict.fromkeys(store.OF_PHASE)


def result(**changes: Any) -> dict[str, Any]:
    repetition = dict.fromkeys(store.OF_REPETITION) | {"phases": [PHASE]}
    whole = {"kind": "run", **dict.fromkeys(store.OF_RUN), "scenario": dict.fromkeys(store.OF_SCENARIO)}
    return whole | {"repetitions": [repetition]} | changes


class TestLoad:
    def test_what_was_saved_comes_back(self, tmp_path):
        store.save(tmp_path, result(), "<html>")
        assert store.load(tmp_path) == store.load(tmp_path / "result.json") == {"format": store.FORMAT, **result()}

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ("{", "is not JSON"),
            ("[]", "is not a result of this version of the load test (format 1)"),
            ({"format": 1}, "kind must be run, as `python -m loadtest run` writes it, not None"),
            ({"format": 1, "kind": "run"}, "target is missing, which every result has"),
            (result(format=1, scenario=5), "scenario must be a table, not 5"),
            (result(format=1, scenario={}), "scenario.name is missing, which every result has"),
            (result(format=1, repetitions=[]), "repetitions must be a list that is not empty, not []"),
            (result(format=1, repetitions=[{}]), "repetitions[1].void is missing, which every result has"),
            (
                result(format=1, repetitions=[dict.fromkeys(store.OF_REPETITION) | {"phases": [PHASE, {"name": "a"}]}]),
                "repetitions[1].phases[2].callers is missing, which every result has",
            ),
        ],
    )
    def test_what_is_wrong_is_a_sentence_with_the_file_and_the_key(self, tmp_path, content, sentence):
        path = tmp_path / "result.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(store.Unreadable, match=f"^{re.escape(str(path))}:? {re.escape(sentence)}$"):
            store.load(tmp_path)

    def test_the_folder_of_a_comparison_names_those_of_its_sides(self, tmp_path):
        store.save_comparison(tmp_path, {})
        with pytest.raises(store.Unreadable, match=f"its two results are in {tmp_path}/a and {tmp_path}/b"):
            store.load(tmp_path)
