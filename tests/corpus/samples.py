"""Small raw data and a small tokenizer for the tests of the corpus."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import polars as pl

from cllm4rec_dist.config import validate
from cllm4rec_dist.corpus.catalog import Catalog
from cllm4rec_dist.corpus.raw import InteractionCollector, RawData, Rules
from cllm4rec_dist.corpus.recipe import PrepareConfig, SourceConfig
from cllm4rec_dist.corpus.row_batch import Batch
from cllm4rec_dist.corpus.skips import SkipLog

DEMO = {"format": "synthetic", "num_users": 40, "num_items": 30, "num_clusters": 4, "mean_interactions": 8}


class BlankTokenizer:
    """Splits at blanks; a word's id is a checksum of it."""

    fingerprint = "blank-tokenizer"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[zlib.crc32(word.encode()) % 1000 for word in text.split()] for text in texts]


def recipe(**settings: Any) -> PrepareConfig:
    """A recipe of the small synthetic source, changed by the settings."""
    return validate(PrepareConfig, {"name": "sample", "source": DEMO} | settings, "test")


def source(**settings: Any) -> SourceConfig:
    """A source, validated as part of a recipe."""
    return recipe(source=settings).source


def raw_data(rows: Sequence[tuple[Any, ...]], **texts: list[tuple[str, ...]]) -> RawData:
    """Raw data of (user, item, rating, timestamp, text) rows."""
    rules = Rules(has_rating=any(row[2] is not None for row in rows), has_text=True)
    collector = InteractionCollector(SkipLog(), rules)
    types = {"user": pl.String, "item": pl.String, "rating": pl.Float64, "timestamp": pl.Float64, "text": pl.String}
    columns = pl.DataFrame(rows, schema=types, orient="row")
    collector.add_file("sample", [Batch("sample", np.arange(1, len(rows) + 1), columns)])
    return replace(
        collector.finish(),
        has_reviews=False,
        items=_texts(texts.get("items", []), ("item", "title", "description")),
        users=_texts(texts.get("users", []), ("user", "text")),
    )


def _texts(rows: list[tuple[str, ...]], names: Sequence[str]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def interactions(raw: RawData) -> pd.DataFrame:
    """Interactions in the order of the files, with ids and texts ("" where there is none)."""
    table = raw.interactions.to_pandas()
    table["user"] = raw.user_ids.to_numpy()[table["user"]]
    table["item"] = raw.item_ids.to_numpy()[table["item"]]
    table["text"] = ""
    table.loc[table["has_text"], "text"] = list(raw.reviews)
    return table


def reviews(catalog: Catalog) -> list[str]:
    """Texts of the training interactions, by user and time."""
    return [text for table in catalog.reviews.store.sorted_by(catalog.reviews.ranks) for text in table["text"]]
