"""`export`: write a run for use by other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cllm4rec_dist import preflight
from cllm4rec_dist.cli.frame import app
from cllm4rec_dist.cli.options import (
    BackboneOption,
    CorpusOption,
    NewItemOffset,
    RunArgument,
    announce,
    expanded,
    find_trained,
    moved_paths,
)
from cllm4rec_dist.export.options import ExportOptions, option_problems, output_problems
from cllm4rec_dist.launchers.imports import importing_libraries


@app.command()
def export(
    run: RunArgument,
    output: Annotated[Path, typer.Argument(help="New folder to write.", callback=expanded)],
    faiss: Annotated[bool, typer.Option("--faiss", help="Also write a FAISS index of the items.")] = False,
    hub: Annotated[
        bool, typer.Option("--hub", help="Write a self-contained folder to publish: a model card, no users, no paths.")
    ] = False,
    with_users: Annotated[
        bool, typer.Option("--with-users", help="With --hub: users' ids and embeddings, which may be personal data.")
    ] = False,
    license: Annotated[
        str | None, typer.Option("--license", help="With --hub: license in the model card, such as apache-2.0.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="With --hub: hub id of a local backbone, named instead of copied."),
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="ORG/NAME", help="Upload to the Hugging Face hub; means --hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: to a private repository.")] = False,
    new_item_offset: NewItemOffset = None,
    backbone: BackboneOption = None,
    corpus: CorpusOption = None,
) -> None:
    """Write a run for other programs: adapter or backbone, embedding tables, ids, Parquet, how to score."""
    options = ExportOptions(
        faiss=faiss, hub=hub, with_users=with_users, license=license, base_model=base_model, push=push, private=private
    )
    preflight.require_none([*output_problems(output), *option_problems(options)], "export")
    find_trained(run)
    moved_paths(backbone, corpus)
    announce(f"export: reading {run}")
    with importing_libraries():
        from cllm4rec_dist.export.folder import export

    written = export(run, output, options, backbone, corpus, new_item_offset)
    typer.echo(f"exported to {output}: {', '.join(written)}")
