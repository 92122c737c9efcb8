"""Several devices: what may be named, and what each engine process is told."""

from __future__ import annotations

import pytest

from embedserve.config import Config, load_config
from embedserve.errors import ConfigError
from embedserve.frontends import supervisor
from embedserve.frontends.supervisor import engine_settings, front_end_settings
from embedserve.settings import settings_of
from embedserve.wiring import device_name

ADDRESSES = ("127.0.0.1:50051",)


def config_of(**flags: str) -> Config:
    return load_config({name.replace("__", "."): text for name, text in flags.items()}, {}).config


def problems(**flags: str) -> list[str]:
    with pytest.raises(ConfigError) as wrong:
        load_config({name.replace("__", "."): text for name, text in flags.items()}, {})
    return wrong.value.problems


class TestWhatMayBeNamed:
    @pytest.mark.parametrize("devices", ["cuda:0,cuda:1", "cpu,cpu", "cuda:3", "cpu", ",".join(["cpu"] * 16)])
    def test_gpus_each_once_or_a_cpu_as_often_as_there_are_to_be_engines(self, devices):
        assert ",".join(config_of(model__devices=devices).model.devices) == devices

    @pytest.mark.parametrize(
        ("devices", "why"),
        [
            ("cuda:0,cuda:0", "a GPU is named twice"),
            ("cuda:1,cuda:01", "'cuda:01' is none"),
            ("cpu,cuda:0", "do not give the same vectors"),
            ("cuda", "'cuda' is none"),
            ("auto", "'auto' is none"),
            ("cuda:0,", "'' is none"),
            (",".join(["cpu"] * 17), "more than 16"),
        ],
    )
    def test_what_is_refused_is_told_with_why(self, devices, why):
        (problem,) = problems(model__devices=devices)
        assert why in problem
        assert "must be cuda:N, each once, or cpu, up to 16" in problem

    @pytest.mark.parametrize("empty", ["", " ", "[]"])
    def test_empty_is_one_engine_on_the_one_device_and_takes_back_what_a_file_says(self, empty, tmp_path):
        """It is what a variable or a flag can say against a file; and the sentence of a mistake offers it."""
        file = tmp_path / "e.toml"
        file.write_text('[model]\ndevices = ["cuda:0", "cuda:1"]\ndevice = "auto"\n')
        for flags, env in (({"model.devices": empty}, {}), ({}, {"EMBEDSERVE_MODEL_DEVICES": empty})):
            config = load_config(flags | {"model.device": "cpu"}, env, file=str(file)).config
            assert config.model.devices == ()
            assert device_name(config) == "cpu"
            assert list(engine_settings(config, ADDRESSES)) == ["engine"]
        (setting,) = (setting for setting in settings_of(Config) if setting.path == "model.devices")
        assert "or empty" in setting.allowed
        assert "Empty: one engine, on model.device." in " ".join(setting.meaning.split())

    def test_what_contradicts_another_setting_names_both(self):
        (both,) = problems(model__devices="cpu,cpu", model__device="cpu")
        assert both.startswith("model.device = cpu (flag --model.device) and model.devices = cpu,cpu")
        (unix,) = problems(model__devices="cpu,cpu", server__address="unix:/run/e.sock")
        assert "server.address" in unix
        assert "model.devices" in unix

    def test_one_of_several_is_the_device(self):
        assert device_name(config_of(model__devices="cuda:3")) == "cuda:3"


class TestEngines:
    def test_each_has_its_device_and_a_name(self):
        made = engine_settings(config_of(model__devices="cuda:2,cuda:0"), ADDRESSES)
        assert {name: device_name(config) for name, config in made.items()} == {
            "engine-0": "cuda:2",
            "engine-1": "cuda:0",
        }

    def test_one_device_is_one_engine_as_it_was(self):
        (alone,) = engine_settings(Config(), ADDRESSES).items()
        assert (alone[0], alone[1].model) == ("engine", Config().model)
        (named,) = engine_settings(config_of(model__devices="cpu"), ADDRESSES).items()
        assert (named[0], device_name(named[1]), named[1].model.threads) == ("engine", "cpu", None)

    @pytest.mark.parametrize(
        ("cores", "engines", "dealt"), [(2, 2, [1, 1]), (5, 2, [2, 3]), (5, 3, [1, 2, 2]), (2, 3, [1, 1, 1])]
    )
    def test_cores_are_dealt_out_and_none_twice(self, monkeypatch, cores, engines, dealt):
        monkeypatch.setattr(supervisor, "core_count", lambda: cores)
        made = engine_settings(config_of(model__devices=",".join(["cpu"] * engines)), ADDRESSES)
        assert [config.model.threads for config in made.values()] == dealt

    def test_cores_that_are_said_are_each_engines(self):
        made = engine_settings(config_of(model__devices="cpu,cpu", model__threads="3"), ADDRESSES)
        assert [config.model.threads for config in made.values()] == [3, 3]

    def test_a_front_end_sizes_what_it_sends_as_an_engine_does(self):
        config = front_end_settings(config_of(model__devices="cuda:2,cuda:0"), ADDRESSES)
        assert device_name(config) == "cuda:2"
