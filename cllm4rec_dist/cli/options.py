"""Arguments and options that several commands have, and what is done with them before ranks start."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from cllm4rec_dist import preflight
from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.corpus.manifest import load_manifest
from cllm4rec_dist.errors import CheckpointError, CLLM4RecError, ConfigError
from cllm4rec_dist.filesystems import expand_path, is_url
from cllm4rec_dist.launchers.launch import is_main, ranks_are_elsewhere
from cllm4rec_dist.launchers.short_jobs import LAUNCHER_HELP
from cllm4rec_dist.log import hide_accelerator_notice, setup_logging
from cllm4rec_dist.project.layout import is_project, run_of
from cllm4rec_dist.suggestions import decimal_hint

logger = logging.getLogger(__name__)

PathT = TypeVar("PathT", str, Path)

LIST_LENGTH = 20
"""Items of each list that is written to files."""


def expanded(option: typer.CallbackParam, path: PathT | None) -> PathT | None:
    """A path of the command line with `~` and variables replaced, as in a run file: in quotes no shell does it."""
    if path is None:
        return None
    try:
        return type(path)(expand_path(str(path)))
    except ValueError as error:
        raise ConfigError(str(option.name), str(path), f"cannot be resolved: {error}", "Write $$ for $.") from None


def resolved_run(option: typer.CallbackParam, path: str) -> str:
    """The run that an argument means: a folder of a project stands for the run that recommends."""
    return run_of(expanded(option, path) or path)


def parse_number(text: str) -> float:
    """A number of the command line; the refusal of `3,5` says how it is written."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number.{decimal_hint(text)}") from None


Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings, as section.key=value.", metavar="[KEY=VALUE]...")
]
ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", help="Run configuration, as in launch/configs/.", callback=expanded)
]
RunArgument = Annotated[
    str,
    typer.Argument(help="Run (its best checkpoint), checkpoint, or folder of a project.", callback=resolved_run),
]
LauncherOption = Annotated[
    str, typer.Option("--launcher", help="auto joins torchrun, deepspeed or srun and else starts Ray; ray; process.")
]
ShortLauncher = Annotated[str, typer.Option("--launcher", help=LAUNCHER_HELP)]
Workers = Annotated[
    str, typer.Option("--workers", "-w", help="Ranks that Ray starts: 8, or 4:8 for as many as there are of these.")
]
MaxFailures = Annotated[
    int, typer.Option("--max-failures", min=0, help="How often Ray starts again after a rank was lost.")
]
MetricNames = Annotated[str, typer.Option("--metrics", help="Comma-separated recall@K and ndcg@K.")]
Resume = Annotated[
    str | None,
    typer.Option(help="auto (default): go on from this run's newest good checkpoint; none; or a checkpoint or run."),
]
BackboneOption = Annotated[
    str | None,
    typer.Option("--backbone", help="Where the backbone is now, if not where the run says.", callback=expanded),
]
CorpusOption = Annotated[
    str | None, typer.Option("--corpus", help="Where the corpus is now, if not where the run says.", callback=expanded)
]
AllowLeak = Annotated[
    bool,
    typer.Option("--allow-leak", help="Go on from a run that was trained on held-out interactions; reports say so."),
]
BatchUsers = Annotated[int, typer.Option("--batch-users", min=1, help="Users ranked at a time by each rank.")]


def find_trained(run: str) -> str:
    """Where the ranks find a run; refused before they start where there is nothing to find."""
    try:
        find(run)
    except CheckpointError as error:
        project = Path(run).parent.parent
        if not is_project(project):
            raise
        cure = f"The project has not been trained: `cllm4rec run {project}`."
        raise CheckpointError(error.field, error.value, error.constraint, cure) from None
    return run if is_url(run) else str(Path(run).absolute())


def moved_paths(backbone: str | None, corpus: str | None) -> dict[str, Any]:
    """Paths that override those of a checkpoint, for ranks that run in another folder; a hub id stays.

    Raises:
        CLLM4RecError: for a folder of the options that is none of its kind.
    """
    if backbone is not None:
        preflight.require_none(preflight.backbone_problems("--backbone", backbone), "backbone")
        backbone = str(Path(backbone).absolute()) if Path(backbone).is_dir() else backbone
    if corpus is not None and not is_url(corpus):
        load_manifest(corpus)
        corpus = str(Path(corpus).absolute())
    return {"backbone": backbone, "corpus": corpus}


def output_problems(field: str, folder: Path, launcher: str) -> list[CLLM4RecError]:
    """Why results cannot be written there, as far as this process can tell."""
    if is_url(str(folder)) or not ranks_are_elsewhere(launcher, os.environ):
        return preflight.folder_problems(field, str(folder), "Give a local folder by --output.")
    return []


def announce(text: str, launcher: str = "process") -> None:
    """Log the first line of a command that computes, before anything slow is imported; on rank 0 alone."""
    hide_accelerator_notice()
    if is_main(launcher, os.environ):
        setup_logging()
        logger.info(text)


def announce_printed(text: str) -> None:
    """As `announce`, for a command whose result is a small table: what is waited for in a terminal, then warnings."""
    hide_accelerator_notice()
    setup_logging()
    if sys.stderr.isatty():
        logger.info(text)
    logging.getLogger("cllm4rec_dist").setLevel(logging.WARNING)


def log_alone() -> None:
    """Log as a command that has no ranks, also after ranks have run in this process."""
    setup_logging()
