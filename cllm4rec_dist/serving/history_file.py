"""Files of later orders: CSV, JSON lines or Parquet with a user, an item and optionally a time in each row.

They are read like the raw data of `prepare`, so that encodings, separators, dirty lines and ids are treated as when the
corpus was built. Columns are detected by their names. Without torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import polars as pl
from pydantic import ValidationError

from cllm4rec_dist.corpus.manifest import OrderColumns
from cllm4rec_dist.corpus.raw import RawData
from cllm4rec_dist.corpus.recipe import InteractionTable, TableFile, TableSource
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.sources.files import RawFile, find_files
from cllm4rec_dist.corpus.sources.tables import read_batches, read_table
from cllm4rec_dist.corpus.times import read_times
from cllm4rec_dist.corpus.values import MISSING_WORDS
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.serving.id_list import similar_ids
from cllm4rec_dist.serving.table_columns import ITEM_NAMES, column_names, find_encoding, likely_column

logger = logging.getLogger(__name__)

_NAMES = {
    "user": "user userid username uid customer customerid customernumber client clientid account accountid member"
    " memberid buyer buyerid visitor visitorid reviewer reviewerid kunde kundennummer kundenid person who",
    "item": ITEM_NAMES,
    "time": "time timestamp date datetime orderdate ordertime orderedat boughtat purchasedate purchasedat createdat"
    " created when day datum zeit ts unixtime unixreviewtime invoicedate eventtime",
}
"""Usual column names, lower case letters only, most likely first."""
_SAMPLE = 1000
"""Number of times with which the recipe's time format is tried."""
_OPTIONS = {"path": "--history", "user": "--user-column", "item": "--item-column", "timestamp": "--time-column"}
"""Options that are not named like their key of a recipe."""
Columns = tuple[str, str, str | None]
TableT = TypeVar("TableT", bound=TableFile)


@dataclass(frozen=True)
class HistoryFormat:
    """Format of the file as given by the user; None means to detect it."""

    user_column: str | None = None
    item_column: str | None = None
    time_column: str | None = None
    time_format: str | None = None
    separator: str | None = None
    encoding: str | None = None


def read_histories(
    path: str, given: HistoryFormat | None = None, recipe: OrderColumns | None = None
) -> dict[str, tuple[str, ...]]:
    """Read the item ids of each user, by external id, users in order of first appearance.

    A user's items are in order of time, or in file order if there is no time column.

    Args:
        path: file, pattern or folder of parts.
        given: format as given by the user.
        recipe: column names of the corpus' raw data, which are preferred if the file has them; other columns are
            detected by their usual names.

    Raises:
        DataError: if the file cannot be read or has no usable row.
        ConfigError: if a column is missing or cannot be detected, or one column is given twice.
    """
    try:
        raw = _read(path, given or HistoryFormat(), recipe)
    except DataError as error:
        raise _with_options(error) from None
    for reason, count in raw.log.counts.items():
        logger.info("%s: left out %d x %s", path, count, reason)
    return _group_by_user(raw)


def _read(path: str, given: HistoryFormat, recipe: OrderColumns | None) -> RawData:
    """Read the file's interactions with the reader of `prepare`."""
    written = {"path": path, "separator": given.separator, "encoding": given.encoding}
    _validated(TableFile, written)
    files = _files(path)
    file = files[0]
    if given.encoding is None and len(files) == 1:
        written["encoding"] = find_encoding(file.path, "give --encoding")
        given = replace(given, encoding=written["encoding"])
    user, item, time = _columns(path, file, given, recipe)
    logger.info("%s: users are %r, items %r, times %s", path, user, item, "not given" if time is None else repr(time))
    columns = {"user": user, "item": item, "timestamp": time}
    table = _validated(InteractionTable, {**written, **columns, "time_format": given.time_format})
    if given.time_format is None:
        table = table.model_copy(update={"time_format": _recipe_format(file, table, recipe)})
    return read_table(TableSource(format="table", interactions=table))


def _validated(model: type[TableT], given: dict[str, Any]) -> TableT:
    """Validate the format of the file. An error names the first option that is wrong."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name, rule = str(first["loc"][0]), str(first["msg"]).removeprefix("Value error, ")
        option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
        raise ConfigError(option, given[name], f"is refused: {rule}", "Leave it out: it is detected.") from None


def _group_by_user(raw: RawData) -> dict[str, tuple[str, ...]]:
    """Group items by user; an unknown time counts as the oldest, as in `prepare`."""
    frame = raw.interactions.with_columns(pl.col("timestamp").fill_nan(-np.inf))
    first = frame.group_by("user").agg(pl.col("position").min().alias("first"))
    frame = frame.sort("timestamp", "position", maintain_order=True)
    lists = frame.group_by("user", maintain_order=True).agg("item").join(first, on="user").sort("first")
    users, items = raw.user_ids.to_list(), raw.item_ids.to_list()
    pairs = zip(lists["user"].to_list(), lists["item"].to_list(), strict=True)
    return {users[user]: tuple(items[item] for item in each) for user, each in pairs}


def _files(path: str) -> list[RawFile]:
    try:
        return find_files([path])
    except DataError as error:
        raise DataError("--history", path, error.constraint, "Give a file of later orders.") from None


def _recipe_format(file: RawFile, table: InteractionTable, recipe: OrderColumns | None) -> str | None:
    """Return the recipe's time format if it parses the file's first times, else None."""
    if recipe is None or recipe.time_format is None or table.timestamp is None:
        return None
    log = SkipLog("skip", max_lost=1.0)
    names = {"timestamp": table.timestamp}
    batch = next(read_batches(file, table, "auto", names, {"timestamp": "number"}, log), None)
    if batch is None:
        return None
    times = batch.columns[table.timestamp].head(_SAMPLE)
    return recipe.time_format if not read_times(times, "", recipe.time_format, MISSING_WORDS).wrong.any() else None


def _with_options(error: DataError) -> DataError:
    """Add the command line option to the cure of an error about the file."""
    keys = [key for key in ("time_format", "encoding", "separator") if key in error.cure]
    option = f" (recommend: --{keys[0].replace('_', '-')})" if keys else ""
    return DataError(error.field, error.value, error.constraint, f"{error.cure.rstrip()}{option}")


def _columns(path: str, file: RawFile, given: HistoryFormat, recipe: OrderColumns | None) -> Columns:
    expected = () if recipe is None else (recipe.user, recipe.item)
    names = column_names(file, given.separator, given.encoding, expected)
    if not names:
        raise DataError("--history", file.path, "is empty", "Give a file with a header and a row for each order.")
    named = {"user": given.user_column, "item": given.item_column, "time": given.time_column}
    usual: dict[str, str | None] = {"user": None, "item": None, "time": None}
    if recipe is not None:
        usual = {"user": recipe.user, "item": recipe.item, "time": recipe.timestamp}
        usual = {role: name if name in names and name not in named.values() else None for role, name in usual.items()}
    columns: dict[str, str | None] = {}
    for role, name in named.items():
        if name is not None and name not in names:
            likely = similar_ids(name, names)
            hint = f"Did you mean {', '.join(likely)}?" if likely else "Name one of them."
            raise ConfigError(
                f"--{role}-column", name, f"is not a column of {path}, which has {', '.join(names)}", hint
            )
        used = {*columns.values(), *named.values(), *usual.values()}
        columns[role] = name or usual[role] or likely_column(_NAMES[role], [each for each in names if each not in used])
    _require_different(columns)
    for role in ("user", "item"):
        if columns[role] is None:
            raise ConfigError(
                f"--{role}-column",
                path,
                f"has no column with a usual name of {role}s, only {', '.join(names)}",
                f"Name the column of {role} ids: --{role}-column NAME.",
            )
    return str(columns["user"]), str(columns["item"]), columns["time"]


def _require_different(columns: Mapping[str, str | None]) -> None:
    """Reject a column that has two of the roles user, item and time."""
    for role, other in combinations(columns, 2):
        if columns[role] is not None and columns[role] == columns[other]:
            raise ConfigError(
                f"--{role}-column, --{other}-column",
                columns[role],
                f"cannot be the column of both {role}s and {other}s",
                "Name a column for each.",
            )
