"""JSON as people have it: an object a line, one array of objects, one object of objects, or a column each.

Lines are parsed one by one, documents as a stream, so that neither has to fit into memory. Amazon's metadata of 2014
and Steam's files have lines in Python's notation; they are read as literals, never evaluated.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import ijson
import numpy as np
import orjson
import polars as pl

from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.row_batch import BATCH_ROWS, Batch, with_partition
from cllm4rec_dist.corpus.sources.encoding import text_lines, utf8_blocks
from cllm4rec_dist.corpus.sources.files import RawFile
from cllm4rec_dist.corpus.values import BadValue
from cllm4rec_dist.errors import DataError

Object = dict[str, Any]
Getter = tuple[str, Callable[[Object], str | None]]
"""Name of a column, and what makes its text of an object; BadValue for a value that cannot be used."""


def read_objects(file: RawFile, log: SkipLog, encoding: str = "auto", wanted: Sequence[str] = ()) -> Iterator[tuple[int, Object]]:
    """Number, from 1, and content of each object: the line, or the position in the document.

    Args:
        file: the file.
        log: counts lines that are no object.
        encoding: Python's name, or auto.
        wanted: fields of interest, by which an object of columns is told from an object of objects.
    """
    first = next((line for _, line in text_lines(file.path, encoding) if line.strip()), b"")
    parsed = parse_line(first)
    if isinstance(parsed, dict) and not _is_document(parsed, wanted, file, encoding):
        return _lines(file.path, log, encoding)
    if first.lstrip()[:1] in (b"[", b"{") and not (isinstance(parsed, list) and _has_more_lines(file.path, encoding)):
        return _document(file.path, log, encoding, wanted)
    return _lines(file.path, log, encoding)


def _has_more_lines(path: str, encoding: str) -> bool:
    lines = (line for _, line in text_lines(path, encoding) if line.strip())
    return len(list(islice(lines, 2))) > 1


def _is_document(parsed: Object, wanted: Sequence[str], file: RawFile, encoding: str) -> bool:
    """Whether a whole object on the first line holds all rows and is not the first of them."""
    nested = bool(parsed) and all(isinstance(value, dict | list) for value in parsed.values())
    columnar = bool(wanted) and set(wanted) <= parsed.keys()
    return nested and not _has_more_lines(file.path, encoding) and (columnar or not set(wanted) & parsed.keys())


def parse_line(line: bytes) -> Any:
    """Value of a line of JSON, or of a Python literal; None if it is neither."""
    with suppress(orjson.JSONDecodeError):
        return orjson.loads(line)
    text = line.decode(errors="surrogateescape")
    with suppress(ValueError, RecursionError):
        return json.loads(text)  # takes NaN and lone surrogates
    try:
        return ast.literal_eval(text.strip())
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
            log.lose("is not a JSON object", path, number, line.decode(errors="replace"))


class _Stream:
    """Blocks of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, b""

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, none at the end."""
        self._rest = self._rest or next(self._blocks, b"")
        size = len(self._rest) if size < 0 else size
        part, self._rest = self._rest[:size], self._rest[size:]
        return part


def _document(path: str, log: SkipLog, encoding: str, wanted: Sequence[str]) -> Iterator[tuple[int, Object]]:
    """Objects of one array, objects over several lines each, the values of one object, or rows of columns."""
    options: dict[str, Any] = {"use_float": True, "multiple_values": True}

    def stream() -> _Stream:
        return _Stream(utf8_blocks(path, encoding))

    try:
        shape = _shape(ijson.parse(stream(), **options), wanted)
        if shape == "array":
            yield from _elements(path, log, ijson.items(stream(), "item", **options))
        elif shape == "objects":
            yield from _elements(path, log, ijson.items(stream(), "", **options))
        elif shape == "columns":
            yield from _columns(path, log, next(ijson.items(stream(), "", use_float=True)))
        else:
            members = ijson.kvitems(stream(), "", use_float=True)
            yield from _elements(path, log, (value for _, value in members))
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise DataError("file", path, f"is not JSON ({error})", "Mend the file, or fetch it again.") from error


def _shape(events: Iterator[tuple[str, str, Any]], wanted: Sequence[str]) -> str:
    """What a document is, by its first events: `array`, `objects`, `columns` or `members`."""
    _, event, _ = next(events)
    if event == "start_array":
        return "array"
    key = next((value for _, event, value in events if event in ("map_key", "end_map")), None)
    _, event, _ = next(events, ("", "", None))
    if event == "start_array" and key in wanted:
        return "columns"
    if event != "start_map":
        return "objects"
    _, event, inner = next(events, ("", "", None))
    if str(inner).startswith("$"):
        return "objects"
    return "columns" if key in wanted and inner not in wanted else "members"


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
    file: RawFile, objects: Iterator[tuple[int, Object]], getters: Sequence[Getter], log: SkipLog,
    columns: Sequence[str] | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """Texts of the objects' fields, in batches.

    Args:
        getters: of each column.
        log: counts objects with a value that cannot be used.
        columns: names of the batches' columns, those of the file's folders included; the getters' if left out.
    """
    names = [name for name, _ in getters]
    while chunk := list(islice(objects, BATCH_ROWS)):
        lines: list[int] = []
        rows: list[tuple[str | None, ...]] = []
        for line, entry in chunk:
            try:
                rows.append(tuple(get(entry) for _, get in getters))
                lines.append(line)
            except BadValue as error:
                log.lose(str(error), file.path, line, error.value)
        frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")
        frame = with_partition(frame, file.partition, columns or names)
        yield Batch(file.path, np.array(lines, dtype=np.int64), frame)


def require_fields(path: str, objects: Iterator[tuple[int, Object]], *groups: tuple[str, ...]) -> Iterator[tuple[int, Object]]:
    """The same objects, where the first one has at least one field of each group.

    Raises:
        DataError: if it has not: the format in the recipe is wrong.
    """
    for number, (line, entry) in enumerate(objects):
        if number == 0:
            for fields in groups:
                if not any(name in entry for name in fields):
                    raise DataError(
                        f"{path} line {line}", list(entry), f"has no field {' or '.join(fields)}",
                        "Choose the format or edition that fits.",
                    )  # fmt: skip
        yield line, entry


def require_seen(path: str, objects: Iterator[tuple[int, Object]], columns: Sequence[str]) -> Iterator[tuple[int, Object]]:
    """The same objects; after the last one, each column must have been in one of them.

    Raises:
        DataError: for columns that no object has.
    """
    unseen = set(columns)
    seen: dict[str, None] = {}
    for line, entry in objects:
        if unseen:
            unseen -= entry.keys()
            seen |= dict.fromkeys(list(entry)[:20]) if len(seen) < 20 else {}
        yield line, entry
    if unseen:
        raise DataError(
            path, sorted(unseen), f"is in no object of the file, whose fields are {list(seen)!r:.300}",
            "Mend the names in the recipe.",
        )  # fmt: skip


def read_members(path: str, encoding: str) -> Iterator[tuple[str, Any]] | None:
    """Keys and values of a document that is one object, as a stream; None for any other document.

    Raises:
        DataError: where it is not JSON.
    """
    lines = (line for _, line in text_lines(path, encoding) if line.strip())
    first, second = next(lines, b""), next(lines, None)
    if not first.lstrip().startswith(b"{") or (second is not None and isinstance(parse_line(first), dict)):
        return None
    return _members(path, encoding)


def _members(path: str, encoding: str) -> Iterator[tuple[str, Any]]:
    try:
        yield from ijson.kvitems(_Stream(utf8_blocks(path, encoding)), "", use_float=True)
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise DataError("file", path, f"is not JSON ({error})", "Mend the file, or fetch it again.") from error
