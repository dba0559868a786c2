"""JSON as people have it: an object a line, one array of objects, one object of objects, or a column each.

Lines are parsed one by one, documents as a stream, so that neither has to fit into memory. Amazon's metadata of 2014
and Steam's files have lines in Python's notation; they are read as literals, never evaluated.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Literal

import numpy as np
import orjson
import polars as pl

from cllm4rec_dist.corpus.row_batch import BATCH_ROWS, Batch, with_partition
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.sources.encoding import escaped, first_text, resolve_encoding, text_blocks, text_lines
from cllm4rec_dist.corpus.sources.files import RawFile
from cllm4rec_dist.corpus.sources.json_stream import JsonStream
from cllm4rec_dist.corpus.values import BadValue, unwrap
from cllm4rec_dist.errors import DataError

Object = dict[str, Any]
Getter = tuple[str, Callable[[Object], str | None]]
"""Name of a column, and what makes its text of an object; BadValue for a value that cannot be used."""
_LONG_INTEGER = re.compile(rb"\d{19}")
_SAMPLE_MEMBERS = 100
_EXCERPT = 100


def read_objects(
    file: RawFile, log: SkipLog, encoding: str = "auto", wanted: Sequence[str] = ()
) -> Iterator[tuple[int, Object]]:
    """Number, from 1, and content of each object: the line, or the position in the document.

    Args:
        file: the file.
        log: counts lines that are no object.
        encoding: Python's name, or auto.
        wanted: fields of interest, that tell an object of columns from an object of objects.
    """
    encoding = resolve_encoding(file.path, encoding)
    if first_text(file.path, encoding).lstrip().startswith("["):
        return _elements(file.path, log, _stream(file.path, encoding).values())
    first, second = _first_two_lines(file.path, encoding)
    parsed = parse_line(first)
    if isinstance(parsed, dict) and second is None and _shape(parsed, wanted) != "objects":
        return _document(file.path, log, encoding, wanted)
    if (
        isinstance(parsed, dict)
        or isinstance(second and parse_line(second), dict)
        or not first.lstrip().startswith(b"{")
    ):
        return _lines(file.path, log, encoding)
    return _document(file.path, log, encoding, wanted)


def _first_two_lines(path: str, encoding: str) -> tuple[bytes, bytes | None]:
    """The first two lines that are not blank; None where there is no second one."""
    lines = (line for _, line in text_lines(path, encoding) if line.strip())
    return next(lines, b""), next(lines, None)


def parse_line(line: bytes) -> Any:
    """Value of a line of JSON, or of a Python literal; None if it is neither."""
    if not _LONG_INTEGER.search(line):  # orjson makes floats of these
        with suppress(orjson.JSONDecodeError):
            return orjson.loads(line)
    try:
        text = line.decode().strip()
    except UnicodeDecodeError:
        return None
    with suppress(ValueError, RecursionError):
        return json.loads(text, strict=False)  # takes NaN and lone surrogates
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _lines(path: str, log: SkipLog, encoding: str) -> Iterator[tuple[int, Object]]:
    for number, line in text_lines(path, encoding):
        if not line.strip():
            continue
        log.read(path, 1)
        found = parse_line(line)
        if isinstance(found, dict):
            yield number, found
        else:
            text = line.decode(errors="replace")
            reason = "is not UTF-8 text" if text.encode() != line else "is not a JSON object"
            log.lose(reason, path, number, text if text.encode() == line else escaped(line[:_EXCERPT]))


def _stream(path: str, encoding: str) -> JsonStream:
    return JsonStream(path, text_blocks(path, encoding))


def _document(path: str, log: SkipLog, encoding: str, wanted: Sequence[str]) -> Iterator[tuple[int, Object]]:
    """Objects over several lines each, the values of one object, or rows of columns."""
    shape = _shape(dict(islice(_stream(path, encoding).members(), _SAMPLE_MEMBERS)), wanted)
    stream = _stream(path, encoding)
    if shape == "columns":
        return _columns(path, log, stream.value())
    return _elements(path, log, stream.values() if shape == "objects" else (value for _, value in stream.members()))


def _shape(first: Object, wanted: Sequence[str]) -> Literal["objects", "members", "columns"]:
    """What a document is, by the first members of its first object.

    `objects` are rows themselves, the values of `members` are, and `columns` hold a list or an object of values each.
    """
    has_wanted = any(name in first for name in wanted)
    values = list(first.values())
    if not values or not all(isinstance(value, list | dict) and value == unwrap(value) for value in values):
        return "objects"
    if any(isinstance(value, list) for value in values):
        return "columns" if has_wanted else "objects"
    return "columns" if has_wanted and not any(name in values[0] for name in wanted) else "members"


def _elements(path: str, log: SkipLog, values: Iterator[Any]) -> Iterator[tuple[int, Object]]:
    for number, value in enumerate(values, start=1):
        log.read(path, 1)
        if isinstance(value, dict):
            yield number, value
        else:
            log.lose("is not a JSON object", path, number, value)


def _columns(path: str, log: SkipLog, table: Object) -> Iterator[tuple[int, Object]]:
    """Rows of {column: [values]} or {column: {row: value}}."""
    columns = {
        name: dict(enumerate(values)) if isinstance(values, list) else values
        for name, values in table.items()
        if isinstance(values, list | dict)
    }
    keys = dict.fromkeys(key for values in columns.values() for key in values)
    rows = ({name: values.get(key) for name, values in columns.items()} for key in keys)
    return _elements(path, log, rows)


def object_batches(
    file: RawFile,
    objects: Iterator[tuple[int, Object]],
    getters: Sequence[Getter],
    log: SkipLog,
    columns: Sequence[str] | None = None,
) -> Iterator[Batch]:
    """Texts of the objects' fields, in batches.

    Args:
        file: where the objects are from.
        objects: with their numbers.
        getters: of each column.
        log: counts objects with a value that cannot be used.
        columns: names of the batches' columns, those of the file's folders included; the getters' if left out.
    """
    names = [name for name, _ in getters]
    while chunk := list(islice(objects, BATCH_ROWS)):
        lines: list[int] = []
        rows: list[list[str | None]] = []
        for line, entry in chunk:
            row: list[str | None] = []
            try:
                for name, get in getters:  # noqa: B007  # `name` is that of the value that fails
                    row.append(get(entry))
            except BadValue as error:
                log.lose(f"has a {name} that {error}", file.path, line, error.value)
            except RecursionError:
                log.lose(f"has a {name} that is nested too deeply", file.path, line, "...")
            else:
                rows.append(row)
                lines.append(line)
        frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")
        frame = with_partition(frame, file.partition, columns or names)
        yield Batch(file.path, np.array(lines, dtype=np.int64), frame)


def require_fields(
    path: str, objects: Iterator[tuple[int, Object]], *groups: tuple[str, ...]
) -> Iterator[tuple[int, Object]]:
    """Pass the objects on; the first one must have at least one field of each group.

    Raises:
        DataError: if it has not: the format in the recipe is wrong.
    """
    for number, (line, entry) in enumerate(objects):
        if number == 0:
            for fields in groups:
                if not any(name in entry for name in fields):
                    raise DataError(
                        f"{path} line {line}",
                        list(entry),
                        f"has no field {' or '.join(fields)}",
                        "Choose the format or edition that fits.",
                    )
        yield line, entry


def require_seen(
    path: str, objects: Iterator[tuple[int, Object]], columns: Sequence[str]
) -> Iterator[tuple[int, Object]]:
    """Pass the objects on; after the last one, each column must have been in one of them.

    Raises:
        DataError: for columns that no object has.
    """
    unseen = set(columns)
    seen: dict[str, None] = {}
    line = 0
    for line, entry in objects:
        if unseen:
            unseen -= entry.keys()
            seen |= dict.fromkeys(list(entry)[:20]) if len(seen) < 20 else {}
        yield line, entry
    if unseen and line:
        raise DataError(
            path,
            sorted(unseen),
            f"is in no object of the file, whose fields are {list(seen)!r:.300}",
            "Mend the names in the recipe.",
        )


def read_members(path: str, encoding: str) -> Iterator[tuple[str, Any]] | None:
    """Keys and values of a document that is one object, as a stream; None for any other document.

    Raises:
        DataError: where it is not JSON.
    """
    encoding = resolve_encoding(path, encoding)
    first, second = _first_two_lines(path, encoding)
    if not first.lstrip().startswith(b"{") or (second is not None and isinstance(parse_line(first), dict)):
        return None
    return _stream(path, encoding).members()
