"""Reader of CSV, JSON and Parquet files whose columns the recipe names."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import polars as pl

from cllm4rec_dist.corpus.about import TextCollector, joined
from cllm4rec_dist.corpus.raw import InteractionCollector, RawData, Rules
from cllm4rec_dist.corpus.recipe import TableFile, TableSource
from cllm4rec_dist.corpus.row_batch import Batch
from cllm4rec_dist.corpus.skips import SkipLog, base_name
from cllm4rec_dist.corpus.sources.columnar import read_parquet
from cllm4rec_dist.corpus.sources.delimited import read_delimited
from cllm4rec_dist.corpus.sources.encoding import first_text
from cllm4rec_dist.corpus.sources.files import PARQUET_MAGIC, RawFile, find_files, first_bytes
from cllm4rec_dist.corpus.sources.objects import Getter, object_batches, read_objects, require_seen
from cllm4rec_dist.corpus.sources.records import Dialect
from cllm4rec_dist.corpus.values import id_text, number_text, plain_text
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.suggestions import plural

logger = logging.getLogger(__name__)

Role = Literal["id", "number", "text"]
_CONVERSIONS = {"id": id_text, "number": number_text, "text": plain_text}


def read_table(source: TableSource) -> RawData:
    """Read interactions and, if the recipe has files of them, texts."""
    log = SkipLog(source.on_bad_line, source.max_lost)
    table = source.interactions
    rules = Rules(
        missing=source.missing,
        has_rating=table.rating is not None,
        has_text=table.text is not None,
        has_html=table.html,
        decimal=table.decimal,
        time_format=table.time_format,
        allow_unmatched=source.allow_unmatched,
        new_items=source.new_items,
    )
    names = {
        "user": table.user,
        "item": table.item,
        "rating": table.rating,
        "timestamp": table.timestamp,
        "text": table.text,
    }
    present = {role: name for role, name in names.items() if name is not None}
    roles: dict[str, Role] = {"user": "id", "item": "id", "rating": "number", "timestamp": "number", "text": "text"}
    collector = InteractionCollector(log, rules, present)
    for file in find_files(table.path):
        batches = read_batches(file, table, source.encoding, present, roles, log)
        collector.add_file(file.path, _renamed(batches, present))
    raw = collector.finish()
    if source.items is not None:
        raw = replace(raw, items=_item_texts(source, raw, rules, log))
    if source.users is not None:
        raw = replace(raw, users=_user_texts(source, raw, rules, log))
    return raw


def _item_texts(source: TableSource, raw: RawData, rules: Rules, log: SkipLog) -> pl.DataFrame:
    table = source.items
    assert table is not None
    columns = {f"d{index}": name for index, name in enumerate(table.description)}
    titles = {} if table.title is None else {"title": table.title}
    categories = {} if table.category is None else {"category": table.category}
    names = {"item": table.item, **titles, **columns, **categories}
    texts = [*titles, *columns, *categories]
    roles: dict[str, Role] = {"item": "id", **dict.fromkeys(texts, "text")}
    # A file of orders is no catalog: an item whose orders cannot be used is not a new product.
    new_items = source.new_items and set(table.path).isdisjoint(source.interactions.path)
    rules = replace(rules, has_html=table.html, new_items=new_items)
    collector = TextCollector("item", texts, raw.item_ids, log, rules, one_line=("title", "category"))
    for file in find_files(table.path):
        collector.add_file(file.path, _renamed(read_batches(file, table, source.encoding, names, roles, log), names))
    rows = collector.finish()
    _report_without_texts(raw, rows["item"], table.path)
    return rows.select(
        "item",
        joined(rows, list(titles)).alias("title"),
        joined(rows, list(columns)).alias("description"),
        *categories,
    )


def _report_without_texts(raw: RawData, described: pl.Series, paths: tuple[str, ...]) -> None:
    """Log how many items of the interactions no file of items has, unless they are most: that is a warning already."""
    is_missing = ~raw.item_ids.is_in(described.implode())
    num_missing = int(is_missing.sum())
    if not num_missing or 2 * num_missing > len(raw.item_ids):
        return
    of_missing = raw.interactions.filter(is_missing.gather(raw.interactions["item"]))
    logger.warning(
        "%s: has no row for %s of %s ordered items, such as %r (%s in all): their texts are unknown",
        ", ".join(map(base_name, paths[:3])),
        f"{num_missing:,}",
        f"{len(raw.item_ids):,}",
        raw.item_ids.filter(is_missing)[0],
        plural(of_missing["user"].n_unique(), "customer"),
    )


def _user_texts(source: TableSource, raw: RawData, rules: Rules, log: SkipLog) -> pl.DataFrame:
    table = source.users
    assert table is not None
    columns = {f"t{index}": name for index, name in enumerate(table.text)}
    names = {"user": table.user, **columns}
    roles: dict[str, Role] = {"user": "id", **dict.fromkeys(columns, "text")}
    collector = TextCollector("user", list(columns), raw.user_ids, log, replace(rules, has_html=table.html))
    for file in find_files(table.path):
        collector.add_file(file.path, _renamed(read_batches(file, table, source.encoding, names, roles, log), names))
    rows = collector.finish()
    return rows.select("user", joined(rows, list(columns)).alias("text"))


def _renamed(batches: Iterator[Batch], names: dict[str, str]) -> Iterator[Batch]:
    """Rename the file's columns to their roles; a column may have several."""
    for batch in batches:
        columns = batch.columns.select(batch.columns[name].alias(role) for role, name in names.items())
        yield Batch(batch.path, batch.lines, columns)


def read_batches(
    file: RawFile, table: TableFile, encoding: str, names: dict[str, str], roles: dict[str, Role], log: SkipLog
) -> Iterator[Batch]:
    """Yield the columns `names` of a file of any kind."""
    columns = list(dict.fromkeys(names.values()))
    encoding = table.encoding or encoding
    kind = table.kind if table.kind != "auto" else find_kind(file.path, encoding)
    if kind == "csv":
        dialect = Dialect(table.separator, table.quoting, table.escape, encoding, table.names)
        numeric = [names[role] for role in ("rating", "timestamp") if role in names]
        return read_delimited(file, columns, dialect, log, numeric)
    if kind == "parquet":
        return read_parquet(file, columns, log)
    fields = [name for name in columns if name not in file.partition]
    # JSON is UTF-8 or has a byte order mark; the encoding of the source is meant for its delimited files.
    objects = require_seen(file.path, read_objects(file, log, table.encoding or "auto", fields), fields)
    by_name = {name: roles[role] for role, name in reversed(names.items())}
    getters: list[Getter] = [(name, partial(_get, name, by_name[name])) for name in fields]
    return object_batches(file, objects, getters, log, columns)


def _get(name: str, role: Role, entry: dict[str, Any]) -> str | None:
    return _CONVERSIONS[role](entry.get(name))


def find_kind(path: str, encoding: str) -> str:
    """Detect the kind of a table from its file's first bytes: csv, jsonl or parquet; DataError for other kinds."""
    head = first_bytes(path, 4096)
    if head.startswith(PARQUET_MAGIC):
        return "parquet"
    text = first_text(path, encoding)
    if text.lstrip().startswith(("{", "[")):
        return "jsonl"
    if "\x00" in text:
        raise DataError("file", path, "is neither text nor Parquet", "Save it as CSV, JSON lines or Parquet.")
    return "csv"
