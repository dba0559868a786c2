"""Files of later orders: CSV, JSON lines or Parquet with a user and an item in each row, and perhaps a time.

Read by the readers that `prepare` uses, so that encodings, separators, dirty lines and ids are treated as they were
when the corpus was built. Columns are found by their names. Nothing here imports torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from itertools import combinations, islice

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from cllm4rec_dist.corpus.raw import RawData
from cllm4rec_dist.corpus.recipe import InteractionTable, TableSource
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.sources.delimited import read_header
from cllm4rec_dist.corpus.sources.files import RawFile, find_files, open_binary
from cllm4rec_dist.corpus.sources.objects import read_objects
from cllm4rec_dist.corpus.sources.records import Dialect
from cllm4rec_dist.corpus.sources.tables import find_kind, read_table
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.id_list import similar_ids

logger = logging.getLogger(__name__)

_NAMES = {
    "user": "user userid username uid customer customerid customernumber client clientid account accountid member"
    " memberid buyer buyerid visitor visitorid reviewer reviewerid kunde kundennummer kundenid person who",
    "item": "item itemid product productid productnumber sku article articleid articlenumber asin isbn movie movieid"
    " book bookid track trackid stockcode parentasin artikel artikelnummer produkt what",
    "time": "time timestamp date datetime orderdate ordertime orderedat boughtat purchasedate purchasedat createdat"
    " created when day datum zeit ts unixtime unixreviewtime invoicedate eventtime",
}
"""Usual names of columns, in lower case and without anything but letters, the likelier ones first."""
_SEPARATORS = ",;\t|"
Columns = tuple[str, str, str | None]


def read_histories(
    path: str, user_column: str | None = None, item_column: str | None = None, time_column: str | None = None
) -> dict[str, tuple[str, ...]]:
    """Items of each user, by external ids, users in the order in which the file first names them.

    A user's items are in the order of time, or in that of the lines where there is no column of times.

    Args:
        path: file, pattern or folder of parts.
        user_column, item_column, time_column: names of columns; None finds them.

    Raises:
        DataError: for a file that cannot be read, or without a usable row.
        ConfigError: for columns that are not there or cannot be found, and for one column given twice.
    """
    user, item, time = _columns(path, user_column, item_column, time_column)
    logger.info("%s: users are %r, items %r, times %s", path, user, item, "not given" if time is None else repr(time))
    table = InteractionTable.model_validate({"path": path, "user": user, "item": item, "timestamp": time})
    raw = read_table(TableSource(format="table", interactions=table))
    for reason, count in raw.log.counts.items():
        logger.info("%s: left out %d x %s", path, count, reason)
    return _grouped(raw)


def _grouped(raw: RawData) -> dict[str, tuple[str, ...]]:
    """Items of each user; an unknown time counts as the oldest, as in `prepare`."""
    frame = raw.interactions.with_columns(pl.col("timestamp").fill_nan(-np.inf))
    first = frame.group_by("user").agg(pl.col("position").min().alias("first"))
    frame = frame.sort("timestamp", "position", maintain_order=True)
    lists = frame.group_by("user", maintain_order=True).agg("item").join(first, on="user").sort("first")
    users, items = raw.user_ids.to_list(), raw.item_ids.to_list()
    pairs = zip(lists["user"].to_list(), lists["item"].to_list(), strict=True)
    return {users[user]: tuple(items[item] for item in each) for user, each in pairs}


def _columns(path: str, user: str | None, item: str | None, time: str | None) -> Columns:
    try:
        file = find_files([path])[0]
    except DataError as error:
        raise DataError("--history", path, error.constraint, "Give a file of later orders.") from None
    names = _column_names(file)
    found: dict[str, str | None] = {}
    for role, given in (("user", user), ("item", item), ("time", time)):
        if given is not None and given not in names:
            likely = similar_ids(given, names)
            hint = f"Did you mean {', '.join(likely)}?" if likely else "Name one of them."
            raise ConfigError(f"--{role}-column", given, f"is no column of {path}, which has {', '.join(names)}", hint)
        left = [name for name in names if name not in found.values()]
        found[role] = given or _guess(role, [name for name in left if name not in (user, item, time)])
    _require_different(found)
    for role in ("user", "item"):
        if found[role] is None:
            raise ConfigError(
                f"--{role}-column",
                path,
                f"has no column with a usual name of {role}s, only {', '.join(names)}",
                f"Name the column of {role} ids: --{role}-column NAME.",
            )
    return str(found["user"]), str(found["item"]), found["time"]


def _require_different(columns: Mapping[str, str | None]) -> None:
    """Refuse one column for two of users, items and times."""
    for role, other in combinations(columns, 2):
        if columns[role] is not None and columns[role] == columns[other]:
            raise ConfigError(
                f"--{role}-column, --{other}-column",
                columns[role],
                f"cannot be the column of both {role}s and {other}s",
                "Name a column for each.",
            )


def _guess(role: str, names: list[str]) -> str | None:
    """The column with the likeliest of the usual names."""
    plain = {re.sub(r"[\W_\d]+", "", name).casefold(): name for name in reversed(names)}
    return next((plain[usual] for usual in _NAMES[role].split() if usual in plain), None)


def _column_names(file: RawFile) -> list[str]:
    """Names of a file's columns, those that its folders name included."""
    kind = find_kind(file.path, "auto")
    if kind == "parquet":
        with open_binary(file.path) as content:
            names = list(pq.read_schema(content).names)
    elif kind == "jsonl":
        objects = read_objects(file, SkipLog("skip", max_lost=1.0))
        names = list(dict.fromkeys(str(name) for _, each in islice(objects, 100) for name in each))
    else:
        headers = [read_header(file, Dialect(separator))[0] for separator in _SEPARATORS]
        names = max(headers, key=len)
    if not names:
        raise DataError("--history", file.path, "is empty", "Give a file with a header and a row for each order.")
    return [*names, *file.partition]
