"""Reading text files line by line, with the number of each line.

A line is what ends with a newline and nothing else: other separators of Unicode belong to the texts. Bytes that are
not of the encoding make a line unreadable, not the file.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cllm4rec_dist.corpus.raw import SkipLog
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.filesystems import as_os_errors, locate


@contextmanager
def open_binary(path: str) -> Iterator[BinaryIO]:
    """A file of any fsspec URL, decompressed by its extension.

    Raises:
        DataError: where it is missing or breaks off.
    """
    fs, place = locate("file", path, DataError)
    try:
        with as_os_errors():
            source = fs.open(place, "rb", compression="infer")
        with source as file:
            yield file
    except FileNotFoundError as error:
        raise DataError("file", path, "does not exist", "Mend the path in the recipe, or fetch the data.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError("file", path, f"cannot be read ({error})", "Fetch the file again.") from error


@contextmanager
def _open_text(path: str, encoding: str, newline: str) -> Iterator[io.TextIOWrapper]:
    with open_binary(path) as file:
        # Python's name for UTF-8 with or without a byte order mark.
        codec = "utf-8-sig" if encoding == "utf-8" else encoding
        yield io.TextIOWrapper(file, encoding=codec, errors="surrogateescape", newline=newline)


def _is_text(line: str) -> bool:
    """Whether all bytes of the line were of the file's encoding."""
    return line.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in line)


def read_lines(path: str, log: SkipLog, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank."""
    with _open_text(path, encoding, "\n") as file:
        for number, line in enumerate(file, start=1):
            text = line.rstrip("\r\n")
            if not _is_text(text):
                log.bad_line(path, number, ascii(text), f"is not {encoding} text")
            elif text.strip():
                yield number, text


def read_fields(
    path: str, delimiter: str, num_fields: int, log: SkipLog, encoding: str
) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of unquoted lines that have exactly so many."""
    for number, line in read_lines(path, log, encoding):
        fields = line.split(delimiter)
        if len(fields) == num_fields:
            yield number, fields
        else:
            log.bad_line(path, number, line, f"has {len(fields)} fields and not {num_fields}")


def read_csv(
    path: str, columns: list[str], log: SkipLog, delimiter: str = ",", names: tuple[str, ...] | None = None
) -> Iterator[tuple[int, list[str]]]:
    """Line number and the chosen columns of each row; quotes are those of RFC 4180.

    Args:
        path: the file.
        columns: names of the columns to give, in this order.
        log: counts rows that cannot be read.
        delimiter: between fields.
        names: of the file's columns; None if its first line has them.

    Raises:
        DataError: for a column that the file does not have.
    """
    with _open_text(path, "utf-8", "") as file:
        reader = csv.reader(file, delimiter=delimiter)
        header = list(names) if names is not None else next(reader, [])
        indexes = column_indexes(path, header, columns)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                log.bad_line(path, reader.line_num, "", f"is not CSV ({error})")
                continue
            if row is None:
                return
            if not row:
                continue
            if len(row) != len(header):
                log.bad_line(path, reader.line_num, row, f"has {len(row)} fields and not {len(header)}")
            elif not all(map(_is_text, row)):
                log.bad_line(path, reader.line_num, ascii(row), "is not utf-8 text")
            else:
                yield reader.line_num, [row[index] for index in indexes]


def column_indexes(path: str, header: list[str], columns: list[str]) -> list[int]:
    """Where the columns are. DataError for one that is not there."""
    for column in columns:
        if column not in header:
            raise DataError(
                f"{path} line 1", column, f"is not among its columns {header!r:.200}", "Mend the names in the recipe."
            )
    return [header.index(column) for column in columns]


def read_objects(path: str, log: SkipLog) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line of JSON, or of a Python literal, as Amazon's metadata of 2014 are."""
    for number, line in read_lines(path, log):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = _literal(line)
        if isinstance(found, dict):
            yield number, found
        else:
            log.bad_line(path, number, line, "is not a JSON object")


def _literal(line: str) -> object:
    try:
        return ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def read_parquet(path: str, columns: list[str]) -> Iterator[tuple[int, list[Any]]]:
    """Row number, from 1, and the chosen columns of each row.

    Raises:
        DataError: for a file that is no Parquet, or a column that it does not have.
    """
    with open_binary(path) as file:
        try:
            table = pq.ParquetFile(file)
        except ValueError as error:
            raise DataError(
                "file", path, f"is not Parquet ({error})", "Mend the path or kind in the recipe."
            ) from error
        column_indexes(path, table.schema_arrow.names, columns)
        yield from enumerate(_parquet_rows(table, columns, path), start=1)


def _parquet_rows(table: pq.ParquetFile, columns: list[str], path: str) -> Iterator[list[Any]]:
    batches = table.iter_batches(columns=sorted(set(columns)))
    while True:
        try:
            batch = next(batches, None)
            values = [batch.column(name).to_pylist() for name in columns] if batch is not None else []
        except (ValueError, pa.ArrowException) as error:  # also a page or a text that does not decode
            raise DataError("file", path, f"is damaged ({error})", "Fetch the file again.") from error
        if batch is None:
            return
        yield from map(list, zip(*values, strict=True))


def require_field(path: str, entry: dict[str, Any], fields: tuple[str, ...]) -> None:
    """DataError if the first object of a file has none of the fields: then the format in the recipe is wrong."""
    if not any(name in entry for name in fields):
        raise DataError(
            f"{path} line 1",
            list(entry),
            f"has no field {' or '.join(fields)}",
            "Choose the format or edition that fits.",
        )
