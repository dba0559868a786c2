"""Parse records of delimited text that span lines or have ambiguous quotation marks.

Meaning of a quotation mark with `quoting: auto`:

    opens a field that is closed before a separator or line end    a quoted field (RFC 4180)
    opens a field that is closed on a later line                   a quoted field, unless a line in between looks like a
                                                                   row: then the file is refused
    anything else                                                  a character of the text, reported once per file

Blanks between a separator and the mark of a quoted field are left out, if the field is closed on its line.
`double` is strict RFC 4180, and with `none` every mark is a character. An `escape` character before a mark, a
separator, a line end or another escape makes it a plain character.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

import numpy as np

from cllm4rec_dist.corpus.skips import excerpt
from cllm4rec_dist.errors import DataError

logger = logging.getLogger(__name__)

_NEWLINE, _QUOTE = b"\n", b'"'
_UNIT_SEPARATOR = b"\x1f"
"""Replaces a separator of several characters, which Polars does not support."""
_MAX_FIELD = 1 << 26
"""Bytes after which a quoted field counts as never closed."""
_DIGIT = re.compile(rb"\d")


@dataclass(frozen=True)
class Dialect:
    """Format of fields.

    Attributes:
        separator: separator of fields, one or more characters; None infers it from the header.
        quoting: meaning of quotation marks.
        escape: escape character, or None.
        encoding: Python's name, or auto.
        names: names of the columns, if the first line is not a header.
    """

    separator: str | None = None
    quoting: Literal["auto", "double", "none"] = "auto"
    escape: str | None = None
    encoding: str = "auto"
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Outcome:
    """Result of reading a record.

    Attributes:
        kind: a record, a lost line, or a record that continues after the buffer.
        num_bytes, num_lines: length.
        fields: fields of a record.
        reason: reason why a line is lost.
    """

    class Kind(Enum):
        """Record, lost line, or start of a record."""

        RECORD = auto()
        LOST = auto()
        UNFINISHED = auto()

    kind: Kind
    num_bytes: int = 0
    num_lines: int = 1
    fields: list[bytes] = field(default_factory=list)
    reason: str = ""


class _Unclosed(Exception):
    """A quoted field is not closed in the buffer."""


class _Malformed(Exception):
    """A quotation mark in a quoted field neither closes it nor is doubled."""


class LineReader:
    """Reads records one by one.

    Args:
        dialect: format of fields.
        separator: separator of fields.
        num_fields: fields of a record.
        numeric: indexes of fields that are numbers or times.
        path: path of the file, for errors.
    """

    def __init__(
        self, dialect: Dialect, separator: str, num_fields: int = 0, numeric: Sequence[int] = (), path: str = ""
    ) -> None:
        self._dialect, self._long_separator = dialect, separator.encode()
        self.separator = self._long_separator if len(self._long_separator) == 1 else _UNIT_SEPARATOR
        self.num_fields, self._numeric, self._path = num_fields, numeric, path
        # A quotation mark as escape means RFC 4180's doubled mark.
        self._escape = b"" if dialect.escape == '"' else (dialect.escape or "").encode()
        self._num_stray, self._first_stray = 0, 0
        escapable = b"".join(map(re.escape, {self.separator, _QUOTE, _NEWLINE, self._escape}))
        self._ends_field = re.compile(b" *(?=" + re.escape(self.separator) + rb"|\n|\Z)")
        self._blanks = re.compile(rb' +(?="(?:[^"\n]|"")*"' + self._ends_field.pattern + b")")
        self._escaped = re.compile(re.escape(self._escape) + b"([" + escapable + b"])") if self._escape else None

    @property
    def has_quotes(self) -> bool:
        """True if quotation marks may enclose fields."""
        return self._dialect.quoting != "none"

    def with_one_byte_separator(self, text: bytes) -> bytes:
        """Replace a separator of several bytes with a single byte."""
        return text if len(self._long_separator) == 1 else text.replace(self._long_separator, self.separator)

    def header(self, lines: Sequence[bytes]) -> list[str]:
        """Return the names in the first record, without quotes and surrounding white space.

        Args:
            lines: first lines of the file; a quoted name may span several.
        """
        first = self.with_one_byte_separator(lines[0])
        fields = self._split(first)
        if self.has_quotes:
            with suppress(_Unclosed, _Malformed):
                fields, _ = self._parse(self.with_one_byte_separator(_NEWLINE.join(lines)), 0)
        return [name.decode(errors="replace").strip() for name in fields]

    def is_special(self, text: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return a bool [lines] mask of the lines that a parser of plain quotes would misread.

        Args:
            text: uint8 bytes of the block.
            starts, ends: start and end of each line in it.
        """
        special = np.zeros(len(ends), dtype=bool)
        if self._escape:
            special[np.searchsorted(ends, np.flatnonzero(text == self._escape[0]))] = True
        marks = np.flatnonzero(text == _QUOTE[0]) if self.has_quotes else np.empty(0, np.int64)
        if not len(marks):
            return special
        line = np.searchsorted(ends, marks)
        opens = (np.arange(len(marks)) - np.searchsorted(line, line)) % 2 == 0
        before = np.where(marks > 0, text[marks - 1], _NEWLINE[0])
        after = np.where(marks + 1 < len(text), text[np.minimum(marks + 1, len(text) - 1)], _NEWLINE[0])
        separator = self.separator[0]
        at_start = (before == separator) | (before == _NEWLINE[0]) | (before == _QUOTE[0])
        at_end = (after == separator) | (after == _NEWLINE[0]) | (after == _QUOTE[0])
        special[line[~np.where(opens, at_start, at_end)]] = True
        special |= np.bincount(line, minlength=len(ends)) % 2 == 1
        return special

    def read(self, buffer: bytes, start: int, line: int, is_last: bool) -> Outcome:
        """Read the record at `start`.

        Args:
            line: line number of the record, for errors.
            is_last: True if the buffer is the end of the file.

        Raises:
            DataError: if a quoted field may be several rows, or seems to be escaped although the recipe sets no escape.
        """
        strict = self._dialect.quoting == "double"
        try:
            return (
                self._record(buffer, start, line, is_last, strict)
                if self.has_quotes
                else self._as_characters(buffer, start, line, is_last)
            )
        except _Unclosed:
            if not is_last and len(buffer) - start < _MAX_FIELD:
                return Outcome(Outcome.Kind.UNFINISHED)
            if strict:
                raise self._refusal(line, buffer, start, "opens a quoted field that is never closed") from None
            return self._as_characters(buffer, start, line, is_last=True)

    def _record(self, buffer: bytes, start: int, line: int, is_last: bool, strict: bool) -> Outcome:
        """Read the record at `start` with quotes; _Unclosed if the buffer ends inside of it."""
        try:
            fields, end = self._parse(buffer, start)
        except _Malformed:
            if strict:
                return Outcome(Outcome.Kind.LOST, _line_length(buffer, start), reason="has quotes that are not doubled")
            return self._as_characters(buffer, start, line, is_last)
        num_lines = _num_lines(buffer, start, end)
        if len(fields) != self.num_fields:
            if num_lines > 1 and not strict:
                return self._as_characters(buffer, start, line, is_last)
            return Outcome(Outcome.Kind.LOST, end - start, num_lines, reason=self.wrong_count(len(fields)))
        if num_lines > 1 and not strict:
            inner = buffer[start:end].rstrip(_NEWLINE).split(_NEWLINE)[1:]
            if any(map(self._looks_like_a_row, inner)):
                what = f"opens a quoted field that continues for {num_lines - 1:,} lines, some of which look like rows"
                raise self._refusal(line, buffer, start, what)
        return Outcome(Outcome.Kind.RECORD, end - start, num_lines, fields)

    def wrong_count(self, count: int) -> str:
        """Return the reason why a line with `count` fields is lost."""
        return f"has {count} {'field' if count == 1 else 'fields'} instead of {self.num_fields}"

    def report_stray_marks(self) -> None:
        """Warn about quotation marks that were read as characters."""
        if self._num_stray:
            logger.warning(
                "%s: a quotation mark starts a field but does not enclose it (%s lines, the first is line %d). It is"
                " read as a character. If no field of the file is quoted, set quoting: none.",
                self._path,
                f"{self._num_stray:,}",
                self._first_stray,
            )

    def _as_characters(self, buffer: bytes, start: int, line: int, is_last: bool) -> Outcome:
        """Read the line at `start` with quotation marks as characters.

        Raises:
            _Unclosed: if the buffer ends with an escaped line end, unless `is_last`.
        """
        end = start + _line_length(buffer, start)
        while self._escape and buffer[end - 1 : end] == _NEWLINE and self._is_escaped(buffer, start, end - 1):
            if end == len(buffer):
                if not is_last:
                    raise _Unclosed
                break
            end += _line_length(buffer, end)
        text = buffer[start:end].removesuffix(_NEWLINE)
        fields = self._split(text)
        num_lines = _num_lines(buffer, start, end)
        if self.has_quotes and not self._escape and b'\\"' in text:
            raise self._refusal(line, buffer, start, "has a quotation mark after a backslash", escaped=True)
        if len(fields) != self.num_fields:
            return Outcome(Outcome.Kind.LOST, end - start, num_lines, reason=self.wrong_count(len(fields)))
        if self.has_quotes:
            self._num_stray += 1
            self._first_stray = self._first_stray or line
        return Outcome(Outcome.Kind.RECORD, end - start, num_lines, fields)

    def _refusal(self, line: int, buffer: bytes, start: int, what: str, *, escaped: bool = False) -> DataError:
        text = excerpt(buffer[start : start + _line_length(buffer, start)].decode(errors="replace"))
        cure = (
            "Set escape: '\\' in the recipe if backslashes escape, or quoting: none if marks are characters."
            if escaped
            else "Set quoting: none in the recipe if marks are characters, or quoting: double if the field is right."
        )
        return DataError(f"{self._path} line {line}", text, what, cure)

    def _looks_like_a_row(self, line: bytes) -> bool:
        fields = self._split(line)
        return len(fields) == self.num_fields and all(
            not fields[index].strip() or _DIGIT.search(fields[index]) for index in self._numeric
        )

    def _split(self, line: bytes) -> list[bytes]:
        """Split a line into fields, with quotation marks as characters."""
        if not self._escape or self._escape not in line:
            return line.split(self.separator)
        fields, at = [], 0
        while True:
            end = self._field_end(line, at)
            fields.append(self._unescaped(line[at:end]))
            if end >= len(line):
                return fields
            at = end + 1

    def _parse(self, buffer: bytes, start: int) -> tuple[list[bytes], int]:
        """Return the fields of the record at `start`, and the start of the next one."""
        fields: list[bytes] = []
        at = start
        while True:
            if self._dialect.quoting == "auto" and (blanks := self._blanks.match(buffer, at)):
                at = blanks.end()
            if buffer[at : at + 1] == _QUOTE:
                value, at = self._quoted(buffer, at + 1)
            else:
                end = self._field_end(buffer, at)
                value, at = self._unescaped(buffer[at:end]), end
            fields.append(value)
            if at >= len(buffer):
                if self._escape and buffer.endswith(_NEWLINE):
                    raise _Unclosed  # the line end is escaped, so the field continues
                return fields, at
            at += 1
            if buffer[at - 1 : at] == _NEWLINE:
                return fields, at

    def _quoted(self, buffer: bytes, start: int) -> tuple[bytes, int]:
        """Return a quoted field whose content starts at `start`, and the position after its closing mark."""
        at = start
        while True:
            end = buffer.find(_QUOTE, at)
            if end < 0:
                raise _Unclosed
            if self._is_escaped(buffer, start, end):
                at = end + 1
                continue
            if buffer[end + 1 : end + 2] == _QUOTE:
                at = end + 2
                continue
            blanks = self._ends_field.match(buffer, end + 1)
            if blanks is None or (self._dialect.quoting == "double" and blanks[0]):
                raise _Malformed
            return self._unescaped(buffer[start:end].replace(_QUOTE * 2, _QUOTE)), blanks.end()

    def _field_end(self, buffer: bytes, start: int) -> int:
        """Return the position of the separator or line end after an unquoted field."""
        at = start
        while True:
            ends = [index for mark in (self.separator, _NEWLINE) if (index := buffer.find(mark, at)) >= 0]
            end = min(ends, default=len(buffer))
            if end == len(buffer) or not self._is_escaped(buffer, start, end):
                return end
            at = end + 1

    def _is_escaped(self, buffer: bytes, start: int, at: int) -> bool:
        """True if an odd number of escape characters precedes `at`."""
        count = 0
        while self._escape and at - count > start and buffer[at - count - 1 : at - count] == self._escape:
            count += 1
        return count % 2 == 1

    def _unescaped(self, value: bytes) -> bytes:
        return value if self._escaped is None else self._escaped.sub(rb"\1", value)


def _line_length(buffer: bytes, start: int) -> int:
    end = buffer.find(_NEWLINE, start)
    return (len(buffer) if end < 0 else end + 1) - start


def _num_lines(buffer: bytes, start: int, end: int) -> int:
    return max(1, buffer.count(_NEWLINE, start, end) + (not buffer.endswith(_NEWLINE, start, end)))
