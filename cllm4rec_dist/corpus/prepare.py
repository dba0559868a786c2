"""From a recipe to a corpus on disk: read, number and split, write."""

from __future__ import annotations

import logging

from cllm4rec_dist.corpus.catalog import build_catalog
from cllm4rec_dist.corpus.manifest import Manifest
from cllm4rec_dist.corpus.recipe import GivenSplit, PrepareConfig
from cllm4rec_dist.corpus.sources import read_source
from cllm4rec_dist.corpus.tasks import ray_tasks
from cllm4rec_dist.corpus.writer import Tokenizer, check_room, write_corpus

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
        tokenizer: of the backbone that will be trained.
        out: folder or fsspec URL of the corpus.
        overwrite: replace a corpus that is there.
        progress: show a progress bar.
        num_workers: Ray tasks that write shards at a time; 1 writes them here. The bytes are the same.

    Raises:
        DataError: for raw data that cannot be read or filters that leave nothing.
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
    for reason, found in manifest.skipped.items():
        logger.info("left out: %s x %s%s", f"{found.count:,}", reason, found.describe())
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
