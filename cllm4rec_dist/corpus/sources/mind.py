"""MIND, Microsoft's news data set: clicks of users on articles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.about import TextCollector, joined
from cllm4rec_dist.corpus.raw import InteractionCollector, RawData, Rules
from cllm4rec_dist.corpus.recipe import MindSource
from cllm4rec_dist.corpus.row_batch import Batch
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.sources.delimited import read_delimited
from cllm4rec_dist.corpus.sources.files import find_files
from cllm4rec_dist.corpus.sources.records import Dialect

_BEHAVIORS = ("impression", "user", "time", "history", "shown")
_NEWS = ("item", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")
_TIME_FORMAT = "%m/%d/%Y %I:%M:%S %p"


def read_mind(source: MindSource) -> RawData:
    """Read click histories, without times, and clicks among the articles shown."""
    log = SkipLog(source.on_bad_line, source.max_lost)
    rules = Rules(
        missing=source.missing,
        time_format=_TIME_FORMAT,
        allow_unmatched=source.allow_unmatched,
        new_items=source.new_items,
    )
    dialect = Dialect("\t", "none", None, source.encoding, _BEHAVIORS)
    collector = InteractionCollector(log, rules)
    for file in find_files(source.behaviors):
        rows = read_delimited(file, _BEHAVIORS[1:], dialect, log)
        collector.add_file(file.path, _clicks(rows, log))
    raw = collector.finish()
    if source.news is None:
        return raw
    news = TextCollector("item", ("title", "description"), raw.item_ids, log, rules, one_line=("title",))
    dialect = Dialect("\t", "none", None, source.encoding, _NEWS)
    for file in find_files(source.news):
        news.add_file(file.path, _articles(read_delimited(file, _NEWS[:5], dialect, log)))
    return replace(raw, items=news.finish())


def _clicks(batches: Iterator[Batch], log: SkipLog) -> Iterator[Batch]:
    """Yield a row for each article of a history and each clicked one (`N12-1`); others are no interactions."""
    for batch in batches:
        rows = batch.columns.with_columns(line=pl.Series(batch.lines))
        history = rows.select(
            "line", "user", pl.lit(None, pl.String).alias("timestamp"), item=pl.col("history").str.split(" ")
        )
        shown = rows.select("line", "user", timestamp="time", item=pl.col("shown").str.split(" "))
        shown = shown.explode("item").filter(pl.col("item").str.ends_with("-1"))
        history = history.explode("item").filter(pl.col("item").str.len_bytes() > 0)
        clicks = pl.concat([history, shown.with_columns(pl.col("item").str.strip_suffix("-1"))]).sort(
            "line", maintain_order=True
        )
        log.read(batch.path, len(clicks) - len(rows))
        yield Batch(batch.path, clicks["line"].to_numpy().astype(np.int64), clicks.select("user", "item", "timestamp"))


def _articles(batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        described = joined(batch.columns, ("category", "subcategory", "abstract"), ". ").alias("description")
        yield Batch(batch.path, batch.lines, batch.columns.select("item", "title", described))
