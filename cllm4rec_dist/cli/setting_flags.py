"""Settings that were written as options: `--epochs 3` for `epochs=3`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pydantic import BaseModel

from cllm4rec_dist.cli.settings_reference import setting_names
from cllm4rec_dist.config import BackboneConfig, RunConfig
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.suggestions import closest

_SETTINGS: dict[str, dict[str, type[BaseModel]]] = {
    "pretrain": {"": RunConfig},
    "finetune": {"": RunConfig},
    "plan": {"": RunConfig},
    "prepare": {"": PrepareConfig},
    "build-backbone": {"": BackboneConfig},
    "run": {"": RunConfig, "recipe.": PrepareConfig, "backbone.": BackboneConfig},
}
"""Classes of the settings that a command takes, by what their keys begin with there."""
_MOST = 4
"""Settings that a message names."""


def takes_settings(command: str) -> bool:
    """True for a command that settings can be given to."""
    return command in _SETTINGS


def require_no_setting_flags(command: str, arguments: Sequence[str], options: Collection[str]) -> None:
    """Refuse an option that a command does not have and that is a setting by its name.

    Args:
        command: that takes settings.
        arguments: behind it.
        options: that it has.

    Raises:
        ConfigError: with the setting as it is written.
    """
    names = list(
        dict.fromkeys(name for prefix, model in _SETTINGS[command].items() for name in setting_names(model, prefix))
    )
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if argument == "--":
            return
        if not flag.startswith("--") or flag in options:
            continue
        if not equals:
            following = arguments[place + 1 : place + 2]
            value = following[0] if following and not following[0].startswith("-") else "VALUE"
        found = _meant(flag.removeprefix("--").replace("-", "_"), names, options)
        if found:
            shown = " or ".join(f"{name}={value}" for name in found[:_MOST])
            rule = "is no option but a setting, which is written without dashes"
            raise ConfigError(flag, None if value == "VALUE" else value, rule, f"Write {shown}.")


def _meant(word: str, names: Sequence[str], options: Collection[str]) -> list[str]:
    """Settings that have a word as their key or its last part; else those spelt like it, if no option is."""
    found = [name for name in names if word in (name, name.rpartition(".")[2])]
    if found or closest(f"--{word.replace('_', '-')}", options) is not None:
        return found
    last_parts = [name.rpartition(".")[2] for name in names]
    near = closest(word, last_parts)
    return [name for name, last in zip(names, last_parts, strict=True) if last == near]
