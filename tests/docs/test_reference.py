"""The reference pages have every setting, recipe key, command and option."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from pydantic import BaseModel
from typer.main import get_command

from cllm4rec_dist.cli import app
from cllm4rec_dist.config import BackboneConfig, RunConfig
from cllm4rec_dist.corpus.recipe import ItemTable, PrepareConfig, RecboleSource
from cllm4rec_dist.corpus.split_settings import UsersSplit
from cllm4rec_dist.evaluation.baseline_config import BaselineConfig
from docs.reference import backbone_settings, baseline_settings, commands, recipe_keys, run_settings


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a class, written apart from the code under test."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_settings_have_type_default_and_meaning() -> None:
    page = run_settings()
    for model, text in (
        (RunConfig, page),
        (BackboneConfig, backbone_settings()),
        (BaselineConfig, baseline_settings()),
    ):
        for key in keys(model):
            assert f"`{key}` <small>" in text, key
    assert "`optimizer.lr` <small>number, &gt; 0; default `0.001`</small>\n:   Peak learning rate" in page
    assert "`corpus` <small>text; required</small>" in page


def test_recipe_keys_of_all_formats_and_splits() -> None:
    page = recipe_keys()
    expected = (*keys(RecboleSource, "source."), *keys(ItemTable, "source.items."), *keys(UsersSplit, "split."))
    for key in (*expected, *(set(keys(PrepareConfig)) - {"source", "split"})):
        assert f"`{key}` <small>" in page, key
    for name in ("recbole", "grouplens", "amazon", "yelp", "steam", "mind", "sequences", "table", "synthetic"):
        assert f"## `source` (`{name}`)" in page


@pytest.mark.parametrize(
    "page", [run_settings() + backbone_settings() + baseline_settings(), recipe_keys()], ids=["settings", "recipe"]
)
def test_every_anchor_comes_once(page: str) -> None:
    anchors = re.findall(r'id="([^"]+)"', page)
    assert anchors
    assert len(anchors) == len(set(anchors))


def test_commands_with_all_options() -> None:
    page = commands()
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"## {name}\n" in page
        shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
        for option in (name for parameter in shown for name in parameter.opts if name.startswith("-")):
            assert re.search(rf"`[^`\n]*{option}\b[^`\n]*`\n:   \S", page), f"{name} {option}"
