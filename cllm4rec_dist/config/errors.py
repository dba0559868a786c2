"""Turn pydantic's validation errors into messages with the key, the rule and the closest valid name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.suggestions import closest, decimal_hint

_MAX_VALUE = 80
"""Characters of a value in a message."""


def config_error(
    model: type[BaseModel], error: ValidationError, source: str, overridden: Sequence[str] = ()
) -> ConfigError:
    """Return one error that names every violation.

    Args:
        model: model that was validated.
        source: file or other origin of the configuration.
        overridden: dotted keys given as overrides. If all violations are theirs, the error says so.
    """
    fields, clauses, cures = [], [], []
    errors = _without_consequences(error.errors())
    if all(_is_overridden(each, _section(model, each["loc"])[1], overridden) for each in errors):
        source = f"override of {source}"
    for each in errors:
        section, path = _section(model, each["loc"])
        fields.append(path)
        clauses.append(_clause(each, path, section))
        cures.append(_cure(each, path, section))
    return ConfigError(source, fields, f"is invalid: {'; '.join(clauses)}", " ".join(dict.fromkeys(cures)))


def _without_consequences(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Leave out that a list is too short if entries of it are wrong, which pydantic does not count."""
    longer = {each["loc"][:length] for each in errors for length in range(len(each["loc"]))}
    return [each for each in errors if each["type"] != "too_short" or each["loc"] not in longer]


def _is_overridden(error: ErrorDetails, path: str, overridden: Sequence[str]) -> bool:
    """Return True if an override has set the wrong value, or has made the section that does not exist."""
    is_unknown = error["type"] == "extra_forbidden"
    return any(
        f"{path}.".startswith(f"{key}.") or (is_unknown and f"{key}.".startswith(f"{path}.")) for key in overridden
    )


def _clause(error: ErrorDetails, path: str, section: type[BaseModel] | None) -> str:
    """Describe one violation, with the closest valid key or value."""
    value, context = error.get("input"), error.get("ctx", {})
    key = path.rpartition(".")[2]
    match error["type"]:
        case "extra_forbidden":
            return f"{path} is not a key of {_name(path)}{_hint(key, _keys(section))}"
        case "missing":
            return f"{path} is missing"
        case "literal_error":
            choices = _words(str(context["expected"]))
            return f"{path}: {value!r} is not one of {', '.join(choices)}{_hint(str(value), choices)}"
        case "union_tag_invalid":
            field, tags = str(context["discriminator"]).strip("'"), _words(str(context["expected_tags"]))
            wrong = str(context["tag"])
            return f"{path}.{field}: {wrong!r} is not one of {', '.join(tags)}{_hint(wrong, tags)}"
        case "union_tag_not_found":
            return f"{path}.{str(context['discriminator']).strip(chr(39))} is missing"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{path} must be a section of keys (got {value!r:.{_MAX_VALUE}})"
        case "tuple_type" | "list_type":
            return f"{path} must be a list (got {value!r:.{_MAX_VALUE}})"
        case _:
            return f"{path or '(whole)'}: {error['msg'].removeprefix('Value error, ')} (got {value!r:.{_MAX_VALUE}})"


def _cure(error: ErrorDetails, path: str, section: type[BaseModel] | None) -> str:
    """Return the cure of one violation: the valid keys, or how to write the value."""
    value = error.get("input")
    if error["type"] in ("tuple_type", "list_type"):
        if value is None:
            return f"Leave {path} out for its default, or write a list."
        items = ", ".join(str(value).replace(",", " ").split()) if isinstance(value, str) else value
        return f"Write {path}: [{items}], or {path}=[{items}] as an override."
    if error["type"] == "extra_forbidden":
        return f"Keys of {_name(path)}: {', '.join(_keys(section))}."
    if error["type"] == "float_parsing" and (hint := decimal_hint(str(value))):
        return hint.strip()
    others = "`cllm4rec settings recipe` those of a recipe, `cllm4rec settings baselines` those of the baselines"
    return f"`cllm4rec settings` explains every key of a run, {others}."


def _hint(word: str, choices: Iterable[str]) -> str:
    suggestion = closest(word, choices)
    return "" if suggestion is None else f" (did you mean {suggestion!r}?)"


def _name(path: str) -> str:
    return path.rpartition(".")[0] or "the file"


def _keys(section: type[BaseModel] | None) -> list[str]:
    return [] if section is None else list(section.model_fields)


def _words(text: str) -> list[str]:
    """Split a list such as "'a', 'b' or 'c'"."""
    return [word.strip(" '\"") for word in text.replace(" or ", ",").split(",") if word.strip(" '\"")]


def _section(model: type[BaseModel], location: Sequence[int | str]) -> tuple[type[BaseModel] | None, str]:
    """Return the section of a violation and its dotted key, without the union tags that pydantic adds to locations."""
    path: list[str] = []
    section: type[BaseModel] | None = model
    choices: list[type[BaseModel]] = [model]
    for index, part in enumerate(location):
        tagged = [choice for choice in choices if part in _tags(choice)]
        if len(choices) > 1 and tagged:
            choices = tagged
            continue
        section = choices[0] if len(choices) == 1 else None
        path.append(str(part))
        if index + 1 < len(location):
            field = None if section is None else section.model_fields.get(str(part))
            choices = [] if field is None else list(_models(field.annotation))
    return section, ".".join(path)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, UnionType):
        for part in get_args(annotation):
            yield from _models(part)


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """Return the values of a model's discriminator fields."""
    return tuple(
        tag
        for field in model.model_fields.values()
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
        for tag in get_args(field.annotation)
    )
