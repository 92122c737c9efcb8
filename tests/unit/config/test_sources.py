"""Where settings come from: precedence, provenance, names, and every sentence about what is wrong."""

import json

import pytest

from embedserve.config import Config, load_config
from embedserve.errors import ConfigError
from embedserve.settings import Origin, parse, render, settings_of

SETTINGS = settings_of(Config)


@pytest.fixture
def toml(tmp_path):
    """Write a TOML file; gives its name."""

    def write(text):
        path = tmp_path / "e.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def problems(flags=None, env=None, file=None, *, on_this_machine=False):
    with pytest.raises(ConfigError) as raised:
        load_config(flags or {}, env or {}, file=file, on_this_machine=on_this_machine)
    return list(raised.value.problems)


def another(setting):
    """A valid value that is not the default, as text; chosen so that no rule between settings breaks."""
    if setting.path == "server.max_connection_age_ms":
        return "600001"
    special = {
        "server.address": "127.0.0.1:50052,unix:/run/e.sock",
        "server.stream_message_bytes": "2048",
        "limits.max_texts": "2",
        "limits.max_text_bytes": "2",
        "model.source": "org/name",
        "model.device": "cuda:1",
        "model.devices": "cuda:0,cuda:1",
        "model.control_tokens": '["[a,b]","[c]"]',
        "scheduling.bucket_edges": "8,64",
        "scheduling.max_queue_items": "1000000",
        "admission.policies": "latency_p95,throughput",
        "admission.latency_p95.soft_ms": "2",
        "scheduling.cost_memory": "0.75",
        "scheduling.retry_share": "0.5",
        "admission.pass_overrun_ratio": "1.75",
        "admission.wait_quantile": "0.75",
        "admission.gradient.tolerance": "1.75",
        "admission.gradient.min_batches": "3.5",
        "admission.gradient.max_batches": "3.5",
        "operations.address": "[::]:1",
        "telemetry.log_levels": "grpc=error,embedserve.engine=debug",
    }
    if setting.path in special:
        return special[setting.path]
    if setting.allowed.startswith("one of "):
        choices = setting.allowed.removeprefix("one of ").split(", ")
        return next(choice for choice in choices if choice != setting.default)
    match setting.kind:
        case "switch":
            return "false" if setting.default else "true"
        case "integer":
            return "100" if setting.default is None else str(setting.default + 1)
        case "number":
            return "0.25"
    return "another"


def value_at(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


class TestNames:
    """A setting has one path, one variable and one flag."""

    @pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.path)
    def test_each_can_be_set_by_file_variable_and_flag_alike(self, setting, toml):
        text = another(setting)
        expected = parse(setting, text)
        assert expected != setting.default
        written = list(expected) if isinstance(expected, tuple) else expected
        value = (
            ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in written.items())
            if isinstance(written, dict)
            else ""
        )
        file = toml(f"{setting.path} = {'{' + value + '}' if value else json.dumps(written)}")
        by_file = load_config({}, {}, file=file, on_this_machine=False)
        by_variable = load_config({}, {setting.env: text}, on_this_machine=False)
        by_flag = load_config({setting.path: text}, {}, on_this_machine=False)
        assert value_at(by_file.config, setting.path) == expected
        assert value_at(by_variable.config, setting.path) == expected
        assert value_at(by_flag.config, setting.path) == expected
        assert by_file.provenance[setting.path] == Origin("file", f"{file}: {setting.path}")
        assert by_variable.provenance[setting.path] == Origin("environment", setting.env)
        assert by_flag.provenance[setting.path] == Origin("flag", setting.flag)

    @pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.path)
    def test_a_value_that_is_shown_can_be_given_back(self, setting):
        loaded = load_config({setting.path: render(setting.default)}, {}, on_this_machine=False)
        assert value_at(loaded.config, setting.path) == setting.default

    def test_underscores_in_names_are_no_trouble(self):
        loaded = load_config({}, {"EMBEDSERVE_ADMISSION_LATENCY_P95_SLO_MS": "123"})
        assert loaded.config.admission.latency_p95.slo_ms == 123

    def test_none_unsets_and_spaces_are_ignored(self):
        env = {
            "EMBEDSERVE_MODEL_NAME": "none",
            "EMBEDSERVE_TOKENIZER_THREADS": "",
            "EMBEDSERVE_LIMITS_MAX_TEXTS": " 7 ",
        }
        config = load_config({}, env).config
        assert config.model.name is None
        assert config.tokenizer.threads is None
        assert config.limits.max_texts == 7

    @pytest.mark.parametrize("text", ["true", "1", "yes", "ON"])
    def test_switches_have_the_usual_spellings(self, text):
        assert load_config({}, {"EMBEDSERVE_SERVER_SO_REUSEPORT": text}).config.server.so_reuseport is True

    @pytest.mark.parametrize("text", ["none", "", "[]"])
    def test_no_policy(self, text):
        assert load_config({}, {"EMBEDSERVE_ADMISSION_POLICIES": text}).config.admission.policies == ()


class TestPrecedence:
    def test_flag_over_variable_over_file_over_default(self, toml):
        file = toml("[limits]\nmax_texts = 1\nmax_tenants = 1\nmax_tenant_bytes = 1\n")
        env = {"EMBEDSERVE_LIMITS_MAX_TEXTS": "2", "EMBEDSERVE_LIMITS_MAX_TENANTS": "2"}
        loaded = load_config({"limits.max_texts": "3"}, env, file=file)
        limits = loaded.config.limits
        given = (limits.max_texts, limits.max_tenants, limits.max_tenant_bytes, limits.max_requests_in_flight)
        assert given == (3, 2, 1, 4096)
        names = ("max_texts", "max_tenants", "max_tenant_bytes", "max_requests_in_flight")
        sources = [loaded.provenance[f"limits.{name}"].source for name in names]
        assert sources == ["flag", "environment", "file", "default"]

    def test_the_flag_for_the_file_wins_over_its_variable(self, toml, tmp_path):
        file = toml("limits.max_texts = 5")
        assert load_config({}, {"EMBEDSERVE_CONFIG": file}).config.limits.max_texts == 5
        elsewhere = {"EMBEDSERVE_CONFIG": str(tmp_path / "none.toml")}
        assert load_config({}, elsewhere, file=file).config.limits.max_texts == 5

    def test_every_setting_has_a_provenance(self):
        assert set(load_config({}, {}).provenance) == {setting.path for setting in SETTINGS}

    def test_variables_of_others_are_none_of_our_business(self):
        assert load_config({}, {"GRPC_PORT": "1", "PATH": "/bin", "EMBEDSERVER": "x"}).config == Config()

    def test_kubernetes_service_links_are_not_settings(self):
        links = {
            "EMBEDSERVE_SERVICE_HOST": "10.96.0.12",
            "EMBEDSERVE_SERVICE_PORT": "50051",
            "EMBEDSERVE_SERVICE_PORT_GRPC": "50051",
            "EMBEDSERVE_PORT": "tcp://10.96.0.12:50051",
            "EMBEDSERVE_PORT_50051_TCP": "tcp://10.96.0.12:50051",
            "EMBEDSERVE_PORT_50051_TCP_PROTO": "tcp",
            "EMBEDSERVE_PORT_50051_TCP_PORT": "50051",
            "EMBEDSERVE_PORT_50051_TCP_ADDR": "fd00::12",
            "EMBEDSERVE_METRICS_SERVICE_HOST": "10.96.0.13",
            "EMBEDSERVE_METRICS_PORT": "tcp://10.96.0.13:8001",
        }
        assert load_config({}, links).config == Config()


class TestSentences:
    """Every kind of mistake has its sentence: setting, value, where from, what is allowed."""

    @pytest.mark.parametrize(
        ("env", "sentence"),
        [
            (
                {"EMBEDSERVE_LIMITS_MAX_TEXTS": "many"},
                (
                    "limits.max_texts = many (environment EMBEDSERVE_LIMITS_MAX_TEXTS): "
                    "must be an integer from 1 to 1000000"
                ),
            ),
            (
                {"EMBEDSERVE_LIMITS_MAX_TEXTS": "0"},
                "limits.max_texts = 0 (environment EMBEDSERVE_LIMITS_MAX_TEXTS): must be an integer from 1 to 1000000",
            ),
            (
                {"EMBEDSERVE_MODEL_MAX_INPUT_LENGTH": "3"},
                (
                    "model.max_input_length = 3 (environment EMBEDSERVE_MODEL_MAX_INPUT_LENGTH): "
                    "must be an integer from 4 to 1048576, or none"
                ),
            ),
            (
                {"EMBEDSERVE_TELEMETRY_TRACE_SAMPLE_RATIO": "nan"},
                (
                    "telemetry.trace_sample_ratio = nan (environment EMBEDSERVE_TELEMETRY_TRACE_SAMPLE_RATIO): "
                    "must be a number from 0 to 1"
                ),
            ),
            (
                {"EMBEDSERVE_SERVER_REFLECTION": "maybe"},
                "server.reflection = maybe (environment EMBEDSERVE_SERVER_REFLECTION): must be true or false",
            ),
            (
                {"EMBEDSERVE_MODEL_DTYPE": "int8"},
                (
                    "model.dtype = int8 (environment EMBEDSERVE_MODEL_DTYPE): "
                    "must be one of auto, float32, bfloat16, float16"
                ),
            ),
            (
                {"EMBEDSERVE_MODEL_DEVICE": "gpu"},
                "model.device = gpu (environment EMBEDSERVE_MODEL_DEVICE): must be auto, cpu, cuda or cuda:N",
            ),
            (
                {"EMBEDSERVE_SERVER_ADDRESS": "50051"},
                (
                    "server.address = 50051 (environment EMBEDSERVE_SERVER_ADDRESS): '50051' is not host:port with a "
                    "port from 0 to 65535, nor unix:/path; must be host:port or unix:/path, several by commas"
                ),
            ),
            (
                {"EMBEDSERVE_SCHEDULING_BUCKET_EDGES": "64,32"},
                (
                    "scheduling.bucket_edges = 64,32 (environment EMBEDSERVE_SCHEDULING_BUCKET_EDGES): they do not "
                    "ascend within the range; must be ascending integers from 1 to 1048576, by commas"
                ),
            ),
            (
                {"EMBEDSERVE_SCHEDULING_BUCKET_EDGES": "16,x"},
                (
                    "scheduling.bucket_edges = 16,x (environment EMBEDSERVE_SCHEDULING_BUCKET_EDGES): "
                    "must be ascending integers from 1 to 1048576, by commas"
                ),
            ),
            (
                {"EMBEDSERVE_ADMISSION_POLICIES": "throughput,codel"},
                (
                    "admission.policies = throughput,codel (environment EMBEDSERVE_ADMISSION_POLICIES): "
                    "must be throughput, latency_p95, gradient, several by commas, or none"
                ),
            ),
            (
                {"EMBEDSERVE_TELEMETRY_LOG_LEVELS": "grpc=loud"},
                (
                    "telemetry.log_levels = grpc=loud (environment EMBEDSERVE_TELEMETRY_LOG_LEVELS): must be "
                    "NAME=VALUE by commas, each value one of debug, info, warning, error, critical"
                ),
            ),
            (
                {"EMBEDSERVE_TELEMETRY_LOG_LEVELS": "grpc"},
                (
                    "telemetry.log_levels = grpc (environment EMBEDSERVE_TELEMETRY_LOG_LEVELS): must be "
                    "NAME=VALUE by commas, each value one of debug, info, warning, error, critical"
                ),
            ),
            (
                {"EMBEDSERVE_TELEMETRY_SERVICE_NAME": ""},
                (
                    "telemetry.service_name = '' (environment EMBEDSERVE_TELEMETRY_SERVICE_NAME): "
                    "must be text of 1 to 255 characters"
                ),
            ),
            (
                {"EMBEDSERVE_SERVER_ADRESS": "127.0.0.1:1"},
                (
                    "EMBEDSERVE_SERVER_ADRESS (environment): there is no such setting; "
                    "did you mean EMBEDSERVE_SERVER_ADDRESS?"
                ),
            ),
            (
                {"EMBEDSERVE_SERVER_PORT": "50051"},
                "EMBEDSERVE_SERVER_PORT (environment): there is no such setting",
            ),
            (
                {"EMBEDSERVE_X": "1"},
                "EMBEDSERVE_X (environment): there is no such setting",
            ),
            (
                {"EMBEDSERVE_ADMISSION_LATENCY_P95_SOFT_MS": "600"},
                (
                    "admission.latency_p95.soft_ms = 600 (environment EMBEDSERVE_ADMISSION_LATENCY_P95_SOFT_MS) and "
                    "admission.latency_p95.hard_ms = 500 (default): admission.latency_p95.soft_ms must be below "
                    "admission.latency_p95.hard_ms: refusals begin at the first"
                ),
            ),
        ],
    )
    def test_environment(self, env, sentence):
        assert problems(env=env) == [sentence]

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            (
                "limits.max_texts = '7'",
                "limits.max_texts = 7 (file {0}: limits.max_texts): must be an integer from 1 to 1000000",
            ),
            (
                "limits.max_texts = true",
                "limits.max_texts = true (file {0}: limits.max_texts): must be an integer from 1 to 1000000",
            ),
            ("server.uvloop = 1", "server.uvloop = 1 (file {0}: server.uvloop): must be true or false"),
            ("limits = 3", "limits = 3 (file {0}): is a table of settings, not a setting"),
            (
                "[server]\nadress = 1",
                "server.adress (file {0}): there is no such setting; did you mean server.address?",
            ),
            ("[sever]\naddress = 'a:1'", "sever (file {0}): there is no such setting; did you mean server?"),
            ("log_level = 'info'", "log_level (file {0}): there is no such setting; did you mean telemetry.log_level?"),
            (
                "admission.throughput = 'on'",
                "admission.throughput = on (file {0}): is a table of settings, not a setting",
            ),
            ("x", "{0}: is not TOML: "),
            (b"\xff", "{0}: is not UTF-8 text: invalid start byte at byte 0"),
        ],
    )
    def test_file(self, text, sentence, toml):
        file = toml(text)
        (problem,) = problems(file=file)
        assert problem.startswith(sentence.format(file))

    def test_a_file_that_is_not_there(self, tmp_path):
        file = str(tmp_path / "none.toml")
        assert problems(file=file) == [f"{file}: cannot be read: No such file or directory"]

    def test_a_flag(self):
        sentence = "limits.max_texts = -1 (flag --limits.max_texts): must be an integer from 1 to 1000000"
        assert problems({"limits.max_texts": "-1"}) == [sentence]

    def test_a_long_value_is_cut_and_an_unprintable_one_is_quoted(self):
        (long,) = problems({"limits.max_texts": "9" * 10_000})
        (unprintable,) = problems({"model.device": "\x1b[2J"})
        assert len(long) < 300
        assert "\x1b" not in unprintable

    def test_all_problems_are_told_at_once(self, toml):
        file = toml("[limits]\nmax_texts = 0\nmax_txt = 1\n")
        env = {"EMBEDSERVE_SERVER_ADRESS": "x", "EMBEDSERVE_SERVER_UVLOOP": "maybe"}
        flags = {"admission.latency_p95.soft_ms": "900", "model.dtype": "int4"}
        found = problems(flags, env, file)
        assert len(found) == 6
        assert {problem.split()[0] for problem in found} == {
            "EMBEDSERVE_SERVER_ADRESS",
            "limits.max_texts",
            "limits.max_txt",
            "server.uvloop",
            "admission.latency_p95.soft_ms",
            "model.dtype",
        }

    def test_a_rule_is_not_judged_on_a_setting_that_is_wrong_by_itself(self):
        found = problems({"admission.latency_p95.soft_ms": "x", "admission.latency_p95.hard_ms": "1"})
        assert [problem.split()[0] for problem in found] == ["admission.latency_p95.soft_ms"]


class TestNearestName:
    """A suggestion is made only where a name is nearly right."""

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("EMBEDSERVE_SEVER_ADDRESS", "EMBEDSERVE_SERVER_ADDRESS"),
            ("EMBEDSERVE_ADDRESS", "EMBEDSERVE_SERVER_ADDRESS"),
            ("EMBEDSERVE_LOG_LEVEL", "EMBEDSERVE_TELEMETRY_LOG_LEVEL"),
            ("EMBEDSERVE_LIMITS_MAX_TEXT", "EMBEDSERVE_LIMITS_MAX_TEXTS"),
            ("EMBEDSERVE_SERVER_MAX_CONCURENT_STREAMS", "EMBEDSERVE_SERVER_MAX_CONCURRENT_STREAMS"),
            ("EMBEDSERVE_ADMISSION_LATENCY_P95_SLO", "EMBEDSERVE_ADMISSION_LATENCY_P95_SLO_MS"),
            ("EMBEDSERVE_CONFG", "EMBEDSERVE_CONFIG"),
        ],
    )
    def test_what_was_meant(self, name, meant):
        (problem,) = problems(env={name: "1"})
        assert problem.endswith(f"; did you mean {meant}?")

    @pytest.mark.parametrize("name", ["EMBEDSERVE_", "EMBEDSERVE_X", "EMBEDSERVE_SERVER_PORT", "EMBEDSERVE_TEST_DELAY"])
    def test_nothing_known(self, name):
        (problem,) = problems(env={name: "1"})
        assert "did you mean" not in problem


class TestThisMachine:
    """Whether model and event loop are here is asked only where they will be used."""

    @pytest.mark.parametrize(
        ("source", "why"),
        [
            ("package:no_such_package", "the Python package 'no_such_package' is not installed here"),
            ("package:os.path", "the Python package 'os.path' is not installed here"),
            ("/no/such/dir", "there is no such directory here"),
            ("./none", "there is no such directory here"),
            ("", "it is empty"),
        ],
    )
    def test_a_model_that_is_not_here(self, source, why):
        (problem,) = problems({"model.source": source}, on_this_machine=True)
        assert f": {why}; must be package:NAME, a local directory, or a hub id" in problem

    def test_a_directory_that_is_here(self, tmp_path):
        assert load_config({"model.source": str(tmp_path)}, {}).config.model.source == str(tmp_path)

    def test_a_client_does_not_need_the_model(self):
        loaded = load_config({"model.source": "/no/such/dir"}, {}, on_this_machine=False)
        assert loaded.config.model.source == "/no/such/dir"

    def test_a_missing_uvloop_is_told_although_it_is_the_default(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvloop" else object())
        (problem,) = problems({}, on_this_machine=True)
        assert problem.startswith("server.uvloop = true (default): uvloop is not installed here")
        assert load_config({"server.uvloop": "false"}, {}).config.server.uvloop is False
