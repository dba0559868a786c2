"""`settings`: print every setting with its meaning."""

from __future__ import annotations

from typing import Annotated

import typer

from cllm4rec_dist.cli.frame import app


@app.command()
def settings(
    section: Annotated[
        str | None,
        typer.Argument(
            help="Section of a run (optimizer), recipe, recipe.SECTION, backbone, or baselines; default: all of a run."
        ),
    ] = None,
) -> None:
    """Print the settings of runs, recipes, the small backbone and the baselines with type, default and meaning."""
    from cllm4rec_dist.cli.settings_reference import describe_settings

    typer.echo(describe_settings(section))
