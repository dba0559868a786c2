"""What the reference pages say, made from the code when the site is built: settings, recipe keys and commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

from pydantic import BaseModel
from typer.main import get_command

from cllm4rec_dist.cli import app
from cllm4rec_dist.cli.settings_reference import Section, list_sections
from cllm4rec_dist.config import BackboneConfig, RunConfig
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.evaluation.baseline_config import BaselineConfig


def run_settings() -> str:
    """Markdown of every setting of a run."""
    return _sections(RunConfig, "Run")


def backbone_settings() -> str:
    """Markdown of every setting of a small backbone, without a heading."""
    return _sections(BackboneConfig, "", "backbone-")


def baseline_settings() -> str:
    """Markdown of every setting of the baselines, without a heading."""
    return _sections(BaselineConfig, "", "baselines-")


def recipe_keys() -> str:
    """Markdown of every key of a recipe."""
    return _sections(PrepareConfig, "Recipe")


def commands() -> str:
    """Markdown of every command with its arguments and options."""
    group = get_command(app)
    context = group.context_class(group, info_name="cllm4rec")
    parts: list[str] = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]  # typer's group, its class is private
        child = command.context_class(command, info_name=name, parent=context)
        usage = command.get_usage(child).removeprefix("Usage: ")
        parts += [f"## {name}", command.help or "", f"```text\n{usage}\n```"]
        records = [parameter.get_help_record(child) for parameter in command.params]
        parts += [_definition(f"`{label}`", meaning) for label, meaning in filter(None, records)]
    return "\n\n".join(parts)


def _sections(model: type[BaseModel], root: str, anchor: str = "") -> str:
    return "\n".join(line for section in list_sections(model) for line in _section(section, root, anchor))


def _section(section: Section, root: str, anchor: str) -> Iterator[str]:
    """A heading, the section's meaning, and a definition for each setting; no heading where `root` is empty."""
    heading = f"`{section.path}`" if section.path else root
    if heading:
        tag = f" (`{section.tag}`)" if section.tag else ""
        yield f"## {heading}{tag}\n\n{_linked(section.meaning)}\n"
    anchor += f"{section.tag}-" if section.tag else ""
    for setting in section.settings:
        default = "required" if setting.default is None else f"default `{setting.default}`"
        name = f'<span id="{anchor}{setting.key}"></span>`{setting.key}`'
        yield _definition(f"{name} <small>{escape(setting.type)}; {default}</small>", setting.meaning) + "\n"


def _definition(term: str, meaning: str) -> str:
    return f"{term}\n:   {_linked(meaning)}"


def _linked(text: str) -> str:
    """Markdown of a plain text: outside of code, signs of Markdown are escaped and pages are linked."""
    parts = text.split("`")  # code is at the odd places
    parts[::2] = [
        re.sub(r"docs/([a-z-]+)\.md", r"[\1](\1.md)", re.sub(r"([<>\[\]*])", r"\\\1", part)) for part in parts[::2]
    ]
    return "`".join(parts)
