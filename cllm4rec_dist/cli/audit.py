"""`audit`: check that a run read every example exactly once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cllm4rec_dist.checkpointing.find_run import newest_step
from cllm4rec_dist.cli.frame import app
from cllm4rec_dist.cli.options import expanded, find_trained
from cllm4rec_dist.project.layout import Project, is_project


@app.command()
def audit(
    run: Annotated[
        Path,
        typer.Argument(help="Folder of a run trained with audit=true, or of a project: both runs.", callback=expanded),
    ],
) -> None:
    """Check in its audit log that a run read every user and text exactly once, through all restarts."""
    if not run.is_dir():
        find_trained(str(run))  # raises a clear error; a run can be audited before its first checkpoint
    from cllm4rec_dist.audit.check import check

    project = Project(run) if is_project(run) else None
    for each in [run] if project is None else [project.pretrain_run, project.finetune_run]:
        result = check(each, newest_step(each))
        if project is not None:
            typer.echo(each)
        typer.echo(result.table())
        typer.echo("exactly once: yes")
