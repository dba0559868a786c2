"""Fast checks of a recipe's files before they are read: missing paths and columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cllm4rec_dist.corpus.recipe import SourceConfig, TableFile, TableSource
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.sources.files import find_files
from cllm4rec_dist.corpus.sources.tables import read_batches
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.filesystems import is_url
from cllm4rec_dist.suggestions import did_you_mean_path

_LARGE = 32 << 20
"""Columns of files larger than this many bytes are checked only when they are read: even their first lines are slow."""
PATH_FIELDS = (
    "interactions",
    "items",
    "users",
    "reviews",
    "metadata",
    "businesses",
    "games",
    "behaviors",
    "news",
    "sequences",
    "titles",
    "folder",
)
"""Fields of sources that name files or folders."""


def check_source(source: SourceConfig) -> None:
    """Refuse a source with missing files, or tables without the recipe's columns.

    Raises:
        DataError: for the first wrong path or column, with the closest existing one.
    """
    for field, path in _paths(source):
        is_pattern = any(letter in path for letter in "*?[")
        if is_url(path) or is_pattern or Path(path).exists() or source.format == "recbole":
            continue
        cure = f"Fix the path in the recipe, or download the data.{did_you_mean_path(path)}"
        raise DataError(f"source.{field}", path, "does not exist", cure)
    if isinstance(source, TableSource):
        for table, columns in _tables(source):
            _check_columns(table, columns, source.encoding)


def _paths(source: SourceConfig) -> Iterator[tuple[str, str]]:
    for field in PATH_FIELDS:
        value = getattr(source, field, None)
        if isinstance(value, TableFile):
            yield from ((f"{field}.path", path) for path in value.path)
        elif isinstance(value, str):
            yield field, value
        elif isinstance(value, tuple):
            yield from ((field, path) for path in value)


def _tables(source: TableSource) -> Iterator[tuple[TableFile, list[str]]]:
    """Yield each table with its required columns."""
    orders = source.interactions
    names = (orders.user, orders.item, orders.rating, orders.timestamp, orders.text)
    yield orders, [name for name in names if name is not None]
    if source.items is not None:
        columns = source.items.model_dump(include={"item", "title", "category"}).values()
        yield source.items, [*(name for name in columns if name is not None), *source.items.description]
    if source.users is not None:
        yield source.users, [source.users.user, *source.users.text]


def _check_columns(table: TableFile, columns: list[str], encoding: str) -> None:
    for file in find_files(table.path):
        if is_url(file.path) or Path(file.path).stat().st_size > _LARGE:
            continue
        names = {name: name for name in columns}
        log = SkipLog("skip", max_lost=1.0)
        next(read_batches(file, table, encoding, names, dict.fromkeys(columns, "text"), log), None)
