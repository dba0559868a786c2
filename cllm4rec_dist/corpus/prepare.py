"""Build a corpus from a recipe: read, index and split, write."""

from __future__ import annotations

import logging

from cllm4rec_dist.corpus.catalog import build_catalog
from cllm4rec_dist.corpus.make_shards import Tokenizer
from cllm4rec_dist.corpus.manifest import Manifest
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.sources import read_source
from cllm4rec_dist.corpus.split_settings import GivenSplit
from cllm4rec_dist.corpus.tasks import ray_tasks
from cllm4rec_dist.corpus.writer import check_room, write_corpus

logger = logging.getLogger(__name__)


def prepare(
    config: PrepareConfig,
    tokenizer: Tokenizer,
    out: str,
    *,
    overwrite: bool = False,
    progress: bool = True,
    num_workers: int = 1,
) -> Manifest:
    """Build the corpus of a recipe and log what is left out of it.

    Args:
        config: the recipe.
        tokenizer: tokenizer of the backbone to train.
        out: folder or fsspec URL of the corpus.
        overwrite: replace an existing corpus.
        progress: show a progress bar.
        num_workers: concurrent Ray tasks that write shards; 1 writes them in this process. The bytes are equal.

    Raises:
        DataError: if raw data cannot be read or filters leave nothing.
        CorpusError: if `out` is in use.
    """
    check_room(out, overwrite=overwrite)
    raw = read_source(config.source)
    if "part" in raw.interactions.columns and "split" not in config.model_fields_set:
        config = config.model_copy(update={"split": GivenSplit(kind="given")})
    catalog = build_catalog(raw, config)
    del raw
    if num_workers > 1:
        with ray_tasks(num_workers) as run_tasks:
            manifest = write_corpus(
                catalog, tokenizer, out, config, overwrite=overwrite, progress=progress, run_tasks=run_tasks
            )
    else:
        manifest = write_corpus(catalog, tokenizer, out, config, overwrite=overwrite, progress=progress)
    for reason, skip in manifest.skipped.items():
        logger.info("left out: %s x %s%s", f"{skip.count:,}", reason, skip.describe())
    logger.info(
        "corpus %s at %s: %d users, %d items, interactions %s, texts %s",
        manifest.name,
        out,
        manifest.num_users,
        manifest.num_items,
        manifest.num_interactions,
        manifest.num_content,
    )
    return manifest
