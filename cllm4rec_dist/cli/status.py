"""`status`: progress of a run, and whether it is alive."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict
from typing import Annotated

import typer

from cllm4rec_dist.cli.frame import app
from cllm4rec_dist.cli.options import expanded
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.monitoring.status import RunStatus, read_statuses
from cllm4rec_dist.monitoring.status_text import format_brief, format_status
from cllm4rec_dist.project.layout import is_project

_FOLLOW_SECONDS = 5.0


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="Run folder, project folder, or URL of checkpoints.", callback=expanded)],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of runs.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print a line at each change until the run ends.")
    ] = False,
) -> None:
    """Show a run's progress and metrics, whether it is alive, and how to resume it. Only reads its files."""
    statuses = _read(run)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in statuses], indent=1))
    else:
        typer.echo("\n\n".join(format_status(each) for each in statuses))
    previous = ""
    while follow and any(each.lives for each in statuses):
        time.sleep(_FOLLOW_SECONDS)
        statuses = _read(run)
        line = "\n".join(format_brief(each) for each in statuses)
        if line != previous:
            typer.echo(line)
        previous = line


def _read(run: str) -> list[RunStatus]:
    try:
        return read_statuses(run, time.time())
    except ConfigError as error:
        if not is_project(run):
            raise
        cure = f"`cllm4rec run {shlex.quote(run)}` runs the missing stages, or resumes them."
        raise ConfigError(error.field, run, "is a project without a trained run yet", cure) from None
