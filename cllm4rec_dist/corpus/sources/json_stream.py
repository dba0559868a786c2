"""JSON documents read as a stream: an array, an object or several values that need not fit into memory.

Python's decoder is used for each element, so that `NaN`, integers of any length and control characters in texts are
read as in JSON lines.
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
"""An error farther from the end of the text at hand is no token that was cut off ..."""
_LONGEST_STRING = 1 << 26
"""... but a string may be as long as this."""


class JsonStream:
    """Reads values of a JSON text one after the other.

    Args:
        path: of the file, for errors.
        blocks: its text, cut anywhere.

    Raises:
        DataError: from every method, where the text is not JSON.
    """

    def __init__(self, path: str, blocks: Iterator[str]) -> None:
        self._path, self._blocks = path, blocks
        self._text, self._at, self._line = "", 0, 1

    def peek(self) -> str:
        """The next character that is not blank, or an empty text at the end."""
        while True:
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]  # matches anywhere
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def elements(self) -> Iterator[Any]:
        """Elements of the array that comes next."""
        self._take("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() != "]":
                self._take(",")
        self._take("]")

    def members(self) -> Iterator[tuple[str, Any]]:
        """Keys and values of the object that comes next."""
        self._take("{")
        while self.peek() != "}":
            key = self.value()
            if not isinstance(key, str):
                raise self._error("a key that is no string", self._at)
            self._take(":")
            yield key, self.value()
            if self.peek() != "}":
                self._take(",")
        self._take("}")

    def values(self) -> Iterator[Any]:
        """All values up to the end; a comma may stand between them. Of arrays, their elements."""
        while letter := self.peek():
            if letter == ",":
                self._at += 1
            elif letter == "[":
                yield from self.elements()
            else:
                yield self.value()

    def value(self) -> Any:
        """The value that comes next."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._is_cut_off(error) or not self._read_more():
                    raise self._error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self._error(str(error), self._at) from error
            else:
                # Of a number that was cut off, `1.`, `1e` and `1e+` are left behind the value.
                may_go_on = isinstance(value, int | float) and end + 2 >= len(self._text)
                if not may_go_on or not self._read_more():
                    self._at = end
                    return value

    def _is_cut_off(self, error: json.JSONDecodeError) -> bool:
        longest = _LONGEST_STRING if error.msg.startswith("Unterminated string") else _LONGEST_TOKEN
        return len(self._text) - error.pos <= longest

    def _take(self, letter: str) -> None:
        if self.peek() != letter:
            raise self._error(f"Expecting {letter!r}", self._at)
        self._at += 1

    def _read_more(self) -> bool:
        """Read at least as much again as is at hand, so that a long value is not parsed too often."""
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
        cure = "Mend the file, or fetch it again."
        return DataError(f"{self._path} line {line}", near or "the end", f"is not JSON ({what})", cure)
