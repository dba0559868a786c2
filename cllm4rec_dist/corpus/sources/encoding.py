"""Text files as UTF-8, whatever encoding they are in.

UTF-8 is what most files are; UTF-16 and UTF-32 say so by their byte order mark. Of another encoding nothing in a file
tells which one it is, and a wrong guess is mojibake in every title. So a legacy encoding is used where the recipe names
it, or where it can hardly be another one, and is then reported with an example; else the file is refused.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice

from charset_normalizer import from_bytes

from cllm4rec_dist.corpus.sources.files import first_bytes, open_binary, read_exactly
from cllm4rec_dist.errors import DataError

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 24
_SAMPLE_LINES = 2000
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by their byte order mark; UTF-32's come first, because UTF-16's begin them."""
_HEAD = 4096
_MAC_SAMPLE = 1 << 16
"""A file without a line feed in so many bytes, but with carriage returns, ends its lines with these."""
_WESTERN = re.compile(
    r"[\x00-\x7f’‘“”–—…•€£©®™°´·«»¿¡ªº¼½¾²³×§ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØŒÙÚÛÜßàáâãäåæçèéêëìíîïñòóôõöøœùúûüÿ\xa0]*"
)
_LETTER_RUN = re.compile(r"[^\W\d_\x00-\x7f]{3}")
_ODD_PLACE = re.compile(r"[^\W\d_][¿¡°§×²³¼½¾ªº«»][^\W\d_]")
_OTHER_LATIN = {"cp1250", "iso8859_2", "cp1254", "iso8859_9", "cp1257", "iso8859_4", "iso8859_13", "mac_latin2"}
_MIN_COHERENCE = 0.3


def resolve_encoding(path: str, encoding: str) -> str:
    """Python's name of a file's encoding: the given one, or the one that is found for `auto`.

    A reader that opens a file several times resolves it once, so that a legacy encoding is reported once.
    """
    return find_encoding(path) if encoding == "auto" else encoding


def find_encoding(path: str) -> str:
    """The encoding of a text file: `utf-8` unless its bytes say otherwise.

    Reads the file up to its first byte that is not UTF-8, and to the end if there is one.

    Raises:
        DataError: for a file whose encoding cannot be told.
    """
    head = first_bytes(path, _HEAD)
    name = _unicode_encoding(head)
    if name is not None:
        if name.endswith(("-le", "-be")):
            logger.warning("%s: read as %s, because of its zero bytes", path, name)
        return name
    return "utf-8" if _is_utf8(path) else _legacy_encoding(path)


def is_utf8_beyond_ascii(path: str) -> bool:
    """True for UTF-8 with letters beyond ASCII: text of a legacy encoding is hardly ever valid UTF-8."""
    if _unicode_encoding(first_bytes(path, _HEAD)) not in (None, "utf-8") or not _is_utf8(path):
        return False
    with open_binary(path) as file:
        return any(not block.isascii() for block in iter(partial(file.read, BLOCK_BYTES), b""))


def escaped(line: bytes) -> str:
    """A line that is not UTF-8 for a message, with its wrong bytes as `\\xe9`."""
    return line.decode(errors="backslashreplace")


def first_text(path: str, encoding: str = "auto") -> str:
    """The first characters of a text file, without byte order mark; bytes that cannot be decoded are left out."""
    head = first_bytes(path, _HEAD)
    name = (_unicode_encoding(head) or "utf-8") if encoding == "auto" else encoding
    return head.decode(name, errors="ignore").removeprefix("\ufeff")


def _unicode_encoding(head: bytes) -> str | None:
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) > len(head) // 4 and min(even, odd) * 50 < max(even, odd):
        return "utf-16-le" if odd > even else "utf-16-be"
    return None


def _is_utf8(path: str) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_binary(path) as file:
        try:
            while block := file.read(BLOCK_BYTES):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _legacy_encoding(path: str) -> str:
    wrong: list[tuple[int, bytes]] = []
    num_right = num_wrong = 0
    with open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            if line.isascii():
                continue
            try:
                line.decode("utf-8")
                num_right += 1
            except UnicodeDecodeError:
                num_wrong += 1
                if len(wrong) < _SAMPLE_LINES:
                    wrong.append((number, line))
    if num_right > num_wrong:
        return "utf-8"  # with damaged lines, which are counted where they are read
    name = _guess(b"".join(line for _, line in wrong))
    number, line = wrong[0]
    if name is None:
        raise DataError(
            f"{path} line {number}",
            line.decode("cp1252", errors="replace").strip()[:80],
            f"is the line as cp1252 has it: it is not UTF-8, like {num_wrong:,} lines of the file, and its encoding"
            " cannot be told",
            "Name it beside the file's path, for example encoding: cp1252, or encoding: utf-8 to leave such lines out.",
        )
    logger.warning(
        "%s is not UTF-8 (%s lines) and is read as %s: line %d as %r. If that is wrong, set encoding in the recipe.",
        path,
        f"{num_wrong:,}",
        name,
        number,
        line.decode(name, errors="replace").strip()[:80],
    )
    return name


def _guess(sample: bytes) -> str | None:
    """The legacy encoding that the sample is in, if it can hardly be another one, or None."""
    found = from_bytes(sample).best()
    coherent = found is not None and found.coherence >= _MIN_COHERENCE
    try:
        text = sample.decode("cp1252")
    except UnicodeDecodeError:
        text = ""
    western = bool(text) and _WESTERN.fullmatch(text) is not None and not _ODD_PLACE.search(text)
    # Words of Cyrillic, Greek or CJK letters are runs of high bytes; Western words have one here and there.
    if western and not _LETTER_RUN.search(text):
        is_other = coherent and found is not None and found.encoding in _OTHER_LATIN and str(found) != text
        return None if is_other else "cp1252"
    if not western and coherent and found is not None and found.encoding not in ("ascii", "utf_8"):
        return codecs.lookup(found.encoding).name
    return None


def utf8_blocks(path: str, encoding: str = "auto") -> Iterator[bytes]:
    """The text of a file as UTF-8, in blocks that end with a line (the last one may not), without byte order mark.

    Line ends are `\\n`, whatever the file has. Bytes that are not UTF-8 in a file that is mostly UTF-8 stay as they
    are. A block is as long as the longest line, if that is longer than `BLOCK_BYTES`.

    Args:
        path: path or URL.
        encoding: Python's name, or `auto`.

    Raises:
        DataError: where the file cannot be read or decoded.
    """
    name = resolve_encoding(path, encoding)
    is_utf8 = codecs.lookup(name).name in ("utf-8", "utf-8-sig")
    blocks = _raw_blocks(path) if is_utf8 else (text.encode() for text in _decoded_blocks(path, name))
    rest: list[bytes] = []  # pieces of the line that is not over yet
    for block in _with_line_feeds(blocks):
        end = block.rfind(b"\n") + 1
        if end:
            yield b"".join([*rest, block[:end]])
            rest = []
        rest.append(block[end:])
    if last := b"".join(rest):
        yield last


def _with_line_feeds(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Blocks without byte order mark in which each line ends with `\\n`; a lone carriage return belongs to a text."""
    head = b""
    for block in blocks:
        head += block
        if b"\n" in head or len(head) >= _MAC_SAMPLE:
            break
    is_mac = b"\r" in head and b"\n" not in head
    returned = b""  # a carriage return at a block's end, whose line feed may begin the next one
    for block in chain([head.removeprefix(codecs.BOM_UTF8)], blocks):
        if is_mac:
            yield block.replace(b"\r", b"\n")
            continue
        block, returned = returned + block, b""
        if block.endswith(b"\r"):
            block, returned = block[:-1], b"\r"
        yield block.replace(b"\r\n", b"\n") if b"\r" in block else block


def _raw_blocks(path: str) -> Iterator[bytes]:
    with open_binary(path) as file:
        while block := read_exactly(file, BLOCK_BYTES):
            yield block


def _decoded_blocks(path: str, encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    with open_binary(path) as file:
        try:
            while block := read_exactly(file, BLOCK_BYTES):
                yield decoder.decode(block)
            yield decoder.decode(b"", final=True)
        except UnicodeError as error:
            raise DataError(
                f"{path}: encoding",
                encoding,
                f"does not fit the file ({error.__class__.__name__}: {error})",
                "Name another one in the recipe, or leave it out.",
            ) from error


def text_blocks(path: str, encoding: str) -> Iterator[str]:
    """The text of a file in blocks that end anywhere, without byte order mark.

    Raises:
        DataError: where the file cannot be read or decoded, at its first wrong byte.
    """
    blocks = _decoded_blocks(path, encoding)
    yield next(blocks, "").removeprefix("\ufeff")
    yield from blocks


def text_lines(path: str, encoding: str = "auto") -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and UTF-8 bytes of each line, without its end."""
    number = 0
    for block in utf8_blocks(path, encoding):
        for line in block.removesuffix(b"\n").split(b"\n"):
            number += 1
            yield number, line


def first_lines(path: str, encoding: str, count: int) -> list[bytes]:
    """The first lines of a file."""
    return [line for _, line in islice(text_lines(path, encoding), count)]
