"""Files of external ids, one a line."""

from __future__ import annotations

import codecs
from pathlib import Path

from cllm4rec_dist.errors import DataError

_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_ids(path: Path) -> list[str]:
    """Distinct ids of a text file in the order of their first line; blank lines and blanks around ids do not count.

    The file is UTF-8, or UTF-16 where it begins with a byte order mark; lines end with LF or CRLF.

    Raises:
        DataError: for a file that is missing or no such text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            "--users-file", str(path), f"cannot be read ({error.strerror})", "Give a text file with one id a line."
        ) from error
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            "--users-file", str(path), f"is not UTF-8 text ({error})", "Save it as UTF-8, one id a line."
        ) from error
    # Not splitlines, which also cuts at characters that an id may hold, such as U+2028.
    ids = (line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return list(dict.fromkeys(name for name in ids if name))
