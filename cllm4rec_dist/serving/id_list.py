"""Text files of external ids, one per line, and similar ids for error messages."""

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
"""Maximum number of ids for fuzzy matching, which takes a second for that many."""


def read_ids(path: Path, option: str) -> list[str]:
    """Read the distinct ids of a text file in order; blank lines and surrounding spaces are ignored.

    The file is UTF-8, or UTF-16 with a byte order mark; lines end with LF or CRLF.

    Args:
        option: option that names the file, for error messages.

    Raises:
        DataError: if the file is missing or not such a text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        cure = f"Give a text file with one id per line.{did_you_mean_path(str(path))}"
        raise DataError(option, str(path), f"cannot be read ({error.strerror})", cure) from error
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            option, str(path), f"is not UTF-8 text ({error})", "Save it as UTF-8, one id per line."
        ) from error
    # Not splitlines, which also splits at characters that an id may contain, such as U+2028.
    ids = (line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return list(dict.fromkeys(name for name in ids if name))


def similar_ids(name: str, known: Sequence[str], count: int = 3) -> list[str]:
    """Return the known ids most similar to an unknown one, best first; may be empty.

    Ids that differ only in case, leading zeros, a trailing `.0` or spaces come first.
    """
    form = _plain_form(name)
    similar = [other for other in known if _plain_form(other) == form][:count]
    if not similar and len(known) <= _MOST_COMPARED:
        similar = get_close_matches(name, known, n=count, cutoff=0.75)
    return similar


def _plain_form(name: str) -> str:
    return _ZEROS.sub("", name.strip().casefold().removesuffix(".0"))
