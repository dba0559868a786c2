"""Arguments and options shared by commands, and their checks before ranks start."""

from __future__ import annotations

import logging
import math
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
from cllm4rec_dist.launchers.launch import is_main, joins, ranks_are_elsewhere, require_launchable
from cllm4rec_dist.launchers.short_jobs import LAUNCHER_HELP
from cllm4rec_dist.log import hide_accelerator_notice, setup_logging
from cllm4rec_dist.project.layout import is_project, run_of
from cllm4rec_dist.suggestions import decimal_hint

logger = logging.getLogger(__name__)

PathT = TypeVar("PathT", str, Path)

LIST_LENGTH = 20
"""Default number of items in each list written to files."""


def expanded(option: typer.CallbackParam, path: PathT | None) -> PathT | None:
    """Expand `~` and variables in a path, as in a run file; the shell does not expand them in quotes."""
    if path is None:
        return None
    try:
        return type(path)(expand_path(str(path)))
    except ValueError as error:
        raise ConfigError(str(option.name), str(path), f"cannot be resolved: {error}", "Write $$ for $.") from None


def resolved_run(option: typer.CallbackParam, path: str) -> str:
    """Resolve a run argument; a project folder means its finetuning run."""
    return run_of(expanded(option, path) or path)


def parse_number(text: str) -> float:
    """Parse a number. The error for `3,5` explains the decimal point."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number.{decimal_hint(text)}") from None


def parse_finite(text: str) -> float:
    """Parse a finite number, like `parse_number`."""
    number = parse_number(text)
    if not math.isfinite(number):
        raise typer.BadParameter(f"{text!r} is not a finite number.")
    return number


Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings, as section.key=value.", metavar="[KEY=VALUE]...")
]
ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", help="Run configuration; see launch/configs/ for examples.", callback=expanded)
]
RunArgument = Annotated[
    str,
    typer.Argument(help="Run (its best checkpoint), checkpoint, or project folder.", callback=resolved_run),
]
LauncherOption = Annotated[
    str, typer.Option("--launcher", help="auto joins torchrun, deepspeed or srun and else starts Ray; ray; process.")
]
ShortLauncher = Annotated[str, typer.Option("--launcher", help=LAUNCHER_HELP)]
Workers = Annotated[
    str, typer.Option("--workers", "-w", help="Ranks that Ray starts: 8, or 4:8 for as many of these as are available.")
]
MaxFailures = Annotated[int, typer.Option("--max-failures", min=0, help="Restarts by Ray after a rank fails.")]
MetricNames = Annotated[str, typer.Option("--metrics", help="Comma-separated recall@K and ndcg@K.")]
Resume = Annotated[
    str | None,
    typer.Option(help="auto (default): resume from this run's newest valid checkpoint; none; or a checkpoint or run."),
]
BackboneOption = Annotated[
    str | None,
    typer.Option("--backbone", help="New path of the backbone, if it has moved since training.", callback=expanded),
]
CorpusOption = Annotated[
    str | None,
    typer.Option("--corpus", help="New path of the corpus, if it has moved since training.", callback=expanded),
]
NewItemOffset = Annotated[
    float | None,
    typer.Option(
        "--new-item-offset",
        help="Item bias of new items relative to the mean, instead of the run's; the higher, the more are listed.",
        parser=parse_finite,
        metavar="FLOAT",
    ),
]
AllowLeak = Annotated[
    bool,
    typer.Option("--allow-leak", help="Start from a run trained on held-out interactions; reports mention it."),
]
BatchUsers = Annotated[int, typer.Option("--batch-users", min=1, help="Users ranked at a time by each rank.")]


def find_trained(run: str) -> str:
    """Return the absolute path or URL of a run, for ranks in any working directory.

    Raises:
        CheckpointError: if the run has no checkpoint.
    """
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
    """Return the paths that override those in a checkpoint, absolute; a hub id stays as it is.

    Raises:
        CLLM4RecError: if a path is no backbone or no corpus.
    """
    if backbone is not None:
        preflight.require_none(preflight.backbone_problems("--backbone", backbone), "backbone")
        backbone = str(Path(backbone).absolute()) if Path(backbone).is_dir() else backbone
    if corpus is not None and not is_url(corpus):
        load_manifest(corpus)
        corpus = str(Path(corpus).absolute())
    return {"backbone": backbone, "corpus": corpus}


def launcher_of_stages(launcher: str, workers: str, command: str, cure: str) -> str:
    """Return the launcher of the commands that another command starts: Ray only for several ranks or a cluster.

    Args:
        command: what starts the stages, for the error.
        cure: end of the error's cure.

    Raises:
        ConfigError: for a launcher that joins existing ranks.
    """
    require_launchable(launcher, workers, os.environ)
    if joins(launcher, os.environ):
        raise ConfigError(
            "--launcher",
            launcher,
            f"joins the ranks of another launcher, but {command} starts its ranks itself",
            f"Give --launcher process or ray{cure}.",
        )
    alone = launcher == "auto" and workers == "1" and "RAY_ADDRESS" not in os.environ
    return "process" if alone else launcher


def output_problems(field: str, folder: Path, launcher: str) -> list[CLLM4RecError]:
    """Return the reasons why results cannot be written to a folder, as far as this process can see it."""
    if is_url(str(folder)) or not ranks_are_elsewhere(launcher, os.environ):
        return preflight.folder_problems(field, str(folder), "Give a local folder by --output.")
    return []


def announce(text: str, launcher: str = "process") -> None:
    """Log the first line of a command before slow imports; on rank 0 only."""
    hide_accelerator_notice()
    if is_main(launcher, os.environ):
        setup_logging()
        logger.info(text)


def announce_printed(text: str) -> None:
    """Log the first line in a terminal only, then warnings only, for a command that prints a small table."""
    hide_accelerator_notice()
    setup_logging()
    if sys.stderr.isatty():
        logger.info(text)
    logging.getLogger("cllm4rec_dist").setLevel(logging.WARNING)


def log_alone() -> None:
    """Log as a command without ranks, also after ranks have run in this process."""
    setup_logging()
