"""What a scenario file may say."""

from __future__ import annotations

import pytest

from loadtest.scenario import ScenarioError, load_scenario, shipped

WRONG = """
method = "embedd"
timeout = 3
[texts]
words = [12, 5]
per_cal = 32
[[phases]]
name = "a"
seconds = -1
callers = 4
[[phases]]
name = "b"
seconds = 5
callers = 4
rate = 100
tiemout = 1
[marks]
p99_ms = 3
"""


class TestShipped:
    def test_every_one_can_be_run_and_says_what_it_shows(self):
        assert {"short", "mixed", "ingest", "ingest_256", "streaming", "overload", "burst", "ramp", "docs"} <= {
            *shipped()
        }
        for name in shipped():
            assert load_scenario(name).about.endswith((".", "?"))

    def test_the_ramp_doubles_its_callers_to_64(self):
        scenario = load_scenario("ramp")
        assert [phase.callers for phase in scenario.phases] == [1, 2, 4, 8, 16, 32, 64]
        assert scenario.marks.throughput_never_falls_by is not None


class TestMistakes:
    def test_all_of_a_file_are_told_at_once_with_their_places(self, tmp_path):
        path = tmp_path / "wrong.toml"
        path.write_text(WRONG)
        with pytest.raises(ScenarioError) as caught:
            load_scenario(path)
        lines = str(caught.value).splitlines()
        for place, word in {
            "about": " must be given: text that is not empty",
            "method": ' must be "embed" or "stream", not "embedd"',
            "timeout": ": no such key; did you mean timeout_s?",
            "texts.words": ": the fewest come first",
            "texts.per_cal": ": no such key; did you mean per_call?",
            "phases[1].seconds": " must be a number above 0 and at most 86400, not -1",
            "phases[2].tiemout": ": no such key; there are name, seconds, callers",
            "phases[2]": ": exactly one of callers, rate and of_capacity says the load; given are callers and rate",
            "marks.p99_ms": ": no such key; did you mean p99_ms_at_most?",
        }.items():
            assert any(line.strip().startswith(place + word) for line in lines), (place, word, lines)
        # and no more: a list with a wrong entry is not called too short
        assert len(lines) == 1 + 9

    @pytest.mark.parametrize(
        ("key", "value", "sentence"),
        [
            ("texts.per_call", 2.5, "texts.per_call must be a whole number from 1 to 16384, not 2.5"),
            ("texts.per_call", 0, "texts.per_call must be a whole number from 1 to 16384, not 0"),
            ("timeout_s", "5s", 'timeout_s must be a number above 0 and at most 3600, not "5s"'),
            ("rate", float("inf"), "phases[1].rate must be a number above 0 and at most 1000000, not Infinity"),
            ("marks.p99_ms_at_most", -1, "marks.p99_ms_at_most must be a number above 0, not -1"),
            ("texts.kind", "prose", 'texts.kind must be "words" or "docs", not "prose"'),
            ("texts", 5, "texts must be a table with any of kind, words, spread, per_call, distinct, not 5"),
            ("phases", [], "phases must be a list of 1 to 200 tables ([[phases]]), not []"),
            ("texts.words", (5,), "texts.words[2] must be given: a whole number from 1 to 100000"),
        ],
    )
    def test_one_is_a_sentence_with_the_file_the_key_and_what_is_allowed(self, key, value, sentence):
        with pytest.raises(ScenarioError) as caught:
            load_scenario("short", {key: value})
        file, told = str(caught.value).split(" with the command's options: ")
        assert file.endswith("scenarios/short.toml")
        assert told == sentence

    @pytest.mark.parametrize("key", ["phases.rate", "about.x"])
    def test_a_key_within_what_is_no_table(self, key):
        with pytest.raises(ScenarioError, match=f"--set {key}: {key.split('.')[0]} is no table"):
            load_scenario("short", {key: 3})

    def test_a_name_that_is_nearly_right_is_guessed(self):
        with pytest.raises(ScenarioError, match="did you mean short"):
            load_scenario("shrot")

    def test_what_is_not_toml_is_called_so(self, tmp_path):
        path = tmp_path / "x.toml"
        path.write_text("about = ")
        with pytest.raises(ScenarioError, match="not TOML"):
            load_scenario(path)

    def test_a_folder_is_no_file(self, tmp_path):
        with pytest.raises(ScenarioError, match="cannot be read"):
            load_scenario(tmp_path)


class TestOverrides:
    def test_callers_rate_and_seconds_are_every_phase_s(self):
        scenario = load_scenario("burst", {"rate": 50.0, "seconds": 3.0})
        assert {(p.rate, p.of_capacity, p.callers, p.seconds) for p in scenario.phases} == {(50.0, None, None, 3.0)}
        assert not scenario.needs_capacity

    @pytest.mark.parametrize(
        ("load", "name"),
        [({"rate": 200.0}, "200 calls/s"), ({"rate": 0.5}, "0.5 calls/s"), ({"callers": 1}, "1 caller"),
         ({"callers": 32}, "32 callers"), ({"seconds": 3.0}, "64 callers")],
    )  # fmt: skip
    def test_a_phase_is_called_by_what_it_does(self, load, name):
        """Its own name may say the load that it no longer has."""
        assert [phase.name for phase in load_scenario("short", load).phases] == [name]

    def test_phases_with_the_same_load_have_different_names(self):
        names = [phase.name for phase in load_scenario("burst", {"rate": 50.0}).phases]
        assert names[0] == f"50 calls/s, 1 of {len(names)}"
        assert len(set(names)) == len(names) > 1

    def test_dotted_names_reach_into_tables(self):
        scenario = load_scenario("short", {"texts.per_call": 8, "marks.p99_ms_at_most": 200})
        assert (scenario.texts.per_call, scenario.marks.p99_ms_at_most) == (8, 200)

    def test_an_unknown_one_is_a_mistake(self):
        with pytest.raises(ScenarioError, match=r"texts\.per_cal: no such key"):
            load_scenario("short", {"texts.per_cal": 8})
