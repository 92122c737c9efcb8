"""Settings that are no settings: a valid ``Config``, or a ``ConfigError`` that lists what is wrong; nothing else.

``tests/property/fuzzing.py`` says how to run it for longer.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedserve.config import Config, load_config
from embedserve.errors import ConfigError
from embedserve.settings import CONFIG_FILE_ENV, render, settings_of
from tests.property.fuzzing import PROFILE, mutated, seeds

SETTINGS = settings_of(Config)
PATHS = [setting.path for setting in SETTINGS]
EXAMPLE = Path(__file__).parents[2] / "deploy" / "embedserve.toml"
ODD = ["", "none", "nan", "inf", "-1", "1e400", "9" * 5000, "true", "[", "[" * 5000, "{" * 5000, '{"a":' * 3000, "[1,"]
ODD += ["a=b=c", "=", ",", "\x00", "\ud800", "٣", "0x10", "1_000", "[null]", '["a", {}]', '{"a": 1}', "127.0.0.1:99999"]
ODD += ["unix:", ":0", "[::1]:0", "[" * 5000 + "]" * 5000]
TEXT = st.one_of(st.sampled_from(ODD), st.text(max_size=40), st.integers().map(str), st.floats().map(str))
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)


def judged(flags: dict[str, str], env: dict[str, str], file: str | None = None) -> None:
    """Read them: the outcome is a configuration that reads itself again, or sentences."""
    try:
        config = load_config(flags, env, file=file, on_this_machine=False).config
    except ConfigError as error:
        assert error.problems  # noqa: PT017
        assert all(problem and problem.isprintable() for problem in error.problems), error.problems  # noqa: PT017
        return
    assert Config.model_validate(config.model_dump()) == config


@PROFILE
@given(
    st.dictionaries(st.sampled_from(PATHS), TEXT, max_size=5),
    st.dictionaries(
        st.one_of(
            st.sampled_from([setting.env for setting in SETTINGS]),
            st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ_", max_size=20).map("EMBEDSERVE_".__add__),
        ),
        TEXT,
        max_size=5,
    ),
)
def test_flags_and_environment_of_any_text(flags: dict[str, str], env: dict[str, str]) -> None:
    env.pop(CONFIG_FILE_ENV, None)
    judged(flags, env)


def toml(value: Any) -> str:
    """As TOML spells it, more or less: where it does not, that is a case as well."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    return str(value)


@PROFILE
@given(
    st.dictionaries(st.one_of(st.sampled_from(PATHS), st.sampled_from(["server", "x", "model.x"])), VALUE, max_size=5)
)
def test_files_with_values_of_any_type(values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "embedserve.toml"
        file.write_bytes(
            "".join(f"{path} = {toml(value)}\n" for path, value in values.items()).encode("utf-8", "replace")
        )
        judged({}, {}, str(file))


def test_mutations_of_the_example_file(tmp_path: Path) -> None:
    file = tmp_path / "embedserve.toml"
    lines = [f"{setting.path} = {toml(render(setting.default))}" for setting in SETTINGS]
    for seed in seeds(400):
        rng = random.Random(seed)
        good = EXAMPLE.read_bytes() if seed % 2 else "\n".join(rng.sample(lines, 5)).encode()
        file.write_bytes(mutated(good, rng))
        try:
            judged({}, {}, str(file))
        except Exception as error:
            raise AssertionError(f"FUZZ_SEED={seed}") from error


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"server = '\xc2\x80'",
        b"\xff\xfe",
        b"a = " + b"[" * 100_000,
        b"a = " + b"{a=" * 5000,
        b"x." * 2000 + b"y = 1",
        b"\x00",
        b"a = " + b"9" * 100_000,
    ],
    ids=["empty", "an unprintable value", "UTF-16", "lists", "tables", "a path", "NUL", "digits"],
)
def test_files_that_are_hard_to_read(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "embedserve.toml"
    file.write_bytes(content)
    judged({}, {}, str(file))


@pytest.mark.parametrize("name", ["\x00", "x" * 5000, "/", "/dev/null", "/proc/self/mem", "\ud800"])
def test_names_that_are_no_files(name: str) -> None:
    judged({}, {}, name)
    judged({}, {CONFIG_FILE_ENV: name})
