"""CSV, JSON lines and Parquet whose columns the recipe names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cllm4rec_dist.corpus.raw import (
    RawData,
    Row,
    SkipLog,
    clean_text,
    clean_title,
    collect_interactions,
    collect_texts,
    known_ids,
    no_texts,
)
from cllm4rec_dist.corpus.recipe import InteractionTable, TableFile, TableSource
from cllm4rec_dist.corpus.sources.files import read_csv, read_objects, read_parquet
from cllm4rec_dist.errors import DataError


def read_table(source: TableSource) -> RawData:
    """Interactions, and texts where the recipe names files of them."""
    log = SkipLog(source.on_bad_line)
    table = source.interactions
    interactions = collect_interactions(
        _interactions(table, log), table.path, log, has_rating=table.rating is not None, has_text=table.text is not None
    )
    items, users = no_texts("item", ("title", "description")), no_texts("user", ("text",))
    if source.items is not None:
        title = () if source.items.title is None else (source.items.title,)
        rows = _rows(source.items, [source.items.item, *title, *source.items.description], log)
        texts = ((row[0], row[1 : 1 + len(title)], row[1 + len(title) :]) for _, row in rows)
        described = ((item, clean_title(_joined(names)), _joined(rest)) for item, names, rest in texts)
        items = collect_texts(described, "item", ("title", "description"), known_ids(interactions, "item"), log)
    if source.users is not None:
        profiles = (
            (row[0], _joined(row[1:])) for _, row in _rows(source.users, [source.users.user, *source.users.text], log)
        )
        users = collect_texts(profiles, "user", ("text",), known_ids(interactions, "user"), log)
    return RawData(interactions, items, users, log.skipped)


def _joined(values: list[Any]) -> str:
    return " ".join(text for value in values if (text := clean_text(value)))


def _interactions(table: InteractionTable, log: SkipLog) -> Iterator[Row]:
    columns = [table.user, table.item, table.rating, table.timestamp, table.text]
    present = [name for name in columns if name is not None]
    for line, values in _rows(table, present, log):
        by_column: dict[str | None, Any] = dict(zip(present, values, strict=True))
        user, item, rating, timestamp, text = (by_column.get(name) for name in columns)
        yield line, user, item, rating, timestamp, text


def _rows(table: TableFile, columns: list[str], log: SkipLog) -> Iterator[tuple[int, list[Any]]]:
    match table.kind:
        case "csv":
            return read_csv(table.path, columns, log, table.delimiter, table.names)
        case "jsonl":
            return _objects(table.path, columns, log)
        case "parquet":
            return read_parquet(table.path, columns)


def _objects(path: str, columns: list[str], log: SkipLog) -> Iterator[tuple[int, list[Any]]]:
    """The chosen fields of each object, None where an object leaves one out. DataError if all of them do."""
    unseen = set(columns)
    for line, entry in read_objects(path, log):
        unseen -= entry.keys()
        yield line, [entry.get(column) for column in columns]
    if unseen:
        raise DataError(path, sorted(unseen), "is in no object of the file", "Mend the names in the recipe.")
