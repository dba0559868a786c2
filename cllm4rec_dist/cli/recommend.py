"""`recommend`: lists of items for users."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cllm4rec_dist import preflight
from cllm4rec_dist.cli.frame import app
from cllm4rec_dist.cli.options import (
    BackboneOption,
    BatchUsers,
    CorpusOption,
    LauncherOption,
    RunArgument,
    Workers,
    announce,
    expanded,
    find_trained,
    moved_paths,
    output_problems,
)
from cllm4rec_dist.id_list import read_ids
from cllm4rec_dist.launchers import launch, require_launchable


class History(StrEnum):
    """What `recommend` takes for a user's history."""

    ALL = "all"
    TRAIN = "train"


@app.command()
def recommend(
    run: RunArgument,
    output: Annotated[Path, typer.Argument(help="Folder of the Parquet files to write.", callback=expanded)],
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Items for each user.")] = 100,
    user: Annotated[list[str] | None, typer.Option("--user", help="Only this user (may be repeated).")] = None,
    users_file: Annotated[
        Path | None, typer.Option(help="Only the users of this file, one id a line.", callback=expanded)
    ] = None,
    history: Annotated[
        History, typer.Option(help="What a user's prompt shows and the list leaves out: all items, or train items.")
    ] = History.ALL,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Recommend items of the history too.")] = False,
    backbone: BackboneOption = None,
    corpus: CorpusOption = None,
    batch_users: BatchUsers = 256,
    launcher: LauncherOption = "auto",
    workers: Workers = "1",
) -> None:
    """Write each user's best items with scores as Parquet, by external ids.

    What a user has, held-out items included, is in the prompt and is left out of the list. A list that OUTPUT holds
    already is replaced.
    """
    require_launchable(launcher, workers, os.environ)
    preflight.require_none(output_problems("output", output, launcher), "recommend")
    chosen = None if user is None and users_file is None else list(user or ())
    if chosen is not None and users_file is not None:
        chosen += read_ids(users_file)
    announce(f"recommend: reading {run}", launcher)
    from cllm4rec_dist.inference import recommend_users

    launch(
        recommend_users, launcher, workers,
        run=find_trained(run), users=chosen, num_best=top, batch_users=batch_users, output=str(output.absolute()),
        history=history.value, include_seen=include_seen, **moved_paths(backbone, corpus),
    )  # fmt: skip
