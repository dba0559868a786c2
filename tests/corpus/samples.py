"""Small raw data and a small tokenizer for the tests of the corpus."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import pandas as pd

from cllm4rec_dist.config import validate
from cllm4rec_dist.corpus.raw import RawData, SkipLog, collect_interactions
from cllm4rec_dist.corpus.recipe import PrepareConfig, SourceConfig

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
    log = SkipLog()
    numbered = [(line, *row) for line, row in enumerate(rows, start=1)]
    has_rating = any(row[2] is not None for row in rows)
    interactions = collect_interactions(numbered, "sample", log, has_rating=has_rating, has_text=False)
    items = pd.DataFrame(texts.get("items", []), columns=["item", "title", "description"])
    return RawData(interactions, items, pd.DataFrame(texts.get("users", []), columns=["user", "text"]), log.skipped)
