"""`status`: how far a run elsewhere is, and whether it lives."""

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
from cllm4rec_dist.monitoring.status import RunStatus, format_brief, format_status, read_statuses
from cllm4rec_dist.project.layout import is_project

_FOLLOW_SECONDS = 5.0


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="Run folder, project folder, or URL of checkpoints.", callback=expanded)],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of runs.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print a line at each change until it ends.")] = False,
) -> None:
    """Show how far a run is, how it does, whether it lives, and how to go on. Reads its files alone."""
    found = _read(run)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=1))
    else:
        typer.echo("\n\n".join(format_status(each) for each in found))
    said = ""
    while follow and any(each.lives for each in found):
        time.sleep(_FOLLOW_SECONDS)
        found = _read(run)
        line = "\n".join(format_brief(each) for each in found)
        if line != said:
            typer.echo(line)
        said = line


def _read(run: str) -> list[RunStatus]:
    try:
        return read_statuses(run, time.time())
    except ConfigError as error:
        if not is_project(run):
            raise
        cure = f"`cllm4rec run {shlex.quote(run)}` does what is missing, and goes on where it was stopped."
        raise ConfigError(error.field, run, "is a project of which nothing has been trained yet", cure) from None
