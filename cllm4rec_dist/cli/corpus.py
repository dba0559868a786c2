"""`prepare` and `build-backbone`: build the corpus and the backbone that training needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cllm4rec_dist import preflight
from cllm4rec_dist.cli.frame import app
from cllm4rec_dist.cli.options import Overrides, announce, expanded
from cllm4rec_dist.config import BackboneConfig, load_config
from cllm4rec_dist.corpus.manifest import Manifest
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.sources.check import check_source
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.filesystems import is_url
from cllm4rec_dist.launchers.imports import importing_libraries


@app.command()
def prepare(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file as in shards/.", callback=expanded)],
    output: Annotated[str, typer.Argument(help="Corpus folder or fsspec URL to write.", callback=expanded)],
    tokenizer: Annotated[
        str, typer.Option(help="Backbone folder with the tokenizer for the texts.", callback=expanded)
    ],
    overwrite: Annotated[bool, typer.Option(help="Replace an existing corpus.")] = False,
    workers: Annotated[
        int,
        typer.Option("--workers", "-w", min=1, help="Ray tasks that write shards in parallel, here or on a cluster."),
    ] = 1,
    overrides: Overrides = None,
) -> None:
    """Build a corpus from raw data: read, filter, split, tokenize, write shards and a manifest."""
    config = load_config(PrepareConfig, recipe, overrides or ())
    preflight.require_none(preflight.tokenizer_problems(tokenizer, recipe), "prepare")
    manifest = make_corpus(config, tokenizer, output, overwrite=overwrite, workers=workers)
    held_out = f", {manifest.num_new_users:,} users held out" if manifest.num_new_users else ""
    typer.echo(f"{output}: {manifest.num_users:,} users, {manifest.num_items:,} items{held_out}")


def make_corpus(
    config: PrepareConfig, tokenizer: str, output: str, *, overwrite: bool = False, workers: int = 1
) -> Manifest:
    """Build the corpus of a recipe with a backbone's tokenizer and return its manifest."""
    if not is_url(output):
        preflight.require_none(preflight.folder_problems("output", output), "prepare")
    check_source(config.source)
    announce(f"prepare: reading the data of {config.name}")
    with importing_libraries():
        from cllm4rec_dist.corpus.prepare import prepare as build
        from cllm4rec_dist.corpus.tokenizer import WordTokenizer

    return build(config, WordTokenizer.load(tokenizer), output, overwrite=overwrite, num_workers=workers)


@app.command("build-backbone")
def backbone(
    recipe: Annotated[Path, typer.Argument(help="Recipe whose texts the tokenizer is trained on.", callback=expanded)],
    output: Annotated[Path, typer.Argument(help="Backbone folder to write.", callback=expanded)],
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file with its settings.", callback=expanded)
    ] = None,
) -> None:
    """Build a small decoder with random weights and a tokenizer trained on a recipe's texts.

    `cllm4rec settings backbone` lists what can be set.
    """
    if (output / "config.json").exists():
        raise ConfigError("output", str(output), "already holds a backbone", "Choose another folder or remove it.")
    size = make_backbone(
        load_config(PrepareConfig, recipe), load_config(BackboneConfig, config, overrides or ()), output
    )
    typer.echo(f"{output}: {size:,} parameters")


def make_backbone(recipe: PrepareConfig, config: BackboneConfig, output: Path) -> int:
    """Build a small decoder and a tokenizer of a recipe's texts, and return the number of parameters."""
    preflight.require_none(preflight.folder_problems("output", str(output)), "build-backbone")
    check_source(recipe.source)
    announce(f"build-backbone: reading the data of {recipe.name}")
    with importing_libraries():
        from transformers.utils.logging import disable_progress_bar

        from cllm4rec_dist.corpus.sources import read_source
        from cllm4rec_dist.model.build_backbone import build_backbone

    disable_progress_bar()  # a single file is written
    return build_backbone(config, read_source(recipe.source).texts(), output)
