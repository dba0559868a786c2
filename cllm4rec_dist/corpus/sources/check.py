"""What can be seen of a recipe's files before they are read: wrong paths, and columns that are not there."""

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
"""Bytes from which on a file's columns are left to its reader: even its first lines take their time."""
_PATH_FIELDS = (
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


def check_source(source: SourceConfig) -> None:
    """Refuse a source whose files do not exist, or whose tables lack the recipe's columns.

    Raises:
        DataError: names the first path or column that is wrong, with the one that was meant.
    """
    for field, path in _paths(source):
        is_pattern = any(letter in path for letter in "*?[")
        if is_url(path) or is_pattern or Path(path).exists() or source.format == "recbole":
            continue
        cure = f"Mend the path in the recipe, or fetch the data.{did_you_mean_path(path)}"
        raise DataError(f"source.{field}", path, "does not exist", cure)
    if isinstance(source, TableSource):
        for table, columns in _tables(source):
            _check_columns(table, columns, source.encoding)


def _paths(source: SourceConfig) -> Iterator[tuple[str, str]]:
    for field in _PATH_FIELDS:
        value = getattr(source, field, None)
        if isinstance(value, TableFile):
            yield from ((f"{field}.path", path) for path in value.path)
        elif isinstance(value, str):
            yield field, value
        elif isinstance(value, tuple):
            yield from ((field, path) for path in value)


def _tables(source: TableSource) -> Iterator[tuple[TableFile, list[str]]]:
    """Each table with the columns that it must have."""
    orders = source.interactions
    names = (orders.user, orders.item, orders.rating, orders.timestamp, orders.text)
    yield orders, [name for name in names if name is not None]
    if source.items is not None:
        given = source.items.model_dump(include={"item", "title", "category"}).values()
        yield source.items, [*(name for name in given if name is not None), *source.items.description]
    if source.users is not None:
        yield source.users, [source.users.user, *source.users.text]


def _check_columns(table: TableFile, columns: list[str], encoding: str) -> None:
    for file in find_files(table.path):
        if is_url(file.path) or Path(file.path).stat().st_size > _LARGE:
            continue
        names = {name: name for name in columns}
        log = SkipLog("skip", max_lost=1.0)
        next(read_batches(file, table, encoding, names, dict.fromkeys(columns, "text"), log), None)
