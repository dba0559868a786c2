"""Every setting as text: name, type, default and meaning, read from the classes that check them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cllm4rec_dist.config import BackboneConfig, RunConfig
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.suggestions import did_you_mean

_WIDTH = 79
_INDENT = " " * 4
_ROOTS: dict[str, type[BaseModel]] = {"recipe": PrepareConfig, "backbone": BackboneConfig}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def describe_settings(section: str | None = None) -> str:
    """Settings of a run, of one of its sections, of `recipe` (or `recipe.SECTION`) or of `backbone`.

    Raises:
        ConfigError: for a section that there is not.
    """
    if section is None:
        others = ", ".join(f"`cllm4rec settings {name}`" for name in _ROOTS)
        title = f"Settings of a run (pretrain, finetune). Others: {others}."
        return "\n".join([*_wrapped(title, ""), *_section(RunConfig, "")])
    root, _, rest = section.partition(".")
    models: list[type[BaseModel]] = [_ROOTS.get(root, RunConfig)]
    names = [name for name in (rest if root in _ROOTS else section).split(".") if name]
    prefix = ""
    for number, name in enumerate(names):
        found = [inner for model in models for key, inner in _subsections(model) if name in (key, _tag(inner))]
        key = next((key for model in models for key, inner in _subsections(model) if inner in found), name)
        if not found and number + 1 == len(names):
            fields = [model.model_fields[name] for model in models if name in model.model_fields]
            lines = [line for field in fields[:1] for line in _setting(f"{prefix}{name}", field)]
            if lines:
                return "\n".join(lines[1:])
        if not found:
            raise _unknown(name, models, root in _ROOTS)
        models, prefix = found, f"{prefix}{key}."
    parts = [[*_wrapped(_title(prefix.rstrip("."), model), ""), *_section(model, prefix)] for model in models]
    return "\n\n".join("\n".join(part) for part in parts)


def setting_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all settings of a class; one that several sections in a place have comes more than once."""
    nested = {key for key, _ in _subsections(model)}
    yield from (f"{prefix}{name}" for name in model.model_fields if name not in nested)
    for key, inner in _subsections(model):
        yield from setting_names(inner, f"{prefix}{key}.")


def _unknown(name: str, models: Sequence[type[BaseModel]], is_rooted: bool) -> ConfigError:
    known = [name for model in models for key, inner in _subsections(model) for name in (key, _tag(inner)) if name]
    known = list(dict.fromkeys(known if is_rooted else [*known, *_ROOTS]))
    keys = [key for model in models for key in model.model_fields]
    cure = f"Give one of {', '.join(known)}, or none for all.{did_you_mean(name, [*known, *keys])}"
    return ConfigError("section", name, "is no section of settings", cure)


def _section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Values of a section first, then the sections in it."""
    nested = {key for key, _ in _subsections(model)}
    for name, field in model.model_fields.items():
        if name not in nested:
            yield from _setting(f"{prefix}{name}", field)
    for key, inner in _subsections(model):
        yield ""
        yield from _wrapped(_title(f"{prefix}{key}", inner), "")
        yield from _section(inner, f"{prefix}{key}.")


def _title(path: str, model: type[BaseModel]) -> str:
    tag = _tag(model)
    return f"{path}{f' ({tag})' if tag else ''}: {_first_sentence(model)}" if path else _first_sentence(model)


def _setting(name: str, field: FieldInfo) -> Iterator[str]:
    yield ""
    bounds = [
        f"{sign} {getattr(rule, key)}" for rule in field.metadata for key, sign in _BOUNDS.items() if hasattr(rule, key)
    ]
    kind = ", ".join([_type(field.annotation), *bounds])
    default = "required" if field.is_required() else f"default {_value(field.get_default())}"
    yield from _wrapped(f"{name}  ({kind}; {default})", "")
    yield from _wrapped(" ".join((field.description or "").split()), _INDENT)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent or _INDENT, break_on_hyphens=False
    )


def _first_sentence(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def _subsections(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Keys and classes of the sections in a section; a key that takes one of several comes with each."""
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
    """The word by which a section is told from others in its place; empty where it has none."""
    for field in model.model_fields.values():
        values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        if len(values) == 1:
            return str(values[0])
    return ""


def _type(annotation: Any) -> str:
    """A type in words."""
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
