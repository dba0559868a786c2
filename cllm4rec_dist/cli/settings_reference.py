"""Every setting with its type, default and meaning, read from the classes that check them.

`cllm4rec settings` prints them; the reference pages of the documentation are made of the same lists.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cllm4rec_dist.config import BackboneConfig, RunConfig
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.evaluation.baseline_config import BaselineConfig
from cllm4rec_dist.suggestions import did_you_mean

_WIDTH = 79
_INDENT = " " * 4
_ROOTS: dict[str, type[BaseModel]] = {
    "recipe": PrepareConfig,
    "backbone": BackboneConfig,
    "baselines": BaselineConfig,
}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Setting:
    """One setting as text."""

    key: str
    """Dotted, from the root of its file."""
    type: str
    """Type and bounds in words."""
    default: str | None
    """None if the setting is required."""
    meaning: str


@dataclass(frozen=True)
class Section:
    """Settings of one class."""

    path: str
    """Dotted; empty for the root of a file."""
    tag: str
    """The value by which this section is chosen where a key takes one of several (`table`, a `format`); or empty."""
    meaning: str
    settings: tuple[Setting, ...]

    @property
    def name(self) -> str:
        """Path and tag; empty for the root of a file."""
        return f"{self.path} ({self.tag})" if self.tag and self.path else self.path


def list_sections(model: type[BaseModel], path: str = "") -> Iterator[Section]:
    """The section of a class, then the sections in it, depth first."""
    sections = list(_subsections(model))
    nested = {key for key, _ in sections}
    prefix = f"{path}." if path else ""
    settings = (_setting(f"{prefix}{key}", field) for key, field in model.model_fields.items() if key not in nested)
    yield Section(path, _tag(model), _first_sentence(model), tuple(settings))
    for key, inner in sections:
        yield from list_sections(inner, f"{prefix}{key}")


def describe_settings(section: str | None = None) -> str:
    """Describe the settings of a run, one of its sections, `recipe` (or `recipe.SECTION`), `backbone` or `baselines`.

    Raises:
        ConfigError: for an unknown section.
    """
    if section is None:
        others = ", ".join(f"`cllm4rec settings {name}`" for name in _ROOTS)
        title = f"Settings of a run (pretrain, finetune). Others: {others}."
        return "\n".join(_lines(RunConfig, "", title))
    root, _, rest = section.partition(".")
    models: list[type[BaseModel]] = [_ROOTS.get(root, RunConfig)]
    names = [name for name in (rest if root in _ROOTS else section).split(".") if name]
    prefix = ""
    for index, name in enumerate(names):
        sections = [inner for model in models for key, inner in _subsections(model) if name in (key, _tag(inner))]
        key = next((key for model in models for key, inner in _subsections(model) if inner in sections), name)
        if not sections and index + 1 == len(names):
            fields = [model.model_fields[name] for model in models if name in model.model_fields]
            if fields:
                return "\n".join(_setting_lines(_setting(f"{prefix}{name}", fields[0])))
        if not sections:
            raise _unknown_section(name, models, root in _ROOTS)
        models, prefix = sections, f"{prefix}{key}."
    return "\n\n".join("\n".join(_lines(model, prefix.rstrip("."))) for model in models)


def setting_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Return the dotted keys of all settings of a class; a key that alternative sections share is repeated."""
    return (f"{prefix}{setting.key}" for section in list_sections(model) for setting in section.settings)


def _unknown_section(name: str, models: Sequence[type[BaseModel]], is_rooted: bool) -> ConfigError:
    sections = [name for model in models for key, inner in _subsections(model) for name in (key, _tag(inner)) if name]
    sections = list(dict.fromkeys(sections if is_rooted else [*sections, *_ROOTS]))
    keys = [key for model in models for key in model.model_fields]
    cure = f"Give one of {', '.join(sections)}, or none for all.{did_you_mean(name, [*sections, *keys])}"
    return ConfigError("section", name, "is no section of settings", cure)


def _lines(model: type[BaseModel], path: str, title: str = "") -> Iterator[str]:
    """Settings of a class and of the sections in it; each section begins with its name and meaning, or `title`."""
    for position, section in enumerate(list_sections(model, path)):
        if position:
            title = ""
            yield ""
        yield from _wrapped(title or ": ".join(filter(None, (section.name, section.meaning))), "")
        for setting in section.settings:
            yield ""
            yield from _setting_lines(setting)


def _setting_lines(setting: Setting) -> Iterator[str]:
    default = "required" if setting.default is None else f"default {setting.default}"
    yield from _wrapped(f"{setting.key}  ({setting.type}; {default})", "")
    yield from _wrapped(setting.meaning, _INDENT)


def _setting(key: str, field: FieldInfo) -> Setting:
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(rule, name)
    ]
    default = None if field.is_required() else _value(field.get_default())
    meaning = " ".join((field.description or "").split())
    return Setting(key, ", ".join([_type(field.annotation), *bounds]), default, meaning)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent or _INDENT, break_on_hyphens=False
    )


def _first_sentence(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def _subsections(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield keys and classes of the subsections; a key with alternative classes comes once per class."""
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            yield name, inner


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, UnionType):
        for part in get_args(annotation):
            yield from _models(part)


def _tag(model: type[BaseModel]) -> str:
    """Return the discriminator value of a section among alternatives; empty if it has none."""
    for field in model.model_fields.values():
        values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        if len(values) == 1:
            return str(values[0])
    return ""


def _type(annotation: Any) -> str:
    """Describe a type in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is NoneType:
        return "null"
    if origin is Annotated:
        return _type(parts[0])
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in parts)
    if origin is tuple:
        inner = [_type(part) for part in parts if part is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in parts else f"list of {len(inner)}: {', '.join(inner)}"
    return {str: "text", int: "whole number", float: "number", bool: "true | false"}.get(annotation, str(annotation))


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if str(value) else '""'
