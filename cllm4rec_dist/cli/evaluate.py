"""`evaluate`: metrics of a run compared with baselines."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cllm4rec_dist import preflight
from cllm4rec_dist.cli.frame import app
from cllm4rec_dist.cli.options import (
    BackboneOption,
    BatchUsers,
    CorpusOption,
    MetricNames,
    NewItemOffset,
    RunArgument,
    ShortLauncher,
    Workers,
    announce,
    expanded,
    find_trained,
    log_alone,
    moved_paths,
    output_problems,
)
from cllm4rec_dist.config import load_config
from cllm4rec_dist.errors import CLLM4RecError, ConfigError
from cllm4rec_dist.evaluation.baseline_config import BaselineConfig
from cllm4rec_dist.evaluation.baseline_names import LABELS
from cllm4rec_dist.launchers.imports import importing_libraries
from cllm4rec_dist.launchers.launch import is_main, require_launchable
from cllm4rec_dist.launchers.short_jobs import launch_short
from cllm4rec_dist.suggestions import did_you_mean

METRICS = "recall@20,recall@40,ndcg@100"


@app.command()
def evaluate(
    run: RunArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the report; default RUN/evaluation[-valid][-N-users][-without-rows].", callback=expanded
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="test or valid.")] = "test",
    metrics: MetricNames = METRICS,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="Baselines to fit, too, of popularity, ease, title_ease, sparse_ease and ials; default: those of"
            " --baseline-settings, which are all but sparse_ease. In a catalog too large for ease and title_ease,"
            " sparse_ease takes their place."
        ),
    ] = None,
    baseline_settings: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with grids and limits of the baselines; `cllm4rec settings baselines` explains its keys.",
            callback=expanded,
        ),
    ] = None,
    no_baselines: Annotated[bool, typer.Option("--no-baselines", help="Fit no baselines.")] = False,
    without_rows: Annotated[
        bool,
        typer.Option("--without-rows", help="Rank known users from their history alone, without their embeddings."),
    ] = False,
    users: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rank a sample of so many users, the same in every run and for the baselines, instead of all of them.",
        ),
    ] = None,
    new_item_offset: NewItemOffset = None,
    backbone: BackboneOption = None,
    corpus: CorpusOption = None,
    batch_users: BatchUsers = 256,
    launcher: ShortLauncher = "auto",
    workers: Workers = "1",
) -> None:
    """Rank the whole catalog for every user, print metrics next to the baselines, write a report."""
    require_launchable(launcher, workers, os.environ)
    folder = output or Path(run) / _folder_name(split, users, without_rows=without_rows)
    names = [name for name in _names(metrics) if name]
    problems = preflight.metric_problems("--metrics", names)
    if output is not None or Path(run).is_dir():  # else the error is about RUN
        problems += output_problems("--output", folder, launcher)
    if split not in ("test", "valid"):
        why = ": the model has learnt these items, so finding them shows nothing" if split == "train" else ""
        cure = f"Leave it out for test.{did_you_mean(split, ('test', 'valid'))}"
        problems.append(ConfigError("--split", split, f"is neither test nor valid{why}", cure))
    if no_baselines and baselines is not None:
        rule = "names what to fit, but --no-baselines fits none"
        problems.append(ConfigError("--baselines", baselines, rule, "Give one of the two."))
    if no_baselines and baseline_settings is not None:
        rule = "has nothing to set, because --no-baselines fits none"
        problems.append(ConfigError("--baseline-settings", str(baseline_settings), rule, "Give one of the two."))
    problems += _baseline_problems([] if no_baselines else _names(baselines))
    settings = _read_settings(baseline_settings, problems)
    preflight.require_none(problems, "evaluate")
    models = [] if no_baselines else [name for name in LABELS if name in _names(baselines)] or settings.names
    folder, run_path, moved = folder.absolute(), find_trained(run), moved_paths(backbone, corpus)
    announce(f"evaluate: reading {run}, importing torch", launcher)
    with importing_libraries():
        from cllm4rec_dist.evaluation.inference import evaluate_run

    started = time.monotonic()
    launch_short(
        evaluate_run,
        launcher,
        workers,
        run=run_path,
        split=split,
        metrics=names,
        batch_users=batch_users,
        output=str(folder),
        baselines=bool(models),
        without_rows=without_rows,
        num_users=users,
        new_item_offset=new_item_offset,
        **moved,
    )
    if is_main(launcher, os.environ):
        from cllm4rec_dist.evaluation.comparison import compare

        log_alone()
        seconds = time.monotonic() - started
        typer.echo(compare(folder, names, baselines=models, seconds=seconds, settings=settings))


def _names(text: str | None) -> list[str]:
    """Split a comma-separated option; empty if it was left out."""
    return [] if text is None else [name.strip() for name in text.split(",")]


def _baseline_problems(names: Sequence[str]) -> list[CLLM4RecError]:
    """Return an error for each name that is no baseline."""
    return [
        ConfigError(
            "--baselines",
            name,
            "is no baseline",
            f"Name some of {', '.join(LABELS)}, or give --no-baselines.{did_you_mean(name, LABELS)}",
        )
        for name in names
        if name not in LABELS
    ]


def _read_settings(path: Path | None, problems: list[CLLM4RecError]) -> BaselineConfig:
    """Read the settings of the baselines; an error is added to `problems`, and the defaults are returned."""
    try:
        return load_config(BaselineConfig, path)
    except ConfigError as error:
        problems.append(error)
        return BaselineConfig()


def _folder_name(split: str, num_users: int | None, *, without_rows: bool) -> str:
    """Name of the report's folder in a run; other splits and options do not overwrite the default report."""
    of_split = "" if split == "test" else f"-{split}"
    of_users = "" if num_users is None else f"-{num_users}-users"
    return f"evaluation{of_split}{of_users}{'-without-rows' if without_rows else ''}"
