"""`ablate`: variants of the method, trained with several seeds and compared in a table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cllm4rec_dist.ablation.variants import PAPER, load_variants, packaged_names
from cllm4rec_dist.cli.child import STOPPED, CommandEnded, run_command
from cllm4rec_dist.cli.frame import app
from cllm4rec_dist.cli.options import Overrides, ShortLauncher, Workers, announce, expanded, launcher_of_stages
from cllm4rec_dist.errors import ConfigError


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

    ranks = ["--launcher", launcher_of_stages(launcher, workers, "an ablation", ""), "--workers", workers]
    chosen = load_variants(_split("--variants", variants))
    files = RunFiles(pretrain, finetune, tuple(overrides or ()))
    cells, duplicates = without_duplicates(make_cells(files, chosen, _seeds(seeds), output.absolute()))
    announce(f"ablate: reading {pretrain} and {finetune}")
    for name, same in duplicates.items():
        typer.echo(f"{name} is left out: with these run files it is {same}")
    try:
        table = run_ablation(
            cells, files, ranks, run_command, _make_random_backbone, output, typer.echo, baselines=baselines
        )
    except KeyboardInterrupt:
        typer.echo("stopped: the same command resumes", err=True)
        raise typer.Exit(STOPPED) from None
    except CommandEnded as ended:
        typer.echo(f"{ended}: the same command resumes from there", err=True)
        raise typer.Exit(ended.status) from None
    typer.echo(f"\n{table}\nTable: {os.path.relpath(output / 'ablation.md')}")


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
