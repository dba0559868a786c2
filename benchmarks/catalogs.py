"""Random backbones and corpora of any size, with a few texts, made in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from cllm4rec_dist.config import BackboneConfig
from cllm4rec_dist.corpus.catalog import Catalog, Reviews
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.reviews import ReviewStore
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.tokenizer import WordTokenizer
from cllm4rec_dist.corpus.writer import write_corpus
from cllm4rec_dist.model.build_backbone import build_backbone

_WORDS = ("river", "mountain", "espresso", "trail", "quiet", "blue", "garden", "lantern", "violin", "harbour", "maple")


def make_corpus(
    folder: Path, num_users: int, num_items: int, hidden: int, layers: int = 2, num_texts: int = 5000
) -> None:
    """Write `folder`/backbone and `folder`/corpus.

    Histories are log-normal in length (median 8, a long tail, as real ones are), reviews have 5 to 60 words.
    """
    random = np.random.default_rng(0)
    settings = BackboneConfig(family="llama", hidden_size=hidden, num_layers=layers, num_heads=4, vocab_size=500)
    build_backbone(settings, _WORDS, folder / "backbone")
    lengths = np.clip(random.lognormal(np.log(8), 1.0, num_users).astype(np.int64), 3, 200)
    items = random.integers(0, num_items, lengths.sum(), dtype=np.int32)
    held = [
        Ragged.from_lengths(np.ones(num_users, dtype=np.int64), random.integers(0, num_items, num_users))
        for _ in range(2)
    ]
    authors = random.choice(num_users, min(num_texts, num_users), replace=False)
    train = Ragged.from_lengths(lengths, items)
    store = ReviewStore()
    store.append(
        np.arange(len(authors)),
        pl.Series([" ".join(random.choice(_WORDS, random.integers(5, 60))) for _ in authors]),
    )
    written = np.array([train[int(user)][0] for user in authors])
    none = {size: pl.Series([""]).new_from_index(0, size) for size in (num_users, num_items)}
    catalog = Catalog(
        user_ids=pl.Series([f"u{n:09d}" for n in range(num_users)]),
        item_ids=pl.Series([f"i{n:09d}" for n in range(num_items)]),
        user_texts=none[num_users],
        item_titles=none[num_items],
        item_descriptions=none[num_items],
        train=train,
        valid=held[0],
        test=held[1],
        reviews=Reviews(authors, written, np.arange(len(authors)), store),
        log=SkipLog(),
    )
    recipe = PrepareConfig.model_validate({"name": "benchmark", "source": {"format": "synthetic"}})
    write_corpus(catalog, WordTokenizer.load(folder / "backbone"), str(folder / "corpus"), recipe)
