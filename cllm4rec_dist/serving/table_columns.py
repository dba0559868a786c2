"""Columns of the tables that a person gives to `recommend`: their names, and which of them has a usual one."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import islice

import pyarrow.parquet as pq

from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.sources.delimited import header_lines, read_header
from cllm4rec_dist.corpus.sources.encoding import resolve_encoding
from cllm4rec_dist.corpus.sources.files import RawFile, open_binary
from cllm4rec_dist.corpus.sources.objects import read_objects
from cllm4rec_dist.corpus.sources.records import Dialect
from cllm4rec_dist.corpus.sources.tables import find_kind

ITEM_NAMES = (
    "item itemid product productid productnumber sku article articleid articlenumber asin isbn movie movieid"
    " book bookid track trackid stockcode parentasin artikel artikelnummer produkt what"
)
"""Usual names of a column of item ids, lower case letters only, most likely first."""
_SEPARATORS = ",;\t|"


def likely_column(usual: str, names: Sequence[str]) -> str | None:
    """Return the column with the most likely of the usual names, if any.

    Case, digits and signs do not count, nor the type in RecBole's headers (`item_id:token`).

    Args:
        usual: names between blanks, lower case letters only, most likely first.
    """
    plain = {re.sub(r"[\W_\d]+", "", name.partition(":")[0]).casefold(): name for name in reversed(names)}
    return next((plain[name] for name in usual.split() if name in plain), None)


def find_encoding(path: str, cure: str) -> str | None:
    """Return the encoding of a CSV file; None for files of other kinds, which have or name theirs.

    Args:
        cure: what to do if the detected one is wrong, for the warning.
    """
    return resolve_encoding(path, "auto", cure) if find_kind(path, "auto") == "csv" else None


def column_names(file: RawFile, separator: str | None, encoding: str | None, expected: Collection[str]) -> list[str]:
    """Return the column names of a CSV, JSON or Parquet file, including partition columns of its folders.

    Args:
        separator, encoding: of a CSV file; None to detect them.
        expected: likely columns, by which the separator is detected.
    """
    encoding = encoding or "auto"
    kind = find_kind(file.path, encoding)
    if kind == "parquet":
        with open_binary(file.path) as content:
            names = list(pq.read_schema(content).names)
    elif kind == "jsonl":
        objects = read_objects(file, SkipLog("skip", max_lost=1.0), encoding)
        names = list(dict.fromkeys(str(name) for _, each in islice(objects, 100) for name in each))
    else:
        encoding = resolve_encoding(file.path, encoding)
        _, named = header_lines(file.path, encoding)
        separators = separator or named
        candidates = [separators] if separators else list(_SEPARATORS)
        headers = [read_header(file, Dialect(candidate, encoding=encoding))[0] for candidate in candidates]
        names = max(headers, key=lambda header: (len(set(expected) & set(header)), len(header)))
    return [*names, *file.partition] if names else []
