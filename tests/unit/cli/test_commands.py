"""The command line as a process: exit codes, what is printed where, and how fast."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest

from embedserve import __version__, cli
from embedserve.config import Config
from embedserve.errors import ConfigError, InvariantBroken, ModelRefused, StartupError
from embedserve.settings import settings_of

SERVICE_ROOT = Path(__file__).parents[3] / "service"


def run(*arguments, env=None, before=""):
    """``python -m embedserve``; ``before`` is Python that runs ahead of it in the same process."""
    code = f"{before}\nimport sys; from embedserve.cli import main; code = main(sys.argv[1:])\n"
    code += "if 'modules' in globals(): print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)\n"
    code += "sys.exit(code)"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SERVICE_ROOT), **(env or {})},
    )


class TestCheckConfig:
    def test_a_row_a_setting_with_value_and_origin(self, tmp_path):
        file = tmp_path / "e.toml"
        file.write_text("limits.max_texts = 5")
        env = {"EMBEDSERVE_LIMITS_MAX_TENANTS": "6"}
        result = run("check-config", "--config", str(file), "--address", "127.0.0.1:7", env=env)
        lines = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
        assert (result.returncode, result.stderr) == (0, "")
        assert lines[0] == ["setting", "value", "from"]
        assert [line[0] for line in lines[1:]] == [s.path for s in settings_of(Config)]
        table = {line[0]: line[1:] for line in lines}
        assert table["limits.max_texts"] == ["5", f"file {file}: limits.max_texts"]
        assert table["limits.max_tenants"] == ["6", "environment EMBEDSERVE_LIMITS_MAX_TENANTS"]
        assert table["server.address"] == ["127.0.0.1:7", "flag --server.address"]
        assert table["model.name"] == ["none", "default"]

    def test_json(self):
        result = run("check-config", "--json", "--dtype", "float32", env={"GRPC_PORT": "1"})
        shown = json.loads(result.stdout)
        assert result.returncode == 0
        assert shown["settings"]["model.dtype"] == {"value": "float32", "source": "flag", "name": "--model.dtype"}
        assert shown["settings"]["admission.policies"]["value"] == ["throughput"]
        assert set(shown["settings"]) == {setting.path for setting in settings_of(Config)}
        assert len(shown["hints"]) == 1

    def test_every_problem_is_listed_and_nothing_else_is_printed(self):
        env = {"EMBEDSERVE_SERVER_ADRESS": "x", "EMBEDSERVE_LIMITS_MAX_TEXTS": "0"}
        result = run("check-config", "--model", "/not/here", env=env)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.splitlines() == [
            "embedserve: 3 wrong in the settings:",
            (
                "  EMBEDSERVE_SERVER_ADRESS (environment): there is no such setting; "
                "did you mean EMBEDSERVE_SERVER_ADDRESS?"
            ),
            "  limits.max_texts = 0 (environment EMBEDSERVE_LIMITS_MAX_TEXTS): must be an integer from 1 to 1000000",
            (
                "  model.source = /not/here (flag --model.source): there is no such directory here; "
                "must be package:NAME, a local directory, or a hub id in the local cache"
            ),
        ]

    def test_problems_as_json(self):
        result = run("check-config", "--json", env={"EMBEDSERVE_X": "x"})
        assert result.returncode == 2
        assert json.loads(result.stdout) == {
            "problems": ["EMBEDSERVE_X (environment): there is no such setting"],
            "hints": [],
        }

    def test_a_setting_of_a_replaced_system_is_a_hint_and_no_error(self):
        result = run("check-config", env={"MAX_BATCH_SIZE": "64"})
        assert result.returncode == 0
        assert result.stderr.startswith("hint: MAX_BATCH_SIZE, a setting of py-gpu-inference, is not read here:")

    def test_neither_torch_nor_grpc_nor_numpy_is_imported_and_it_takes_well_under_a_second(self):
        """Of processor time: other work on the machine says nothing about ours."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = run("check-config", before="modules = True")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        elapsed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert result.returncode == 0
        imported = result.stderr.split()
        assert "pydantic" in imported
        assert {"torch", "grpc", "numpy", "transformers", "opentelemetry"}.isdisjoint(imported)
        assert elapsed < 1.0

    def test_a_flag_that_does_not_exist_is_exit_2_with_the_nearest(self):
        result = run("check-config", "--server.adress", "x")
        assert result.returncode == 2
        assert "--server.address" in result.stderr


class TestFlags:
    @pytest.mark.parametrize("name", ["serve", "check-config"])
    def test_every_setting_is_a_flag_with_its_meaning_range_and_default(self, name):
        command = cli.commands.commands[name]
        options = {flag: option for option in command.params for flag in option.opts}
        for setting in settings_of(Config):
            assert setting.flag in options
            assert setting.allowed in options[setting.flag].help
            assert "Default: " in options[setting.flag].help

    @pytest.mark.parametrize(
        ("alias", "flag"),
        [
            ("--address", "--server.address"),
            ("--model", "--model.source"),
            ("--frontends", "--server.frontends"),
            ("--device", "--model.device"),
            ("--devices", "--model.devices"),
            ("--dtype", "--model.dtype"),
        ],
    )
    def test_short_names(self, alias, flag):
        (option,) = [option for option in cli.commands.commands["serve"].params if alias in option.opts]
        assert flag in option.opts


class TestExitCodes:
    @pytest.mark.parametrize(
        ("raised", "code", "said"),
        [
            (StartupError("port 1 is in use"), 1, "embedserve: port 1 is in use\n"),
            (ModelRefused("no weights"), 1, "embedserve: no weights\n"),
            (ConfigError(["a", "b"]), 2, "embedserve: 2 wrong in the settings:\n  a\n  b\n"),
            (KeyboardInterrupt(), 130, "\n"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_a_failure_is_a_sentence_without_a_traceback(self, raised, code, said, monkeypatch, capsys):
        monkeypatch.setitem(cli.commands.commands, "fail", _failing(raised))
        assert cli.main(["fail"]) == code
        assert capsys.readouterr().err == said

    @pytest.mark.parametrize("raised", [InvariantBroken("two batches hold item 3"), ZeroDivisionError()], ids=repr)
    def test_a_broken_promise_is_70_with_its_traceback(self, raised, monkeypatch, capsys):
        monkeypatch.setitem(cli.commands.commands, "fail", _failing(raised))
        assert cli.main(["fail"]) == 70
        assert "Traceback" in capsys.readouterr().err

    def test_what_a_command_returns_is_the_exit_code(self, monkeypatch):
        monkeypatch.setitem(cli.commands.commands, "three", click.Command("three", callback=lambda: 3))
        assert cli.main(["three"]) == 3

    def test_version(self):
        result = run("--version")
        assert (result.returncode, result.stdout) == (0, f"embedserve {__version__}\n")

    @pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["embed", "--help"]])
    def test_help(self, arguments):
        assert run(*arguments).returncode == 0

    @pytest.mark.parametrize("arguments", [["nonsense"], ["embed", "/no/such/file"], ["embed", "--batch-size", "0"]])
    def test_a_wrong_command_line_is_2(self, arguments):
        result = run(*arguments)
        assert result.returncode == 2
        assert "Error: " in result.stderr

    def test_wrong_settings_end_serve_with_2_before_anything_is_loaded(self):
        result = run("serve", env={"EMBEDSERVE_X": "1"}, before="modules = True")
        assert result.returncode == 2
        assert "there is no such setting" in result.stderr
        assert "torch" not in result.stderr.split()


def _failing(raised):
    def fail():
        raise raised

    return click.Command("fail", callback=fail)
