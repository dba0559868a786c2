"""`ablate`: variants of the method, trained with several seeds and compared in a table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cllm4rec_dist.ablation.variants import PAPER, load_variants, packaged_names
from cllm4rec_dist.cli.child import STOPPED, CommandEnded, Commands
from cllm4rec_dist.cli.frame import app
from cllm4rec_dist.cli.options import Overrides, ShortLauncher, Workers, announce, expanded, launcher_of_stages
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.project.machine import Machine, this_machine

if TYPE_CHECKING:
    from cllm4rec_dist.ablation.cells import Cell

LOG_FILE = "log.txt"
"""Output of a cell's commands, if several cells run at once."""


@app.command()
def ablate(
    pretrain: Annotated[
        Path, typer.Option(help="Run file of the method's pretraining.", callback=expanded, show_default=False)
    ],
    finetune: Annotated[
        Path, typer.Option(help="Run file of the method's finetuning.", callback=expanded, show_default=False)
    ],
    output: Annotated[
        Path, typer.Option(help="Folder of all runs and the table.", callback=expanded, show_default=False)
    ],
    overrides: Overrides = None,
    variants: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated variants: {', '.join(packaged_names())}, or YAML files. The first one is"
            " compared with each other one."
        ),
    ] = ",".join(PAPER),
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0,1,2",
    baselines: Annotated[bool, typer.Option(help="Also fit the baselines, once.")] = True,
    jobs: Annotated[
        int,
        typer.Option(
            min=1,
            help="Cells to run at once, each in one process: on the GPUs in turn, or on its share of the cores. The"
            f" output of a cell is then in its {LOG_FILE}.",
        ),
    ] = 1,
    launcher: ShortLauncher = "auto",
    workers: Workers = "1",
) -> None:
    """Train variants of the method with several seeds, compare them in a table: what does each part bring?

    Runs pretraining, finetuning and evaluation of each variant and seed. The same command resumes after a stop. A
    variant is a YAML file of settings that differ from the run files; those of the package are of the paper
    (docs/ablation.md).
    """
    from cllm4rec_dist.ablation.ablate import ablate as run_ablation
    from cllm4rec_dist.ablation.cells import RunFiles, make_cells, without_duplicates

    launcher = launcher_of_stages(launcher, workers, "an ablation", "")
    if jobs > 1 and (launcher, workers) != ("process", "1"):
        problem = f"needs cells of one process, not --launcher {launcher} --workers {workers}"
        raise ConfigError("--jobs", jobs, problem, "Give --launcher process and no --workers, or leave --jobs out.")
    ranks = ["--launcher", launcher, "--workers", workers]
    chosen = load_variants(_split("--variants", variants))
    files = RunFiles(pretrain, finetune, tuple(overrides or ()))
    cells, duplicates = without_duplicates(make_cells(files, chosen, _seeds(seeds), output.absolute()))
    announce(f"ablate: reading {pretrain} and {finetune}")
    for name, same in duplicates.items():
        typer.echo(f"{name} is left out: with these run files it is {same}")
    environments = _environments(jobs, this_machine(), os.environ) if jobs > 1 else [{}]
    try:
        with Commands() as commands:

            def run(name: str, *arguments: str, cell: Cell, slot: int) -> None:
                log = cell.folder / LOG_FILE if jobs > 1 else None
                commands.run(name, *arguments, log=log, environment=environments[slot])

            table = run_ablation(
                cells,
                files,
                ranks,
                run,
                _make_random_backbone,
                output,
                typer.echo,
                baselines=baselines,
                num_jobs=jobs,
            )
    except KeyboardInterrupt:
        typer.echo("stopped: the same command resumes", err=True)
        raise typer.Exit(STOPPED) from None
    except CommandEnded as ended:
        typer.echo(f"{ended}: the same command resumes from there", err=True)
        raise typer.Exit(ended.status) from None
    typer.echo(f"\n{table}\nTable: {os.path.relpath(output / 'ablation.md')}")


def _environments(num_jobs: int, machine: Machine, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """Return variables for each of the cells that run at once: their GPU, and how many cores they use."""
    threads = environ.get("OMP_NUM_THREADS", str(max(1, machine.cores // num_jobs)))
    every = ",".join(map(str, range(len(machine.gpu_memory))))
    gpus = [name for name in environ.get("CUDA_VISIBLE_DEVICES", every).split(",") if name]
    return [
        {"OMP_NUM_THREADS": threads} | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})
        for slot in range(num_jobs)
    ]


def _make_random_backbone(backbone: str, folder: Path, seed: int) -> None:
    """Import transformers only when a random decoder is needed."""
    from cllm4rec_dist.model.random_backbone import write_random_backbone

    write_random_backbone(backbone, folder, seed)


def _split(option: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(option, text, "names none", "Give at least one, or leave the option out.")
    return names


def _seeds(text: str) -> list[int]:
    names = _split("--seeds", text)
    seeds = [int(name) for name in names if name.isdecimal()]
    if len(set(seeds)) < len(names):
        raise ConfigError("--seeds", text, "must be distinct whole numbers", "Write for example --seeds 0,1,2.")
    return seeds
