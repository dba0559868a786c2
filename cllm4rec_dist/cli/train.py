"""`pretrain`, `finetune`, and `plan`, which estimates what they need."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cllm4rec_dist import preflight
from cllm4rec_dist.cli.frame import app
from cllm4rec_dist.cli.options import (
    AllowLeak,
    BackboneOption,
    ConfigFile,
    CorpusOption,
    LauncherOption,
    MaxFailures,
    Overrides,
    Resume,
    Workers,
    announce,
    expanded,
    moved_paths,
)
from cllm4rec_dist.config import RunConfig, load_config
from cllm4rec_dist.corpus.manifest import load_manifest
from cllm4rec_dist.errors import CorpusError
from cllm4rec_dist.launchers.imports import importing_libraries
from cllm4rec_dist.launchers.launch import is_main, launch, ranks_are_elsewhere, require_launchable
from cllm4rec_dist.monitoring.next_steps import next_commands
from cllm4rec_dist.signals import EXIT_STATUS

if TYPE_CHECKING:
    from cllm4rec_dist.distributed.topology import World
    from cllm4rec_dist.log import ReportMetrics
    from cllm4rec_dist.train import TrainResult


SaysNext = Annotated[
    bool, typer.Option("--next/--no-next", hidden=True, help="Print the next command; `run` prints it itself.")
]


@app.command()
def pretrain(
    config: ConfigFile,
    overrides: Overrides = None,
    launcher: LauncherOption = "auto",
    workers: Workers = "1",
    resume: Resume = None,
    max_failures: MaxFailures = 3,
    allow_leak: AllowLeak = False,
    says_next: SaysNext = True,
) -> None:
    """Mutually regularized pretraining of the collaborative and content LLMs. Resumes automatically."""
    _train("pretrain", config, overrides, launcher, workers, resume, max_failures, allow_leak, says_next=says_next)


@app.command()
def finetune(
    config: ConfigFile,
    overrides: Overrides = None,
    launcher: LauncherOption = "auto",
    workers: Workers = "1",
    resume: Resume = None,
    max_failures: MaxFailures = 3,
    allow_leak: AllowLeak = False,
    says_next: SaysNext = True,
) -> None:
    """Recommendation-oriented finetuning from a pretrained run (`init_from`). Resumes automatically."""
    _train("finetune", config, overrides, launcher, workers, resume, max_failures, allow_leak, says_next=says_next)


@app.command()
def plan(
    config: ConfigFile,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Number of GPUs, with one rank on each.")],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option("--gpu", help="a100-40, a100-80, h100, h200, l40s or rtx4090.")] = "h100",
    gpus_per_host: Annotated[int, typer.Option(min=1, help="GPUs per host.")] = 8,
    stage: Annotated[
        str | None, typer.Option(help="pretrain or finetune; default: finetune if init_from is set.")
    ] = None,
    efficiency: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Assumed fraction of the GPU's peak FLOP/s in matrix products.")
    ] = 0.45,
    samples: Annotated[int, typer.Option(min=1, help="Steps of the corpus to sample.")] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the plan to this JSON file.", callback=expanded)
    ] = None,
    backbone: BackboneOption = None,
    corpus: CorpusOption = None,
) -> None:
    """Estimate what a run needs: memory by part, communication volume, FLOPs, time, and changes that help.

    Starts no run and loads no weights: it reads the backbone's config.json and tokenizer, and the corpus. It builds
    micro-batches of the corpus as the ranks do, and runs the model on meta tensors. Exit status 3 if the run does not
    fit.
    """
    import json

    from cllm4rec_dist.planning.hardware import find_gpu

    hardware = find_gpu(gpu), gpus, gpus_per_host, efficiency
    read, problems = preflight.resolve_paths(
        load_config(RunConfig, config, [*(overrides or ()), f"stage={stage or 'pretrain'}"])
    )
    moved = moved_paths(backbone, corpus)
    folder = moved["backbone"] or read.backbone
    problems += preflight.backbone_problems("backbone", folder, "--backbone")
    problems += preflight.setting_problems(read)
    problems += preflight.width_problems(read.model_copy(update={"backbone": folder}), reads_init_from=False)
    preflight.require_none(problems, "run")
    try:
        load_manifest(moved["corpus"] or read.corpus)
    except CorpusError as error:
        cure = f"{error.cure} If it has moved, give --corpus PATH."
        raise CorpusError(error.field, error.value, error.constraint, cure) from None
    announce(f"plan: reading {config}")
    from cllm4rec_dist.evaluation.trained_run import relocated
    from cllm4rec_dist.planning.changes import faster_runs, suggest_changes
    from cllm4rec_dist.planning.plan import Cluster, make_plan
    from cllm4rec_dist.planning.table import as_json, format_changes, format_faster_runs, format_plan
    from cllm4rec_dist.planning.zero3_simulation import warn_of_other_version

    warn_of_other_version()
    read = relocated(read, str(config), backbone, corpus)
    if stage is None and read.init_from is not None:
        read = read.model_copy(update={"stage": "finetune"})
    made = make_plan(read, Cluster(*hardware), samples)
    typer.echo(format_plan(made))
    faster = list(faster_runs(read, made, samples))
    if faster:
        typer.echo("\n" + format_faster_runs(faster))
    changes = list(suggest_changes(read, made, samples))
    if changes:
        typer.echo("\n" + format_changes(changes, made.cluster.gpu.memory))
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(made, changes), indent=1) + "\n", encoding="utf-8")
    if not made.fits:
        raise typer.Exit(3)


def _train(
    stage: str,
    path: Path,
    overrides: list[str] | None,
    launcher: str,
    workers: str,
    resume: str | None,
    max_failures: int,
    allow_leak: bool,
    *,
    says_next: bool,
) -> None:
    require_launchable(launcher, workers, os.environ)
    announce(f"{stage}: reading {path}", launcher)
    more = [f"stage={stage}", *([f"resume={resume}"] if resume else []), *(["allow_leak=true"] if allow_leak else [])]
    loaded, problems = preflight.resolve_paths(load_config(RunConfig, path, [*(overrides or ()), *more]))
    preflight.require_ready(
        loaded,
        problems,
        sees_files=not ranks_are_elsewhere(launcher, os.environ),
        writes_output=is_main(launcher, os.environ),
    )
    config = preflight.resolve_resume(loaded, os.environ)
    result = launch(
        train_on_rank,
        launcher,
        workers,
        collective_timeout_seconds=config.faults.collective_timeout_seconds,
        max_failures=max_failures,
        config=config,
    )
    if getattr(result, "interrupted", False):
        raise typer.Exit(EXIT_STATUS)
    if is_main(launcher, os.environ):
        typer.echo(f"{stage} done: {config.output}")
        for command in next_commands(stage, Path(config.output), path) if says_next else ():
            typer.echo(f"next: {command}")


def train_on_rank(world: World, report: ReportMetrics, config: RunConfig) -> TrainResult:
    """Train as one rank. Torch is imported here, since the Ray driver passes this function on without running it."""
    with importing_libraries():
        from cllm4rec_dist.train import train

    return train(world, report, config)
