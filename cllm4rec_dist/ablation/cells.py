"""Cells of an ablation: one variant trained with one seed, with its folders and resolved settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm4rec_dist import preflight
from cllm4rec_dist.ablation.variants import Stage, Variant
from cllm4rec_dist.checkpointing.run_folder import EVALUATION_FILE
from cllm4rec_dist.config import RunConfig, load_config, path_override
from cllm4rec_dist.errors import ConfigError

_PROVIDED = ("output", "init_from", "seed", "stage", "backbone", "resume", "checkpoint.dir")
"""Settings that the ablation decides; a variant's backbone is `given` or `random`."""
_STAGES: tuple[Stage, ...] = ("pretrain", "finetune")


@dataclass(frozen=True)
class Cell:
    """One variant and seed.

    Attributes:
        folder: folder of the cell, with the finetuning run and the evaluation.
        pretrain_run: pretraining run; cells that pretrain alike share that of the first of them.
        given_backbone: backbone of the run files, a folder or hub id.
        pretrain, finetune: resolved settings.
    """

    variant: Variant
    seed: int
    folder: Path
    pretrain_run: Path
    given_backbone: str
    pretrain: RunConfig
    finetune: RunConfig

    @property
    def backbone(self) -> str:
        """Backbone of the cell; a random one does not exist before the cell runs."""
        return self.pretrain.backbone

    @property
    def finetune_run(self) -> Path:
        """Finetuning run."""
        return self.folder / "finetune"

    @property
    def ranked_run(self) -> Path:
        """Run whose model is evaluated."""
        return self.pretrain_run if self.variant.config.ranked_by == "pretrain" else self.finetune_run

    @property
    def evaluation(self) -> Path:
        """Folder of the evaluation."""
        return self.folder / "evaluation"

    @property
    def is_evaluated(self) -> bool:
        """True if the cell has an evaluation, which is written last."""
        return (self.evaluation / EVALUATION_FILE).is_file() and (self.evaluation / "results.json").is_file()

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the stages that the cell runs, as plain values, without the paths of its folders."""
        stages = {"pretrain": self.pretrain}
        if self.variant.config.ranked_by == "finetune":
            stages["finetune"] = self.finetune
        left_out = {"output", "init_from"} | ({"backbone"} if self.variant.config.backbone == "random" else set())
        settings: dict[str, Any] = {
            stage: config.model_dump(mode="json", exclude=left_out) for stage, config in stages.items()
        }
        return settings | {"backbone": self.variant.config.backbone}


@dataclass(frozen=True)
class RunFiles:
    """Run files of the whole method, with overrides of both."""

    pretrain: Path
    finetune: Path
    overrides: Sequence[str] = ()

    def path(self, stage: Stage) -> Path:
        """Run file of a stage."""
        return self.pretrain if stage == "pretrain" else self.finetune

    def settings(self, stage: Stage, variant: Variant) -> list[str]:
        """Return the overrides of a stage's run file, as `section.key=value`; later ones win.

        Variants are compared by their LLMs, as the linear memory would be the same in all of them.
        """
        first = ["linear.neighbors=0"] if stage == "finetune" else []
        return [*first, *self.overrides, *variant.overrides(stage)]

    def load(self, stage: Stage, settings: Sequence[str]) -> RunConfig:
        """Load the run file of a stage with overrides.

        Raises:
            ConfigError: for settings that are not valid.
        """
        return load_config(RunConfig, self.path(stage), [*settings, f"stage={stage}"])


def make_cells(files: RunFiles, variants: Sequence[Variant], seeds: Sequence[int], output: Path) -> list[Cell]:
    """Return all cells, a seed after the other, so that an interrupted ablation compares all variants on few seeds.

    Raises:
        ConfigError: if the settings of any variant are not valid.
    """
    _require_free(files.overrides, "override")
    _require_order(files)
    for variant in variants:
        _require_free([*variant.overrides("pretrain"), *variant.overrides("finetune")], f"variant {variant.name}")
    return list(_cells(files, variants, seeds, output))


def _require_order(files: RunFiles) -> None:
    """Refuse run files that are swapped: both are valid for either stage."""
    starts = {stage: files.load(stage, files.overrides).init_from for stage in _STAGES}
    if starts["pretrain"] is not None and starts["finetune"] is None:
        what = "starts from another run (init_from), and the file of --finetune does not, so that they seem swapped"
        raise ConfigError("--pretrain", str(files.pretrain), what, "Give the file of the first stage as --pretrain.")


def _cells(files: RunFiles, variants: Sequence[Variant], seeds: Sequence[int], output: Path) -> Iterator[Cell]:
    pretrained: dict[str, Path] = {}
    for seed in seeds:
        for variant in variants:
            folder = output / variant.name / f"seed-{seed}"
            common = [f"seed={seed}", "resume=auto"]
            given = files.load("pretrain", files.settings("pretrain", variant)).backbone
            random = variant.config.backbone == "random"
            backbone = str(output / "random-backbones" / f"seed-{seed}") if random else given
            common.append(path_override("backbone", backbone))
            pretrain = files.load("pretrain", [*files.settings("pretrain", variant), *common, "output=pretrain"])
            run = pretrained.setdefault(pretrain.model_dump_json(), folder / "pretrain")
            paths = ["output=finetune", path_override("init_from", run)]
            finetune = files.load("finetune", [*files.settings("finetune", variant), *common, *paths])
            if variant.config.ranked_by == "finetune":
                read = pretrain.model_copy(update={"backbone": given})  # a random one is as wide, but not built yet
                problems = list(preflight.stage_width_problems(read, finetune, None))
                preflight.require_none(problems, f"variant {variant.name}")
            yield Cell(variant, seed, folder, run, given, pretrain, finetune)


def without_duplicates(cells: Sequence[Cell]) -> tuple[list[Cell], dict[str, str]]:
    """Leave out variants that equal an earlier one with these run files; return their names with that of the earlier.

    With a backbone that is trained whole, for example, `llm-ftall` is the whole method.
    """
    first: dict[str, str] = {}
    duplicates: dict[str, str] = {}
    for cell in cells:
        same = first.setdefault(json.dumps([cell.variant.config.ranked_by, cell.settings]), cell.variant.name)
        if same != cell.variant.name:
            duplicates[cell.variant.name] = same
    return [cell for cell in cells if cell.variant.name not in duplicates], duplicates


def _require_free(overrides: Sequence[str], where: str) -> None:
    """Refuse settings that the ablation decides."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in _PROVIDED:
            raise ConfigError(where, override, f"sets {key}, which the ablation decides", "Leave it out.")
