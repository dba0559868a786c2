"""Read delimited text with Polars in blocks of lines, and account for every line.

Polars parses plain lines: those with the right number of fields whose quotes open and close on the line. Array
operations on a block's bytes select them. The others are read one by one (`records.py`), because there a parser
silently loses rows: a quotation mark may open a field that is closed hundreds of lines later.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.row_batch import Batch, column_indexes, with_partition
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.sources.encoding import escaped, first_lines, resolve_encoding, utf8_blocks
from cllm4rec_dist.corpus.sources.files import RawFile
from cllm4rec_dist.corpus.sources.records import Dialect, LineReader, Outcome
from cllm4rec_dist.errors import DataError

logger = logging.getLogger(__name__)

_GUESSES = (",", ";", "\t", "|")
_NEWLINE, _QUOTE = ord("\n"), ord('"')
_HEADER_LINES = 20
"""Number of first lines in which to look for the header."""
_SEPARATOR_LINE = re.compile(rb'"?sep=([^\w\s"]|\t)"?[ ,;\t]*', re.IGNORECASE)
"""First line that declares the separator; an editor may have added empty fields."""


def header_lines(path: str, encoding: str) -> tuple[list[bytes], str | None]:
    """Return the first nonempty lines, the header first, and the separator that the file declares, if any.

    Excel reads and writes a first line `sep=;`.
    """
    lines = first_lines(path, encoding, _HEADER_LINES)
    match = _SEPARATOR_LINE.fullmatch(lines[0]) if lines else None
    rest = lines if match is None else lines[1:]
    return [line for line in rest if line.strip()], None if match is None else match[1].decode()


def read_header(file: RawFile, dialect: Dialect, columns: Sequence[str] = ()) -> tuple[list[str], str]:
    """Read the names of a file's columns, and the separator.

    Args:
        file: file to read.
        dialect: format of fields.
        columns: required columns, from which an unknown separator is inferred.
    """
    lines, separator = header_lines(file.path, dialect.encoding)
    separator = dialect.separator or separator
    if not lines:
        return list(dialect.names or ()), separator or ","
    candidates = _GUESSES if separator is None else (separator,)
    headers = {candidate: LineReader(dialect, candidate).header(lines) for candidate in candidates}
    if dialect.names is not None:
        fitting = [candidate for candidate, fields in headers.items() if len(fields) == len(dialect.names)]
        return list(dialect.names), (fitting or candidates)[0]
    required = set(columns) - file.partition.keys()
    fitting = [candidate for candidate, fields in headers.items() if required and required <= set(fields)]
    separator = (fitting or candidates)[0]
    if dialect.separator is None and separator != ",":
        logger.info("%s: fields are separated by %r", file.path, separator)
    return headers[separator], separator


def read_delimited(
    file: RawFile, columns: Sequence[str], dialect: Dialect, log: SkipLog, numeric: Sequence[str] = ()
) -> Iterator[Batch]:
    """Yield the given columns of each row, as texts.

    Args:
        file: file to read.
        columns: names of the columns.
        dialect: format of fields.
        log: counts rows that cannot be read.
        numeric: columns of numbers or times, which distinguish a row from a line of text.

    Raises:
        DataError: for missing columns and ambiguous quotes.
    """
    dialect = replace(dialect, encoding=resolve_encoding(file.path, dialect.encoding))
    header, separator = read_header(file, dialect, columns)
    if not header:
        return
    in_file = [name for name in columns if name not in file.partition] or header[:1]
    indexes = column_indexes(file.path, header, in_file)
    numbers = [header.index(name) for name in numeric if name in header]
    reader = LineReader(dialect, separator, len(header), numbers, file.path)
    header_line = 0 if dialect.names is not None else _first_line_with_text(file, dialect)
    line, rest = 1, b""
    blocks = _without_separator_line(utf8_blocks(file.path, dialect.encoding))
    block = next(blocks, None)
    while block is not None:
        following = next(blocks, None)
        buffer = rest + reader.with_one_byte_separator(block)
        frame, lines, used = _Block(buffer, line, following is None, reader, log, file.path).rows(indexes, in_file)
        line, rest, block = line + buffer.count(b"\n", 0, used), buffer[used:], following
        batch = Batch(file.path, lines, frame).keep(lines != header_line)
        batch = _without_headers(batch, [header[index] for index in indexes], log)
        yield Batch(batch.path, batch.lines, with_partition(batch.columns, file.partition, columns))
    reader.report_stray_marks()


def _without_separator_line(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Replace a first line that declares the separator with an empty line, so that line numbers do not change."""
    for index, block in enumerate(blocks):
        line, _, rest = block.partition(b"\n") if index == 0 else (b"", b"", b"")
        yield b"\n" + rest if _SEPARATOR_LINE.fullmatch(line) else block


def _first_line_with_text(file: RawFile, dialect: Dialect) -> int:
    lines = first_lines(file.path, dialect.encoding, _HEADER_LINES)
    return next(
        line_number
        for line_number, line in enumerate(lines, start=1)
        if line.strip() and not (line_number == 1 and _SEPARATOR_LINE.fullmatch(line))
    )


def _without_headers(batch: Batch, header: list[str], log: SkipLog) -> Batch:
    """Leave out repeated headers, as in concatenated files."""
    names = zip(batch.columns.columns, header, strict=True)
    is_header = pl.all_horizontal(
        [pl.col(name).str.strip_prefix("\ufeff").str.strip_chars() == text for name, text in names]
    )
    repeated = batch.columns.select(is_header.fill_null(False)).to_series().to_numpy()
    if repeated.any():
        line = int(batch.lines[np.flatnonzero(repeated)[0]])
        log.skip("repeated header", int(repeated.sum()), file=batch.path, line=line, value=", ".join(header))
    rows = batch.keep(~repeated)
    log.read(batch.path, len(rows.lines))
    return rows


class _Block:
    """A block of lines: plain ones for Polars, the others for the line reader.

    Args:
        buffer: complete lines; the last one may lack its line end.
        first_line: line number of the first line.
        is_last: True for the last block of the file.
    """

    def __init__(
        self, buffer: bytes, first_line: int, is_last: bool, reader: LineReader, log: SkipLog, path: str
    ) -> None:
        self._buffer, self._first_line, self._is_last = buffer, first_line, is_last
        self._reader, self._log, self._path = reader, log, path
        self._lost: list[tuple[int, str, str]] = []
        self._bytes = np.frombuffer(buffer, np.uint8)
        ends = np.flatnonzero(self._bytes == _NEWLINE)
        self._ends = ends if not buffer or buffer.endswith(b"\n") else np.append(ends, len(buffer))
        self._starts = np.concatenate([[0], self._ends[:-1] + 1]) if len(self._ends) else self._ends

    def rows(self, indexes: list[int], names: list[str]) -> tuple[pl.DataFrame, np.ndarray, int]:
        """Return the selected fields of all rows, their line numbers, and the number of bytes that were used.

        Unused bytes start with a record that continues after the block.
        """
        plain = np.ones(len(self._ends), dtype=bool)
        self._drop_undecodable(plain)
        records, used, stop = self._read_special(plain)
        plain[stop:] = False
        clean, lines = self._clean(plain)
        self._report_lost()
        frame = _parse(clean, len(lines), indexes, names, self._reader, self._path)
        if records:
            fields = [[_text(record[index]) for index in indexes] for _, record in records]
            special = pl.DataFrame(fields, schema=dict.fromkeys(names, pl.String), orient="row")
            lines = np.concatenate([lines, [line for line, _ in records]])
            order = np.argsort(lines, kind="stable")
            frame, lines = pl.concat([frame, special])[order], lines[order]
        return frame, lines.astype(np.int64), used

    def _line(self, index: int) -> bytes:
        return self._buffer[self._starts[index] : self._ends[index]]

    def _drop_undecodable(self, plain: np.ndarray) -> None:
        if self._buffer.isascii():
            return
        try:
            self._buffer.decode()
        except UnicodeDecodeError:
            for index in range(len(self._ends)):
                line = self._line(index)
                if not line.isascii() and line.decode(errors="replace").encode() != line:
                    plain[index] = False
                    self._lose("is not UTF-8 text", index, escaped(line[:120]))

    def _lose(self, reason: str, index: int, value: str) -> None:
        self._lost.append((self._first_line + index, reason, value))

    def _report_lost(self) -> None:
        self._log.read(self._path, len(self._lost))
        for line, reason, value in sorted(self._lost):
            self._log.lose(reason, self._path, line, value)

    def _read_special(self, plain: np.ndarray) -> tuple[list[tuple[int, list[bytes]]], int, int]:
        """Read the lines that are not plain: records with line numbers; used bytes; index of the first unused line."""
        records: list[tuple[int, list[bytes]]] = []
        after = 0
        for index in np.flatnonzero(self._reader.is_special(self._bytes, self._starts, self._ends) & plain).tolist():
            start = int(self._starts[index])
            if start < after:
                continue
            outcome = self._reader.read(self._buffer, start, self._first_line + index, self._is_last)
            if outcome.kind is Outcome.Kind.UNFINISHED:
                return records, start, index
            plain[index : index + outcome.num_lines] = False
            after = start + outcome.num_bytes
            if outcome.kind is Outcome.Kind.RECORD:
                records.append((self._first_line + index, outcome.fields))
            elif outcome.kind is Outcome.Kind.LOST:
                self._lose(outcome.reason, index, _text(self._line(index)))
        return records, len(self._buffer), len(self._ends)

    def _clean(self, plain: np.ndarray) -> tuple[bytes, np.ndarray]:
        """Concatenate the plain lines with the right number of fields; also return their line numbers."""
        if self._reader.num_fields == 1:  # an empty line is no row
            plain = plain & [bool(self._line(index).strip()) for index in range(len(plain))]
        kept = self._only(plain)
        counts = _num_fields(kept, ord(self._reader.separator), self._reader.has_quotes)
        wrong = counts != self._reader.num_fields
        if not wrong.any():
            return kept, self._first_line + np.flatnonzero(plain)
        indexes = np.flatnonzero(plain)
        for index, count in zip(indexes[wrong].tolist(), counts[wrong].tolist(), strict=True):
            if self._line(index).strip():
                self._lose(self._reader.wrong_count(count), index, _text(self._line(index)))
        plain = plain.copy()
        plain[indexes[wrong]] = False
        return self._only(plain), self._first_line + np.flatnonzero(plain)

    def _only(self, plain: np.ndarray) -> bytes:
        if plain.all():
            return self._buffer
        edges = np.flatnonzero(np.diff(np.concatenate([[False], plain, [False]]).astype(np.int8)))
        runs = [self._buffer[self._starts[a] : self._ends[b - 1]] for a, b in edges.reshape(-1, 2).tolist()]
        return b"".join(run + b"\n" for run in runs)


def _num_fields(lines: bytes, separator: int, has_quotes: bool) -> np.ndarray:
    """Count the fields of each line, ignoring separators between quotation marks."""
    text = np.frombuffer(lines, np.uint8)
    ends = np.flatnonzero(text == _NEWLINE)
    if lines and not lines.endswith(b"\n"):
        ends = np.append(ends, len(lines))
    separators = np.flatnonzero(text == separator)
    if has_quotes and b'"' in lines:
        separators = separators[np.searchsorted(np.flatnonzero(text == _QUOTE), separators) % 2 == 0]
    before = np.searchsorted(separators, ends)
    return np.diff(before, prepend=0) + 1


def _parse(
    lines: bytes, num_rows: int, indexes: list[int], names: list[str], reader: LineReader, path: str
) -> pl.DataFrame:
    schema = dict.fromkeys(names, pl.String)
    if not num_rows or not names:
        return pl.DataFrame({name: [] for name in names}, schema=schema)
    try:
        frame = pl.read_csv(
            lines,
            has_header=False,
            separator=reader.separator.decode(),
            infer_schema=False,
            quote_char='"' if reader.has_quotes and b'"' in lines else None,
            columns=sorted(set(indexes)),
            raise_if_empty=False,
        )
    except pl.exceptions.PolarsError as error:
        raise DataError(
            "file", path, f"cannot be read ({error})", "Fix the file, or set quoting in the recipe."
        ) from error
    assert len(frame) == num_rows, (path, len(frame), num_rows)
    by_index = dict(zip(sorted(set(indexes)), frame.columns, strict=True))
    return frame.select([pl.col(by_index[index]).alias(name) for index, name in zip(indexes, names, strict=True)])


def _text(field: bytes) -> str:
    return field.decode(errors="replace")
