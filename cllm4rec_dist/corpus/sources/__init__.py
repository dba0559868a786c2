"""Readers of raw data, one module for each family of formats.

Each reader yields batches with columns user, item, rating, timestamp and text, and batches of texts about users and
items. `corpus/raw.py` and `corpus/about.py` check their values.
"""

from __future__ import annotations

import logging

from cllm4rec_dist.corpus.raw import RawData
from cllm4rec_dist.corpus.recipe import (
    AmazonSource,
    GroupLensSource,
    MindSource,
    RecboleSource,
    SequencesSource,
    SourceConfig,
    SteamSource,
    SyntheticSource,
    TableSource,
)
from cllm4rec_dist.corpus.sources.mind import read_mind
from cllm4rec_dist.corpus.sources.movielens import read_grouplens, read_recbole
from cllm4rec_dist.corpus.sources.reviews import read_amazon, read_steam, read_yelp
from cllm4rec_dist.corpus.sources.sequences import read_sequences
from cllm4rec_dist.corpus.sources.tables import read_table
from cllm4rec_dist.corpus.synthetic import generate

__all__ = ["RawData", "read_source"]

logger = logging.getLogger(__name__)


def read_source(source: SourceConfig) -> RawData:
    """Read all files of a recipe's source.

    Raises:
        DataError: for a missing file or column, an unreadable file, no interaction left, and, with
            `on_bad_line: error`, the first line that cannot be read.
    """
    raw = _read(source)
    logger.info(
        "read %s: %s interactions of %s users with %s items",
        source.format,
        f"{len(raw.interactions):,}",
        f"{len(raw.user_ids):,}",
        f"{len(raw.item_ids):,}",
    )
    return raw


def _read(source: SourceConfig) -> RawData:
    match source:
        case RecboleSource():
            return read_recbole(source)
        case GroupLensSource():
            return read_grouplens(source)
        case AmazonSource():
            return read_amazon(source)
        case SteamSource():
            return read_steam(source)
        case MindSource():
            return read_mind(source)
        case SequencesSource():
            return read_sequences(source)
        case TableSource():
            return read_table(source)
        case SyntheticSource():
            return generate(source)
        case _:
            return read_yelp(source)
