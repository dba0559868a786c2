"""Every setting is printed with its type, default and meaning, in lines that a terminal holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from cllm4rec_dist.cli.settings_reference import describe_settings
from cllm4rec_dist.config import BackboneConfig, RunConfig
from cllm4rec_dist.corpus.recipe import ItemTable, PrepareConfig
from cllm4rec_dist.corpus.split_settings import LastSplit
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.evaluation.baseline_config import BaselineConfig


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a class, written apart from the code under test."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize(
    ("section", "model"), [(None, RunConfig), ("backbone", BackboneConfig), ("baselines", BaselineConfig)]
)
def test_every_setting_is_there(section: str | None, model: type[BaseModel]) -> None:
    lines = describe_settings(section).splitlines()
    for key in keys(model):
        assert any(line.startswith(f"{key}  (") for line in lines), key


def test_a_recipe_has_all_its_formats_and_splits() -> None:
    text = describe_settings("recipe")
    for name in ("recbole", "grouplens", "amazon", "yelp", "steam", "mind", "sequences", "table", "synthetic"):
        assert f"source ({name}): " in text
    for key in (
        *keys(LastSplit, "split."),
        *keys(ItemTable, "source.items."),
        *(set(keys(PrepareConfig)) - {"source"}),
    ):
        assert key == "split" or f"\n{key}  (" in text, key


@pytest.mark.parametrize("section", [None, "recipe", "backbone", "baselines", "optimizer", "recipe.table"])
def test_lines_fit_a_terminal(section: str | None) -> None:
    assert max(map(len, describe_settings(section).splitlines())) <= 80


def test_types_bounds_defaults_and_meaning() -> None:
    text = describe_settings("optimizer")
    assert "optimizer.lr  (number, > 0; default 0.001)\n    Peak learning rate" in text
    assert "optimizer.betas  (list of 2: number, number; default [0.9, 0.999])" in text
    assert "optimizer.schedule  (constant | cosine | linear; default constant)" in text
    assert describe_settings("optimizer.lr").startswith("optimizer.lr  (number")
    assert "corpus  (text; required)" in describe_settings()
    assert "source.items.title  (text or null; default null)" in describe_settings("recipe.source.items")


def test_an_unknown_section_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"adapter, embeddings.*backbone, baselines, or none for all. Did you mean 'validation'"
    ):
        describe_settings("validaton")
    with pytest.raises(ConfigError, match="Did you mean 'epochs'"):
        describe_settings("epoch")
