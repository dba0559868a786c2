"""`audit`: the proof that a run read every example exactly once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cllm4rec_dist.cli.frame import app
from cllm4rec_dist.cli.options import expanded


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(help="Run folder that trained with audit=true.", callback=expanded)],
) -> None:
    """Prove from its audit log that a run read every user and text exactly once, whatever befell it."""
    from cllm4rec_dist.audit import check
    from cllm4rec_dist.checkpoint import newest_step

    typer.echo(check(run, newest_step(run)).table())
    typer.echo("exactly once: yes")
