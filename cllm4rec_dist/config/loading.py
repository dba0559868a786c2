"""Load a configuration: frozen, validated once, every field documented, unknown keys refused.

`StrictModel` is the base of all configurations (runs in `schema.py`, recipes in `corpus/recipe.py`). A file is YAML;
`key.sub=value` overrides are applied before validation, so that no value changes after it is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from cllm4rec_dist.config.errors import config_error
from cllm4rec_dist.config.renames import require_new_keys
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.suggestions import did_you_mean_path


class StrictModel(BaseModel):
    """A frozen section of a configuration; refuses unknown keys, numbers for texts and booleans for numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)
    renamed_keys: ClassVar[Mapping[str, str]] = {}
    """Old dotted keys, refused with their new name."""
    file_kind: ClassVar[str | None] = None
    """Kind of file, for errors; None for a section of a file."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, values: object) -> object:
        """Turn booleans, which pydantic reads as 0 and 1, into text, which it refuses by the name of the field."""
        if not isinstance(values, Mapping):
            return values
        types = {key: set(_types(field.annotation)) for key, field in cls.model_fields.items()}
        numbers = {key for key, allowed in types.items() if allowed & {int, float} and bool not in allowed}
        return {key: _with_booleans_as_text(value) if key in numbers else value for key, value in values.items()}


def _with_booleans_as_text(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_with_booleans_as_text(each) for each in value]
    return str(value).lower() if isinstance(value, bool) else value


def _types(annotation: Any) -> Iterator[Any]:
    """Yield the types of a union, or of the entries of a tuple."""
    if get_origin(annotation) in (Annotated, Union, UnionType, tuple):
        for part in get_args(annotation):
            yield from _types(part)
    else:
        yield annotation


ModelT = TypeVar("ModelT", bound=StrictModel)
_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which YAML would silently use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    """Parse YAML into plain values.

    Raises:
        ValueError: for invalid YAML, including impossible dates and too deep nesting.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        raise ValueError(_on_one_line(error)) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _on_one_line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
    hint = "; YAML indents with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
    return f"{error.problem}{where}{hint}"


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        key, colon, value = override.partition(":")
        example = f"{key.strip()}={value.strip()}" if colon and key.strip() else "for example optimizer.lr=1e-3"
        raise ConfigError("override", override, "must look like section.key=value", f"Write {example}.")
    *sections, leaf = dotted.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(
                "override", override, f"goes below {section!r}, which is a value", "Name an existing section."
            )
        node = child
    try:
        value = _parse_yaml(text)
    except ValueError as error:
        raise ConfigError(
            "override", override, f"has a value that is not YAML ({error})", "Quote the value."
        ) from error
    # YAML 1.1 reads 1e-3 as text; here it is a number.
    node[leaf] = float(text) if _SCIENTIFIC.fullmatch(text) else value


def _read_yaml(model: type[StrictModel], path: Path) -> dict[str, Any]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        hint = did_you_mean_path(str(path))
        raise ConfigError("configuration file", str(path), what, f"Give the path of a YAML file.{hint}")
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "configuration file", str(path), f"is not readable YAML ({error})", "Fix the file."
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError("configuration file", str(path), "must consist of key: value pairs", _examples(model))
    return tree


def _require_kind(model: type[StrictModel], tree: Mapping[str, Any], source: str) -> None:
    """Refuse a file of another kind than `model`: a recipe for a run, a run for a recipe."""
    kind = next((kind for kind, key in _KEY_OF_KIND.items() if key in tree), None)
    if kind is not None and model.file_kind is not None and kind != model.file_kind:
        raise ConfigError(source, kind, f"is not {model.file_kind}", f"Give {model.file_kind}. {_examples(model)}")


def _examples(model: type[StrictModel]) -> str:
    """Return a sentence that says where to find what such a file looks like."""
    command = _COMMAND_OF_KIND.get(model.file_kind or "")
    if command is not None:
        return f"`{command}` explains its keys."
    return "See examples: recipes are in shards/, run configurations in launch/configs/."


_KEY_OF_KIND = {"a recipe": "source", "a run configuration": "output", "settings of a small backbone": "vocab_size"}
"""Kinds of files, with a key that only this kind has."""
_COMMAND_OF_KIND = {
    "settings of a small backbone": "cllm4rec settings backbone",
    "settings of baselines": "cllm4rec settings baselines",
}
"""Commands that print the keys of files of which there are no examples."""


def load_config(model: type[ModelT], path: str | Path | None = None, overrides: Sequence[str] = ()) -> ModelT:
    """Read a YAML file, apply dotted overrides and validate once.

    Args:
        model: the configuration class.
        path: YAML file, or None to start from the defaults.
        overrides: `section.key=value` texts; the value is read as YAML.

    Raises:
        ConfigError: for an unreadable file, an unknown key, a wrong type or range; names every violation.
    """
    tree = {} if path is None else _read_yaml(model, Path(path))
    if path is not None:
        _require_kind(model, tree, str(path))
    for override in overrides:
        _apply_override(tree, override)
    keys = [override.partition("=")[0] for override in overrides]
    return validate(model, tree, source=str(path) if path is not None else "configuration", overridden=keys)


def validate(model: type[ModelT], tree: dict[str, Any], source: str, overridden: Sequence[str] = ()) -> ModelT:
    """Validate a plain tree as `model`; one ConfigError names every violation.

    Args:
        source: file or other origin, for errors.
        overridden: dotted keys whose values are those of overrides.
    """
    require_new_keys(tree, model.renamed_keys, source)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise config_error(model, error, source, overridden) from None


def path_override(key: str, path: str | Path) -> str:
    """Return the override that sets a path, in which `$` is no variable."""
    return f"{key}={json.dumps(str(path).replace('$', '$$'))}"


def dotted_items(tree: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values of nested settings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from dotted_items(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", value
