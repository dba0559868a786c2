"""Refuse settings written as options, `--epochs 3` instead of `epochs=3`, and options of other commands."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

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
"""Settings classes of each command, by the prefix of their keys."""
_MAX_SUGGESTIONS = 4


def takes_settings(command: str) -> bool:
    """True if a command takes settings."""
    return command in _SETTINGS


def require_no_setting_flags(
    command: str, arguments: Sequence[str], options: Collection[str], elsewhere: Mapping[str, str]
) -> None:
    """Refuse an unknown option that has the name of a setting, or is one of another command.

    Args:
        command: name of a command that takes settings.
        arguments: arguments after the command.
        options: options of the command.
        elsewhere: options of all commands, each with a command that has it.

    Raises:
        ConfigError: with the setting in its correct form, or the other command.
    """
    names = list(
        dict.fromkeys(name for prefix, model in _SETTINGS[command].items() for name in setting_names(model, prefix))
    )
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if argument == "--":
            return
        if not flag.startswith("--") or flag in options:
            continue
        if not equals:
            following = arguments[index + 1 : index + 2]
            value = following[0] if following and not following[0].startswith("-") else "VALUE"
        word = flag.removeprefix("--").replace("-", "_")
        matches = [name for name in names if word in (name, name.rpartition(".")[2])]
        if not matches and flag in elsewhere:
            other = elsewhere[flag]
            raise ConfigError(
                "option",
                flag,
                f"is an option of `cllm4rec {other}`, not of {command}",
                f"Leave it out here, and give it to {other}.",
            )
        matches = matches or _similar_settings(word, names, options)
        if matches:
            shown = " or ".join(f"{name}={value}" for name in matches[:_MAX_SUGGESTIONS])
            rule = "is no option but a setting, which is written without dashes"
            raise ConfigError(flag, None if value == "VALUE" else value, rule, f"Write {shown}.")


def _similar_settings(word: str, names: Sequence[str], options: Collection[str]) -> list[str]:
    """Return settings whose last part is spelt like a word, unless an option is."""
    if closest(f"--{word.replace('_', '-')}", options) is not None:
        return []
    last_parts = [name.rpartition(".")[2] for name in names]
    near = closest(word, last_parts)
    return [name for name, last in zip(names, last_parts, strict=True) if last == near]
