"""`settings`: what can be set, and what it means."""

from __future__ import annotations

from typing import Annotated

import typer

from cllm4rec_dist.cli.frame import app


@app.command()
def settings(
    section: Annotated[
        str | None,
        typer.Argument(
            help="Section of a run (optimizer), recipe, recipe.SECTION, or backbone; all of a run if left out."
        ),
    ] = None,
) -> None:
    """Print every setting with its type, default and meaning: of runs, recipes and the small backbone."""
    from cllm4rec_dist.cli.settings_reference import describe_settings

    typer.echo(describe_settings(section))
