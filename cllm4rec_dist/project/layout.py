"""Layout of a project folder, which `cllm4rec init` creates and `cllm4rec run` fills."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cllm4rec_dist.filesystems import is_url


@dataclass(frozen=True)
class Project:
    """Paths of a project.

    Attributes:
        folder: project folder.
    """

    folder: Path

    @property
    def recipe_file(self) -> Path:
        """Recipe of the corpus."""
        return self.folder / "recipe.yaml"

    @property
    def backbone_file(self) -> Path:
        """Settings of the small decoder; absent if the project has a pretrained one."""
        return self.folder / "backbone.yaml"

    @property
    def pretrain_file(self) -> Path:
        """Configuration of the first stage."""
        return self.folder / "pretrain.yaml"

    @property
    def finetune_file(self) -> Path:
        """Configuration of the second stage."""
        return self.folder / "finetune.yaml"

    @property
    def corpus(self) -> Path:
        """Prepared corpus."""
        return self.folder / "corpus"

    @property
    def backbone(self) -> Path:
        """Small decoder."""
        return self.folder / "backbone"

    @property
    def pretrain_run(self) -> Path:
        """Run of the first stage."""
        return self.folder / "runs" / "pretrain"

    @property
    def finetune_run(self) -> Path:
        """Run of the second stage, which makes the recommendations."""
        return self.folder / "runs" / "finetune"

    @property
    def has_runs(self) -> bool:
        """True if anything has been trained, including earlier runs that were kept."""
        runs = self.pretrain_run.parent
        return runs.is_dir() and any(child.is_dir() for child in runs.iterdir())

    @property
    def evaluation(self) -> Path:
        """Folder of metrics and report."""
        return self.finetune_run / "evaluation"

    @property
    def recommendations(self) -> Path:
        """Folder of the lists for all customers."""
        return self.folder / "recommendations"

    def record(self, stage: str) -> Path:
        """Record of a stage's inputs and outputs."""
        return self.folder / ".stages" / f"{stage}.json"


def is_project(path: str | Path) -> bool:
    """True for a folder that `cllm4rec init` has created."""
    if is_url(str(path)):
        return False
    project = Project(Path(path))
    return project.recipe_file.is_file() and project.finetune_file.is_file()


def run_of(path: str) -> str:
    """Return the run of a project's second stage, or the path itself if it is no project."""
    return str(Project(Path(path)).finetune_run) if is_project(path) else path
