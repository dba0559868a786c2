"""Variants of the method, which an ablation compares.

A variant is a file of differences from the run files: settings of either stage, random instead of pretrained weights,
or the stage whose model ranks the items. The package has those of the paper (Zhu et al., WWW 2024, section 4, where
`full` is the whole method) in `variants/`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from cllm4rec_dist.config import StrictModel, dotted_items, load_config
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.suggestions import did_you_mean

FOLDER = Path(__file__).with_name("variants")
Stage = Literal["pretrain", "finetune"]
PAPER = ("full", "llm-scratch", "llm-cf", "llm-ftall", "llm-fixord", "llm-prerec")
"""Variants of the paper, in the order of its table."""


class VariantConfig(StrictModel):
    """Differences of a variant from the run files."""

    file_kind: ClassVar[str | None] = "a variant"

    label: str
    """Name in the table."""
    backbone: Literal["given", "random"] = "given"
    """`given`: backbone of the run files. `random`: a decoder of its shape with random weights."""
    ranked_by: Stage = "finetune"
    """Stage whose model is evaluated."""
    pretrain: dict[str, Any] = Field(default_factory=dict)
    """Settings of pretraining that differ."""
    finetune: dict[str, Any] = Field(default_factory=dict)
    """Settings of finetuning that differ."""


@dataclass(frozen=True)
class Variant:
    """A variant and its name, which is that of its file and folder."""

    name: str
    config: VariantConfig

    def overrides(self, stage: Stage) -> list[str]:
        """Return the settings that differ in a stage, as `section.key=value`."""
        settings = self.config.pretrain if stage == "pretrain" else self.config.finetune
        return [f"{key}={json.dumps(value)}" for key, value in dotted_items(settings)]


def packaged_names() -> list[str]:
    """Return the names of the package's variants: those of the paper in its order, then the others."""
    others = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in PAPER)
    return [*PAPER, *others]


def load_variants(names: list[str]) -> list[Variant]:
    """Load variants by the names of packaged ones or by paths of files.

    Raises:
        ConfigError: for an unknown name, an invalid file, or two variants with one name.
    """
    variants = list(_load(names))
    seen: dict[str, str] = {}
    for variant, given in zip(variants, names, strict=True):
        if variant.name in seen:
            raise ConfigError(
                "variant",
                given,
                f"has the same name as {seen[variant.name]}, and a variant's runs are in a folder of its name",
                "Rename one of the files.",
            )
        seen[variant.name] = given
    return variants


def _load(names: list[str]) -> Iterator[Variant]:
    for name in names:
        path = FOLDER / f"{name}.yaml" if name in packaged_names() else Path(name)
        if not path.is_file():
            known = packaged_names()
            raise ConfigError(
                "variant",
                name,
                "is neither a variant of the package nor a file",
                f"Choose of {', '.join(known)}, or give a YAML file.{did_you_mean(name, known)}",
            )
        yield Variant(path.stem, load_config(VariantConfig, path))
