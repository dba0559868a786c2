"""Files of new products: CSV, JSON lines or Parquet with an id and a title or description in each row.

They are read like the table of items of `prepare`, so that a product has the same text as if the corpus had it. Columns
are those of the recipe, else those with usual names. Without torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
import polars as pl

from cllm4rec_dist.config import validate
from cllm4rec_dist.corpus.about import joined
from cllm4rec_dist.corpus.manifest import ItemColumns
from cllm4rec_dist.corpus.raw import Rules, read_texts
from cllm4rec_dist.corpus.recipe import ItemTable
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.sources.files import RawFile, find_files
from cllm4rec_dist.corpus.sources.tables import Role, read_batches
from cllm4rec_dist.corpus.values import MISSING_WORDS, column_ids, is_float_column, whole_ids, without_missing
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.serving.known_ids import NEW_ITEMS as OPTION
from cllm4rec_dist.serving.new_items import NewItem
from cllm4rec_dist.serving.table_columns import ITEM_NAMES, column_names, find_encoding, likely_column

logger = logging.getLogger(__name__)

_TITLE_NAMES = "title name producttitle productname itemtitle itemname movietitle booktitle titel produktname"
_KINDS = ("title", "description")
_DESCRIPTION_NAMES = "description text details summary productdescription beschreibung produktbeschreibung"


def read_new_items(path: str, recipe: ItemColumns | None = None) -> list[NewItem]:
    """Read new products in the order of the file.

    If several rows have the same id, the first text of each column is used, as in a corpus.

    Args:
        path: file, pattern or folder of parts.
        recipe: columns of the items in the corpus' raw data, which are preferred if the file has them.

    Raises:
        DataError: if the file cannot be read or has no product.
        ConfigError: if a column cannot be found.
    """
    try:
        files = find_files([path])
    except DataError as error:
        raise DataError(OPTION, path, error.constraint, "Give a file of new products.") from None
    encodings = [find_encoding(file.path, "save it as UTF-8") for file in files]
    table = _find_columns(path, files[0], recipe, encodings[0])
    log = SkipLog()
    frames = [
        _read(file, table.model_copy(update={"encoding": encoding}), log)
        for file, encoding in zip(files, encodings, strict=True)
    ]
    for reason, count in log.counts.items():
        logger.warning("%s: left out %d x %s", path, count, reason)
    rows = pl.concat(frames)
    products = rows.group_by("item", maintain_order=True).agg(pl.exclude("item").drop_nulls().first())
    if len(products) < len(rows):
        logger.info("%s: %d rows are further ones of the same products", path, len(rows) - len(products))
    if not len(products):
        raise DataError(OPTION, path, "has no product", "Give a file with a header and a row for each product.")
    texts = (
        joined(products, [name for name in products.columns if name.startswith(f"{kind} ")]).fill_null("").alias(kind)
        for kind in _KINDS
    )
    return [NewItem(*row) for row in products.select("item", *texts).iter_rows()]


def _read(file: RawFile, table: ItemTable, log: SkipLog) -> pl.DataFrame:
    """Return a column `item` and one for each column of texts, whose name begins with its kind; null if missing."""
    titles = [] if table.title is None else [table.title]
    texts = list(dict.fromkeys([*titles, *table.description]))
    roles: dict[str, Role] = {**dict.fromkeys(texts, "text"), table.item: "id"}
    names = {name: name for name in roles}
    rules = Rules(has_html=table.html)
    kinds = dict(zip(_KINDS, (titles, table.description), strict=True))
    names_of_texts = [f"{kind} {name}" for kind, columns in kinds.items() for name in columns]
    parts = [pl.DataFrame(schema=dict.fromkeys(["item", *names_of_texts], pl.String))]
    for batch in read_batches(file, table, "auto", names, roles, log):
        ids = without_missing(column_ids(batch.columns[table.item], f"{batch.path}: {table.item}"), MISSING_WORDS)
        if is_float_column(ids.drop_nulls()):
            ids = whole_ids(ids)
        if ids.is_null().any():
            line = int(batch.lines[np.flatnonzero(ids.is_null().to_numpy())[0]])
            raise DataError(
                f"{OPTION}: {batch.path} line {line}", "", "has no id", f"Give the product's id in {table.item!r}."
            )
        columns = {
            f"{kind} {name}": read_texts(batch, name, f"{batch.path}: {name}", rules, log, one_line=kind == "title")
            for kind, each in kinds.items()
            for name in each
        }
        parts.append(pl.DataFrame({"item": ids, **columns}))
    log.close_file(file.path)
    return pl.concat(parts)


def _find_columns(path: str, file: RawFile, recipe: ItemColumns | None, encoding: str | None) -> ItemTable:
    """Find the columns of a file, those of the recipe first."""
    expected = [] if recipe is None else [recipe.item, *_text_columns(recipe)]
    names = column_names(file, None, encoding, expected)
    if not names:
        raise DataError(OPTION, path, "is empty", "Give a file with a header and a row for each product.")
    item = recipe.item if recipe is not None and recipe.item in names else likely_column(f"{ITEM_NAMES} id", names)
    if item is None:
        _refuse(path, names, "ids", "item_id")
    if recipe is not None and any(name in names for name in _text_columns(recipe)):
        title = recipe.title if recipe.title in names else None
        description = tuple(name for name in recipe.description if name in names)
    else:
        others = [name for name in names if name != item]
        title = likely_column(_TITLE_NAMES, others)
        likely = likely_column(_DESCRIPTION_NAMES, [name for name in others if name != title])
        description = () if likely is None else (likely,)
    if title is None and not description:
        _refuse(path, names, "titles or descriptions", "title")
    unused = [name for name in names if name not in (item, title, *description)]
    logger.info(
        "%s: ids are %r, titles %s, descriptions %s; not used: %s",
        path,
        item,
        "not given" if title is None else repr(title),
        ", ".join(map(repr, description)) or "not given",
        ", ".join(map(repr, unused)) or "none",
    )
    html = recipe is not None and recipe.html
    columns = {"path": path, "item": item, "title": title, "description": description, "html": html}
    return validate(ItemTable, columns, OPTION)


def _text_columns(recipe: ItemColumns) -> Iterator[str]:
    yield from (name for name in (recipe.title, *recipe.description) if name is not None)


def _refuse(path: str, names: list[str], what: str, example: str) -> NoReturn:
    raise ConfigError(
        OPTION,
        path,
        f"has no column of the recipe and none with a usual name for {what}, only {', '.join(names)}",
        f"Rename the column, for example to {example!r}.",
    )
