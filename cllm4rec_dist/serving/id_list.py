"""Files of external ids, one a line."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from cllm4rec_dist.errors import DataError
from cllm4rec_dist.suggestions import did_you_mean_path

_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")
_MOST_COMPARED = 50_000
"""Ids that are compared letter by letter, which takes a second for that many."""


def read_ids(path: Path, option: str) -> list[str]:
    """Distinct ids of a text file in the order of their first line; blank lines and blanks around ids do not count.

    The file is UTF-8, or UTF-16 where it begins with a byte order mark; lines end with LF or CRLF.

    Args:
        option: that names the file, for messages.

    Raises:
        DataError: for a file that is missing or no such text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        cure = f"Give a text file with one id a line.{did_you_mean_path(str(path))}"
        raise DataError(option, str(path), f"cannot be read ({error.strerror})", cure) from error
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            option, str(path), f"is not UTF-8 text ({error})", "Save it as UTF-8, one id a line."
        ) from error
    # Not splitlines, which also cuts at characters that an id may hold, such as U+2028.
    ids = (line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return list(dict.fromkeys(name for name in ids if name))


def similar_ids(name: str, known: Sequence[str], count: int = 3) -> list[str]:
    """The known ids that look most like one that is unknown, best first; maybe none.

    Ids that differ in case, in zeros before a number, in a `.0` behind them or in blanks come first.
    """
    form = _plain_form(name)
    found = [other for other in known if _plain_form(other) == form][:count]
    if not found and len(known) <= _MOST_COMPARED:
        found = get_close_matches(name, known, n=count, cutoff=0.75)
    return found


def _plain_form(name: str) -> str:
    return _ZEROS.sub("", name.strip().casefold().removesuffix(".0"))
