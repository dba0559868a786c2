"""`export`: a run for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cllm4rec_dist import preflight
from cllm4rec_dist.cli.frame import app
from cllm4rec_dist.cli.options import (
    BackboneOption,
    CorpusOption,
    RunArgument,
    announce,
    expanded,
    find_trained,
    moved_paths,
)


@app.command()
def export(
    run: RunArgument,
    output: Annotated[Path, typer.Argument(help="New folder to write.", callback=expanded)],
    backbone: BackboneOption = None,
    corpus: CorpusOption = None,
) -> None:
    """Write a run for other programs: PEFT adapters or the backbone, tables, head, external ids."""
    preflight.require_none(preflight.folder_problems("output", str(output)), "export")
    find_trained(run)
    moved_paths(backbone, corpus)
    announce(f"export: reading {run}")
    from cllm4rec_dist.export.folder import export

    typer.echo(f"exported to {output}: {', '.join(export(run, output, backbone, corpus))}")
