"""From a recipe to a corpus on disk: read, number and split, write."""

from __future__ import annotations

import logging

from cllm4rec_dist.corpus.catalog import build_catalog
from cllm4rec_dist.corpus.manifest import Manifest
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.sources import read_source
from cllm4rec_dist.corpus.writer import Tokenizer, write_corpus

logger = logging.getLogger(__name__)


def prepare(
    config: PrepareConfig, tokenizer: Tokenizer, out: str, *, overwrite: bool = False, progress: bool = True
) -> Manifest:
    """Build the corpus of a recipe and log what is left out of it.

    Args:
        config: the recipe.
        tokenizer: of the backbone that will be trained.
        out: folder or fsspec URL of the corpus.
        overwrite: replace a corpus that is there.
        progress: show a progress bar.

    Raises:
        DataError: for raw data that cannot be read or filters that leave nothing.
        CorpusError: if `out` is in use.
    """
    manifest = write_corpus(
        build_catalog(read_source(config.source), config),
        tokenizer,
        out,
        config,
        overwrite=overwrite,
        progress=progress,
    )
    for reason, count in manifest.skipped.items():
        logger.info("left out: %d x %s", count, reason)
    logger.info(
        "corpus %s at %s: %d users, %d items, interactions %s, texts %s", manifest.name, out, manifest.num_users,
        manifest.num_items, manifest.num_interactions, manifest.num_content,
    )  # fmt: skip
    return manifest
