"""Where things are in the folder of a project, which `cllm4rec init` makes and `cllm4rec run` fills."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cllm4rec_dist.filesystems import is_url


@dataclass(frozen=True)
class Project:
    """Paths of a project.

    Attributes:
        folder: of the project.
    """

    folder: Path

    @property
    def recipe_file(self) -> Path:
        """How the raw data become a corpus."""
        return self.folder / "recipe.yaml"

    @property
    def backbone_file(self) -> Path:
        """Settings of the small decoder; absent where the project has a pretrained one."""
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
        """The built corpus."""
        return self.folder / "corpus"

    @property
    def backbone(self) -> Path:
        """The small decoder."""
        return self.folder / "backbone"

    @property
    def pretrain_run(self) -> Path:
        """Run of the first stage."""
        return self.folder / "runs" / "pretrain"

    @property
    def finetune_run(self) -> Path:
        """Run of the second stage, which recommends."""
        return self.folder / "runs" / "finetune"

    @property
    def has_runs(self) -> bool:
        """True where anything has been trained, runs that were set aside included."""
        runs = self.pretrain_run.parent
        return runs.is_dir() and any(child.is_dir() for child in runs.iterdir())

    @property
    def evaluation(self) -> Path:
        """Metrics and report."""
        return self.finetune_run / "evaluation"

    @property
    def recommendations(self) -> Path:
        """Lists for all customers."""
        return self.folder / "recommendations"

    def record(self, stage: str) -> Path:
        """What a finished stage was made of."""
        return self.folder / ".stages" / f"{stage}.json"


def is_project(path: str | Path) -> bool:
    """True for a folder that `cllm4rec init` has made."""
    if is_url(str(path)):
        return False
    project = Project(Path(path))
    return project.recipe_file.is_file() and project.finetune_file.is_file()


def run_of(path: str) -> str:
    """The run that a path means: that of a project's second stage, else the path itself."""
    return str(Project(Path(path)).finetune_run) if is_project(path) else path
