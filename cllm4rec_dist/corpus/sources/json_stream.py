"""Stream JSON documents that need not fit into memory: an array, an object or several values.

Python's decoder parses each element, so that `NaN`, integers of any length and control characters in texts are read as
in JSON lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from cllm4rec_dist.errors import DataError

_DECODER = json.JSONDecoder(strict=False)
_BLANKS = re.compile(r"[ \t\r\n]*")
_LONGEST_TOKEN = 16
"""Distance of an error from the end of the buffer within which a token may be truncated."""
_LONGEST_STRING = 1 << 26
"""This distance for strings."""


class JsonStream:
    """Reads the values of a JSON text one by one.

    Args:
        path: path of the file, for errors.
        blocks: blocks of its text.

    Raises:
        DataError: from every method, if the text is not JSON.
    """

    def __init__(self, path: str, blocks: Iterator[str]) -> None:
        self._path, self._blocks = path, blocks
        self._text, self._at, self._line = "", 0, 1

    def peek(self) -> str:
        """Return the next character that is not white space, or an empty text at the end."""
        while True:
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]  # matches anywhere
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def elements(self) -> Iterator[Any]:
        """Yield the elements of the next value, an array."""
        self._take("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() != "]":
                self._take(",")
        self._take("]")

    def members(self) -> Iterator[tuple[str, Any]]:
        """Yield the keys and values of the next value, an object."""
        self._take("{")
        while self.peek() != "}":
            key = self.value()
            if not isinstance(key, str):
                raise self._error("a key that is not a string", self._at)
            self._take(":")
            yield key, self.value()
            if self.peek() != "}":
                self._take(",")
        self._take("}")

    def values(self) -> Iterator[Any]:
        """Yield all values up to the end, with optional commas between them; of arrays, yield the elements."""
        while letter := self.peek():
            if letter == ",":
                self._at += 1
            elif letter == "[":
                yield from self.elements()
            else:
                yield self.value()

    def value(self) -> Any:
        """Return the next value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._is_truncated(error) or not self._read_more():
                    raise self._error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self._error(str(error), self._at) from error
            else:
                # A truncated number may leave `.`, `e` or `e+` after the parsed value.
                may_continue = isinstance(value, int | float) and end + 2 >= len(self._text)
                if not may_continue or not self._read_more():
                    self._at = end
                    return value

    def _is_truncated(self, error: json.JSONDecodeError) -> bool:
        longest = _LONGEST_STRING if error.msg.startswith("Unterminated string") else _LONGEST_TOKEN
        return len(self._text) - error.pos <= longest

    def _take(self, letter: str) -> None:
        if self.peek() != letter:
            raise self._error(f"Expecting {letter!r}", self._at)
        self._at += 1

    def _read_more(self) -> bool:
        """Read at least as much as the buffer has, so that a long value is not parsed too often."""
        parts, size = [self._text[self._at :]], 0
        while size <= len(parts[0]) and (block := next(self._blocks, None)) is not None:
            parts.append(block)
            size += len(block)
        if size:
            self._line += self._text.count("\n", 0, self._at)
            self._text, self._at = "".join(parts), 0
        return size > 0

    def _error(self, what: str, position: int) -> DataError:
        line = self._line + self._text.count("\n", 0, position)
        near = self._text[max(0, position - 20) : position + 20]
        cure = "Fix the file, or download it again."
        return DataError(f"{self._path} line {line}", near or "the end", f"is not JSON ({what})", cure)
