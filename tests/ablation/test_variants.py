"""Variants of the package and of users' files."""

from __future__ import annotations

from pathlib import Path

import pytest

from cllm4rec_dist.ablation.variants import PAPER, load_variants, packaged_names
from cllm4rec_dist.errors import ConfigError


def test_the_papers_variants_are_packaged_and_differ_as_it_says() -> None:
    variants = {variant.name: variant for variant in load_variants(packaged_names())}
    assert set(PAPER) < set(variants)
    assert variants["full"].overrides("pretrain") == variants["full"].overrides("finetune") == []
    for stage in ("pretrain", "finetune"):
        assert variants["llm-cf"].overrides(stage) == ["batch.texts=0"]
        assert variants["llm-ftall"].overrides(stage) == ['adapter.kind="full"']
        assert variants["llm-fixord"].overrides(stage) == ['method.order="fixed"']
        assert variants["rows-only"].overrides(stage) == ['adapter.kind="none"']
    assert [name for name, variant in variants.items() if variant.config.backbone == "random"] == ["llm-scratch"]
    assert [name for name, variant in variants.items() if variant.config.ranked_by == "pretrain"] == ["llm-prerec"]


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "no-bias.yaml"
    file.write_text("label: no bias\nfinetune: {head: {item_bias: false, temperature: 0.2}}\n")
    (variant,) = load_variants([str(file)])
    assert variant.name == "no-bias"
    assert variant.overrides("finetune") == ["head.item_bias=false", "head.temperature=0.2"]
    assert variant.overrides("pretrain") == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("lm-cf", ("llm-cf", "neither a variant")), ("absent.yaml", ("absent.yaml", "YAML file"))],
)
def test_unknown_variants_are_refused(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        load_variants([name])
    assert all(word in str(error.value) for word in words)


def test_two_variants_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "full.yaml"
    file.write_text("label: mine\n")
    with pytest.raises(ConfigError, match="same name"):
        load_variants(["full", str(file)])


def test_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("label: mine\nfinetuning: {}\n")
    with pytest.raises(ConfigError, match="finetuning"):
        load_variants([str(file)])
