"""Settings as flags of a command.

Decides how a flag is called, what its help says, and how what click parsed becomes settings. Must never know what a
command does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import click

from embedserve.config import Config, Loaded, load_config
from embedserve.settings import CONFIG_FILE_ENV, render, settings_of

__all__ = ["load_flags", "parameter_of", "setting_flags"]

ALIASES = {
    "server.address": "--address",
    "model.source": "--model",
    "server.frontends": "--frontends",
    "model.device": "--device",
    "model.devices": "--devices",
    "model.dtype": "--dtype",
}

Command = Callable[..., int]


def setting_flags(*paths: str) -> Callable[[Command], Command]:
    """Add ``--config`` and a flag for each of the settings ``paths``; for every setting where none is named."""

    def decorate(command: Command) -> Command:
        for setting in reversed(settings_of(Config)):
            if paths and setting.path not in paths:
                continue
            alias = [ALIASES[setting.path]] if setting.path in ALIASES else []
            shown = render(setting.default) or "empty"
            command = click.option(
                setting.flag,
                *alias,
                parameter_of(setting.path),
                metavar="VALUE",
                help=f"{' '.join(setting.meaning.split())} Allowed: {setting.allowed}. Default: {shown}.",
            )(command)
        return click.option(
            "--config",
            "config_file",
            metavar="PATH",
            help=f"TOML file with settings; otherwise {CONFIG_FILE_ENV} names one.",
        )(command)

    return decorate


def parameter_of(path: str) -> str:
    """Name of the Python argument that a setting's flag arrives in; no other argument has two underscores in a row."""
    return path.replace(".", "__")


def load_flags(config_file: str | None, arguments: Mapping[str, str | None], *, on_this_machine: bool) -> Loaded:
    """Read the settings with what click parsed as their flags; ``arguments`` may hold other options too."""
    paths = {parameter_of(setting.path): setting.path for setting in settings_of(Config)}
    flags = {paths[name]: text for name, text in arguments.items() if name in paths and text is not None}
    return load_config(flags, file=config_file, on_this_machine=on_this_machine)
