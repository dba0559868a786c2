"""Read JSON objects in all layouts: one per line, an array of objects, an object of objects, or columns.

Lines are parsed one by one and documents as a stream, so that neither has to fit into memory. Amazon's metadata of 2014
and Steam's files have a Python literal per line, which is parsed but never evaluated.
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
"""Name of a column, and the function that gets its text from an object; BadValue for an unusable value."""
_LONG_INTEGER = re.compile(rb"\d{19}")
_SAMPLE_MEMBERS = 100
_EXCERPT = 100


def read_objects(
    file: RawFile, log: SkipLog, encoding: str = "auto", fields: Sequence[str] = ()
) -> Iterator[tuple[int, Object]]:
    """Yield each object with its line, or its position in the document, from 1.

    Args:
        file: file to read.
        log: counts lines that are no object.
        encoding: Python's name, or auto.
        fields: fields to read, which distinguish an object of columns from an object of objects.
    """
    encoding = resolve_encoding(file.path, encoding)
    if first_text(file.path, encoding).lstrip().startswith("["):
        return _elements(file.path, log, _stream(file.path, encoding).values())
    first, second = _first_two_lines(file.path, encoding)
    parsed = parse_line(first)
    if isinstance(parsed, dict) and second is None and _shape(parsed, fields) != "objects":
        return _document(file.path, log, encoding, fields)
    if (
        isinstance(parsed, dict)
        or isinstance(second and parse_line(second), dict)
        or not first.lstrip().startswith(b"{")
    ):
        return _lines(file.path, log, encoding)
    return _document(file.path, log, encoding, fields)


def _first_two_lines(path: str, encoding: str) -> tuple[bytes, bytes | None]:
    """Return the first two nonempty lines; None if there is no second one."""
    lines = (line for _, line in text_lines(path, encoding) if line.strip())
    return next(lines, b""), next(lines, None)


def parse_line(line: bytes) -> Any:
    """Parse a line of JSON or a Python literal; None if it is neither."""
    if not _LONG_INTEGER.search(line):  # orjson would parse these as floats
        with suppress(orjson.JSONDecodeError):
            return orjson.loads(line)
    try:
        text = line.decode().strip()
    except UnicodeDecodeError:
        return None
    with suppress(ValueError, RecursionError):
        return json.loads(text, strict=False)  # accepts NaN and lone surrogates
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _lines(path: str, log: SkipLog, encoding: str) -> Iterator[tuple[int, Object]]:
    for line_number, line in text_lines(path, encoding):
        if not line.strip():
            continue
        log.read(path, 1)
        entry = parse_line(line)
        if isinstance(entry, dict):
            yield line_number, entry
        else:
            text = line.decode(errors="replace")
            reason = "is not UTF-8 text" if text.encode() != line else "is not a JSON object"
            log.lose(reason, path, line_number, text if text.encode() == line else escaped(line[:_EXCERPT]))


def _stream(path: str, encoding: str) -> JsonStream:
    return JsonStream(path, text_blocks(path, encoding))


def _document(path: str, log: SkipLog, encoding: str, fields: Sequence[str]) -> Iterator[tuple[int, Object]]:
    """Yield objects over several lines each, the values of one object, or rows of columns."""
    shape = _shape(dict(islice(_stream(path, encoding).members(), _SAMPLE_MEMBERS)), fields)
    stream = _stream(path, encoding)
    if shape == "columns":
        return _columns(path, log, stream.value())
    return _elements(path, log, stream.values() if shape == "objects" else (value for _, value in stream.members()))


def _shape(first: Object, fields: Sequence[str]) -> Literal["objects", "members", "columns"]:
    """Return the layout of a document from the first members of its first object.

    In `objects` each object is a row, in `members` each value of the one object; in `columns` each value is a column, a
    list or an object of values.
    """
    has_fields = any(name in first for name in fields)
    values = list(first.values())
    if not values or not all(isinstance(value, list | dict) and value == unwrap(value) for value in values):
        return "objects"
    if any(isinstance(value, list) for value in values):
        return "columns" if has_fields else "objects"
    return "columns" if has_fields and not any(name in values[0] for name in fields) else "members"


def _elements(path: str, log: SkipLog, values: Iterator[Any]) -> Iterator[tuple[int, Object]]:
    for position, value in enumerate(values, start=1):
        log.read(path, 1)
        if isinstance(value, dict):
            yield position, value
        else:
            log.lose("is not a JSON object", path, position, value)


def _columns(path: str, log: SkipLog, table: Object) -> Iterator[tuple[int, Object]]:
    """Yield the rows of {column: [values]} or {column: {row: value}}."""
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
    """Yield batches of the texts of the objects' fields.

    Args:
        file: file of the objects.
        objects: lines and objects.
        getters: getter of each column.
        log: counts objects with an unusable value.
        columns: names of the batches' columns, including partition columns; those of the getters if left out.
    """
    names = [name for name, _ in getters]
    while chunk := list(islice(objects, BATCH_ROWS)):
        lines: list[int] = []
        rows: list[list[str | None]] = []
        for line, entry in chunk:
            row: list[str | None] = []
            try:
                for name, get in getters:  # noqa: B007  # an error below uses `name`
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
    """Yield the objects; the first one must have at least one field of each group.

    Raises:
        DataError: if it does not, which means that the format in the recipe is wrong.
    """
    for index, (line, entry) in enumerate(objects):
        if index == 0:
            for fields in groups:
                if not any(name in entry for name in fields):
                    raise DataError(
                        f"{path} line {line}",
                        list(entry),
                        f"has no field {' or '.join(fields)}",
                        "Choose the right format or edition.",
                    )
        yield line, entry


def require_seen(
    path: str, objects: Iterator[tuple[int, Object]], columns: Sequence[str]
) -> Iterator[tuple[int, Object]]:
    """Yield the objects; each column must be a field of at least one of them.

    Raises:
        DataError: after the last object, for columns that no object has.
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
            "Fix the names in the recipe.",
        )


def read_members(path: str, encoding: str) -> Iterator[tuple[str, Any]] | None:
    """Stream the keys and values of a document that is one object; None for any other document.

    Raises:
        DataError: if it is not JSON.
    """
    encoding = resolve_encoding(path, encoding)
    first, second = _first_two_lines(path, encoding)
    if not first.lstrip().startswith(b"{") or (second is not None and isinstance(parse_line(first), dict)):
        return None
    return _stream(path, encoding).members()


def read_single_object(path: str, encoding: str) -> Object | None:
    """Return the object of a document that is one object with few members; None for any other document.

    Raises:
        DataError: if it is not JSON.
    """
    stream = _stream(path, resolve_encoding(path, encoding))
    if stream.peek() != "{":
        return None
    members = dict(islice(stream.members(), _SAMPLE_MEMBERS))
    return members if len(members) < _SAMPLE_MEMBERS and not stream.peek() else None
