"""Read the first rows of a file of orders, items or customers, in any format.

The readers of `corpus/sources` read the sample too, so that guesses from it hold for the whole file: encoding and
compression by the first bytes, delimiters by the header, JSON in any shape, Parquet in its types.
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
from cllm4rec_dist.corpus.sources.objects import read_objects, read_single_object
from cllm4rec_dist.corpus.sources.records import Dialect, LineReader
from cllm4rec_dist.corpus.sources.tables import find_kind
from cllm4rec_dist.corpus.values import BadValue, plain_text
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.project.nested import Nesting, flattening, jq, nested_columns, nested_fields, rows_path
from cllm4rec_dist.project.words import kinds_of

ROWS = 50_000
"""Rows in a sample."""
_SEPARATORS = (",", ";", "\t", "|")
_UNICODE = ("utf-8", "utf-16", "utf-32")
_USEFUL = {"user", "item", "time", "rating", "review", "title", "category", "id"}
"""Kinds of column names that can be used."""
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)*|\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([ T].*)?")
Role = Literal["orders", "items", "customers"]


@dataclass(frozen=True)
class Sample:
    """First rows of the first file of a path.

    Attributes:
        role: content of the files, as named by the command line.
        path: path as given; local ones are absolute.
        file: file of the rows.
        kind: csv, jsonl or parquet.
        dialect: dialect of a CSV file, with its separator.
        columns: at most `ROWS` rows, in the types of the file.
        is_whole: True if there are no more rows, in this file or another one.
        encoding: encoding that a recipe must name; None if it is detected.
        nested: columns that hold objects: they may have texts but no ids.
        repeated: names of several columns, which cannot be used.
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
    """Read the first rows of a path.

    Args:
        role: content of the files, for messages.
        path: file, pattern, folder of parts, or URL.
        dialect: dialect of delimited text, as far as given; the rest is detected.

    Raises:
        DataError: for a path without files, an unsupported or empty file, or one without a header.
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
        _require_rows(role, file, dialect.encoding)
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
    """Return the encoding of one file. One given for several files holds for those that are not UTF-8."""
    if given not in ("auto", *_UNICODE) and is_utf8_beyond_ascii(path):
        return "utf-8"
    return resolve_encoding(path, given, "give --encoding")


def _separator(role: Role, file: RawFile, dialect: Dialect) -> str:
    """Return the given separator, or the one that splits the header into the most fields."""
    lines, named = header_lines(file.path, dialect.encoding)
    if not lines:
        raise DataError(f"--{role}", file.path, "is empty", "Give a file with a header and rows.")
    separator = dialect.separator or named
    return separator or max(_SEPARATORS, key=lambda each: _num_fields(lines, each, dialect))


def _require_names(role: Role, file: RawFile, repeated: Sequence[str]) -> None:
    """Refuse a header with two columns of one name, if the name could be used."""
    for name in repeated:
        if kinds_of(name) & _USEFUL:
            raise DataError(
                f"--{role}",
                name,
                f"is the name of several columns of {file.path}, and it is unclear which one is meant",
                f"Rename all but one in the file's header, for example to {name + '_2'!r}.",
            )


def _num_fields(lines: Sequence[bytes], separator: str, dialect: Dialect) -> int:
    """Return the number of fields in the header, or 1 if the line below it has one field."""
    fields = len(LineReader(dialect, separator).header(lines))
    below = len(LineReader(dialect, separator).header(lines[1:])) if len(lines) > 1 else fields
    return fields if below > 1 else 1


def _delimited(file: RawFile, dialect: Dialect) -> tuple[pl.DataFrame, list[str]]:
    """Return the rows, and the names of several columns."""
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
    """Refuse a file whose first line looks like a row: with numbers or dates, or with values that repeat below."""
    numbers = [name for name in columns.columns if _NUMBER.fullmatch(name)]
    repeated = [name for name in columns.columns if (columns[name].str.strip_chars() == name).any()]
    if numbers or (len(columns.columns) > 1 and len(repeated) > 1):
        shown = ", ".join(columns.columns)
        raise DataError(
            f"--{role}",
            file.path,
            f"has no header: its first line is {shown[:120]!r}, which looks like a row",
            f"Name its columns in their order, for example --{role}-names user,item,date.",
        )


def _parquet(file: RawFile) -> tuple[pl.DataFrame, list[str]]:
    """Return the rows, and the names of several columns."""
    with open_binary(file.path) as content:
        names = list(pq.read_schema(content).names) if content.seekable() else []
    columns = {}
    for name in dict.fromkeys([*names, *file.partition]):
        try:
            batch = next(read_parquet(file, [name], SkipLog("skip", max_lost=1.0)), None)
        except DataError:
            continue  # a type without text: the column cannot be used
        if batch is not None:
            columns[name] = batch.columns[name].head(ROWS)
    return pl.DataFrame(columns), _repeated(names)


def _require_rows(role: Role, file: RawFile, encoding: str) -> None:
    """Refuse a JSON document that is one object with the rows in a field, as in `{"orders": [...]}`."""
    try:
        path = rows_path(read_single_object(file.path, encoding))
    except DataError:
        return  # lines, some of them damaged
    if path is not None:
        raise DataError(
            f"--{role}",
            file.path,
            f"is one object, whose rows are in its field {path}",
            f"Write them to a file of their own: {jq(file.path, f'{path}[]')}",
        )


def _objects(file: RawFile, encoding: str) -> tuple[pl.DataFrame, dict[str, Nesting]]:
    """Return the rows of a JSON file as texts, and its nested fields.

    The texts of lists and objects are concatenated.
    """
    rows = _rows(file, encoding, ())
    if len(rows) == 1 and all(isinstance(value, dict | list) for value in rows[0].values()):
        rows = _rows(file, encoding, tuple(rows[0]))  # one object of columns
    names = dict.fromkeys(name for row in rows for name in row)
    texts = {str(name): [_text(row.get(name)) for row in rows] for name in names}
    return pl.DataFrame(texts, schema=dict.fromkeys(texts, pl.String)), nested_fields(rows)


def _rows(file: RawFile, encoding: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    objects = read_objects(file, SkipLog("skip", max_lost=1.0), encoding, fields)
    return [{**file.partition, **row} for _, row in islice(objects, ROWS)]


def _text(value: Any) -> str | None:
    try:
        return plain_text(value)
    except BadValue:
        return None


def require_columns(sample: Sample, option: str, name: str) -> str:
    """Check that the file has a column, and return its name.

    Raises:
        DataError: if the name is inside of a nested field.
        ConfigError: if the file does not have it, with a suggestion.
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
    """Return the cure for a file whose ids are inside of objects."""
    return flattening(sample.file.path, sample.kind, sample.nested)
