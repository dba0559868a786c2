"""The first rows of a file of orders, items or customers, whatever kind it is of.

Read by the readers of `corpus/sources`, so that what is guessed from a sample holds for the file: encoding and
compression by the first bytes, delimiters by the header, JSON in any shape, Parquet in its own types.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow.parquet as pq

from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.sources.columnar import read_parquet
from cllm4rec_dist.corpus.sources.delimited import header_lines, read_delimited
from cllm4rec_dist.corpus.sources.encoding import is_utf8_beyond_ascii, resolve_encoding
from cllm4rec_dist.corpus.sources.files import RawFile, find_files, open_binary
from cllm4rec_dist.corpus.sources.objects import read_objects
from cllm4rec_dist.corpus.sources.records import Dialect, LineReader
from cllm4rec_dist.corpus.sources.tables import find_kind
from cllm4rec_dist.corpus.values import BadValue, plain_text
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.project.nested import Nesting, flattening, nested_columns, nested_fields
from cllm4rec_dist.project.words import kinds_of

ROWS = 50_000
"""Rows that are looked at."""
_SEPARATORS = (",", ";", "\t", "|")
_UNICODE = ("utf-8", "utf-16", "utf-32")
_USEFUL = {"user", "item", "time", "rating", "review", "title", "category", "id"}
"""What the name of a column must speak of for the column to be of use."""
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)*|\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T].*)?")
Role = Literal["orders", "items", "customers"]


@dataclass(frozen=True)
class Sample:
    """Rows of the first of the files that a path means.

    Attributes:
        role: what the files are about, as the command line names it.
        path: as it was given, local ones absolute.
        file: the one that was read.
        kind: csv, jsonl or parquet.
        dialect: of a CSV file; its separator is known.
        columns: at most `ROWS` rows, in the types that the file has.
        is_whole: there are no more rows, in this file or another one.
        encoding: what a recipe must say of the file's encoding; None for what is found.
        nested: columns that hold objects: they have texts, and are no ids.
        repeated: names that several columns have, of which none can be used.
    """

    role: Role
    path: str
    file: RawFile
    kind: str
    dialect: Dialect
    columns: pl.DataFrame
    is_whole: bool
    encoding: str | None = None
    nested: Mapping[str, Nesting] = field(default_factory=dict)
    repeated: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the columns that can be used."""
        return self.columns.columns


def read_sample(role: Role, path: str, dialect: Dialect) -> Sample:
    """The first rows of what a path means.

    Args:
        role: for messages.
        path: file, pattern, folder of parts, or URL.
        dialect: what the user says about delimited text; the rest is found.

    Raises:
        DataError: for a path without files, a file of no known kind, one that is empty, and one without a header.
    """
    files = find_files([path])
    file = files[0]
    kind = "csv" if dialect.names is not None else find_kind(file.path, dialect.encoding)
    given = dialect.encoding
    if kind != "parquet":
        dialect = replace(dialect, encoding=_encoding(file.path, given))
    nested: Mapping[str, Nesting] = {}
    repeated: list[str] = []
    if kind == "csv":
        dialect = replace(dialect, separator=_separator(role, file, dialect))
        columns, repeated = _delimited(file, dialect)
    elif kind == "parquet":
        columns, repeated = _parquet(file)
        nested = nested_columns(columns)
    else:
        columns, nested = _objects(file, dialect.encoding)
    _require_names(role, file, repeated)
    if not len(columns):
        raise DataError(f"--{role}", path, "has no rows", "Give a file with a row for each entry below its header.")
    if kind == "csv" and dialect.names is None:
        _require_header(role, file, columns)
    is_legacy = kind != "parquet" and dialect.encoding not in _UNICODE
    encoding = dialect.encoding if is_legacy and (given != "auto" or len(files) == 1) else None
    is_whole = len(columns) < ROWS and len(files) == 1
    return Sample(role, path, file, kind, dialect, columns, is_whole, encoding, nested, tuple(repeated))


def _encoding(path: str, given: str) -> str:
    """The encoding of one file. One that is given for several files is that of those that are not UTF-8."""
    if given not in ("auto", *_UNICODE) and is_utf8_beyond_ascii(path):
        return "utf-8"
    return resolve_encoding(path, given)


def _separator(role: Role, file: RawFile, dialect: Dialect) -> str:
    """The separator: the one that cuts the header and the lines below it alike."""
    lines, named = header_lines(file.path, dialect.encoding)
    if not lines:
        raise DataError(f"--{role}", file.path, "is empty", "Give a file with a header and rows.")
    separator = dialect.separator or named
    return separator or max(_SEPARATORS, key=lambda each: _num_fields(lines, each, dialect))


def _require_names(role: Role, file: RawFile, repeated: Sequence[str]) -> None:
    """Refuse a header that names two columns alike, where the name is one that could be used."""
    for name in repeated:
        if kinds_of(name) & _USEFUL:
            raise DataError(
                f"--{role}",
                name,
                f"is the name of several columns of {file.path}, and nothing says which of them is meant",
                f"Rename all but one in the file's header, for example to {name + '_2'!r}.",
            )


def _num_fields(lines: Sequence[bytes], separator: str, dialect: Dialect) -> int:
    """Fields of the header, if the line below it has several too."""
    fields = len(LineReader(dialect, separator).header(lines))
    below = len(LineReader(dialect, separator).header(lines[1:])) if len(lines) > 1 else fields
    return fields if below > 1 else 1


def _delimited(file: RawFile, dialect: Dialect) -> tuple[pl.DataFrame, list[str]]:
    """Rows, and names that several columns have."""
    assert dialect.separator is not None
    lines, _ = header_lines(file.path, dialect.encoding)
    header = list(dialect.names or LineReader(dialect, dialect.separator).header(lines))
    names = [name for name in [*header, *file.partition] if name and header.count(name) < 2]
    log = SkipLog("skip", max_lost=1.0)
    batches = read_delimited(file, list(dict.fromkeys(names)), dialect, log)
    rows = next((batch.columns.head(ROWS) for batch in batches if len(batch.lines)), pl.DataFrame())
    return rows, _repeated(header)


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if name and count > 1]


def _require_header(role: Role, file: RawFile, columns: pl.DataFrame) -> None:
    """Refuse a file whose first line is a row itself: one with numbers or dates, or with values that come again."""
    numbers = [name for name in columns.columns if _NUMBER.fullmatch(name)]
    again = [name for name in columns.columns if (columns[name].str.strip_chars() == name).any()]
    if numbers or (len(columns.columns) > 1 and len(again) > 1):
        shown = ", ".join(columns.columns)
        raise DataError(
            f"--{role}",
            file.path,
            f"has no header: its first line is {shown[:120]!r}, which looks like a row",
            f"Name its columns in their order, for example --{role}-names user,item,date.",
        )


def _parquet(file: RawFile) -> tuple[pl.DataFrame, list[str]]:
    """Rows, and names that several columns have."""
    with open_binary(file.path) as content:
        names = list(pq.read_schema(content).names) if content.seekable() else []
    found = {}
    for name in dict.fromkeys([*names, *file.partition]):
        try:
            batch = next(read_parquet(file, [name], SkipLog("skip", max_lost=1.0)), None)
        except DataError:
            continue  # a type that has no text: no column of interest
        if batch is not None:
            found[name] = batch.columns[name].head(ROWS)
    return pl.DataFrame(found), _repeated(names)


def _objects(file: RawFile, encoding: str) -> tuple[pl.DataFrame, dict[str, Nesting]]:
    """Rows of a JSON file, as texts, and which of its fields hold objects.

    Lists and objects give their texts one behind the other.
    """
    found = _rows(file, encoding, ())
    if len(found) == 1 and all(isinstance(value, dict | list) for value in found[0].values()):
        found = _rows(file, encoding, tuple(found[0]))  # a column each
    names = dict.fromkeys(name for row in found for name in row)
    texts = {str(name): [_text(row.get(name)) for row in found] for name in names}
    return pl.DataFrame(texts, schema=dict.fromkeys(texts, pl.String)), nested_fields(found)


def _rows(file: RawFile, encoding: str, wanted: Sequence[str]) -> list[dict[str, Any]]:
    objects = read_objects(file, SkipLog("skip", max_lost=1.0), encoding, wanted)
    return [{**file.partition, **row} for _, row in islice(objects, ROWS)]


def _text(value: Any) -> str | None:
    try:
        return plain_text(value)
    except BadValue:
        return None


def require_columns(sample: Sample, option: str, name: str) -> str:
    """The name of a column that the user gave.

    Raises:
        ConfigError: where the file does not have it, with the one that was meant.
    """
    from cllm4rec_dist.suggestions import did_you_mean

    if name in sample.names:
        return name
    if sample.nested and name.partition(".")[0] in sample.nested:
        raise DataError(option, name, "is inside of an object", flatten_cure(sample))
    raise ConfigError(
        option,
        name,
        f"is no column of {Path(sample.file.path).name}, which has {', '.join(sample.names)}",
        f"Name one of them.{did_you_mean(name, sample.names)}",
    )


def flatten_cure(sample: Sample) -> str:
    """What to do about a file whose ids are inside of objects."""
    return flattening(sample.file.path, sample.kind, sample.nested)
