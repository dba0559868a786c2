"""Convert text files of any encoding to UTF-8.

Most files are UTF-8; UTF-16 and UTF-32 have a byte order mark. Nothing in a file declares another encoding, and a wrong
guess is mojibake in every title. So a legacy encoding is used only if the recipe names it, or if the detection is
nearly certain, which is then reported with an example; otherwise the file is refused.
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
"""Encodings by byte order mark; UTF-32 comes before UTF-16, whose mark is a prefix."""
_HEAD = 4096
_MAC_SAMPLE = 1 << 16
"""Bytes in which a file with carriage returns but no line feed counts as one with carriage returns as line ends."""
_WESTERN = re.compile(
    r"[\x00-\x7f’‘“”–—…•€£©®™°´·«»¿¡ªº¼½¾²³×§ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØŒÙÚÛÜßàáâãäåæçèéêëìíîïñòóôõöøœùúûüÿ\xa0]*"
)
_LETTER_RUN = re.compile(r"[^\W\d_\x00-\x7f]{3}")
_SIGN_IN_WORD = re.compile(r"[^\W\d_][¿¡°§×²³¼½¾ªº«»][^\W\d_]")
_OTHER_LATIN = {"cp1250", "iso8859_2", "cp1254", "iso8859_9", "cp1257", "iso8859_4", "iso8859_13", "mac_latin2"}
_MIN_COHERENCE = 0.3


def resolve_encoding(path: str, encoding: str, cure: str = "set encoding in the recipe") -> str:
    """Return Python's name of a file's encoding: the given one, or the detected one for `auto`.

    A reader that opens a file several times resolves it once, so that a legacy encoding is reported once.

    Args:
        cure: what to do if the detected one is wrong, or none is detected.
    """
    return find_encoding(path, cure) if encoding == "auto" else encoding


def find_encoding(path: str, cure: str) -> str:
    """Detect the encoding of a text file; `utf-8` unless its bytes are not.

    Reads the file up to its first byte that is not UTF-8, and to the end if there is one.

    Raises:
        DataError: if the encoding cannot be detected.
    """
    head = first_bytes(path, _HEAD)
    name = _unicode_encoding(head)
    if name is not None:
        if name.endswith(("-le", "-be")):
            logger.warning("%s: read as %s, because of its zero bytes", path, name)
        return name
    return "utf-8" if _is_utf8(path) else _legacy_encoding(path, cure)


def is_utf8_beyond_ascii(path: str) -> bool:
    """True for UTF-8 with non-ASCII characters; text of a legacy encoding is hardly ever valid UTF-8."""
    if _unicode_encoding(first_bytes(path, _HEAD)) not in (None, "utf-8") or not _is_utf8(path):
        return False
    with open_binary(path) as file:
        return any(not block.isascii() for block in iter(partial(file.read, BLOCK_BYTES), b""))


def escaped(line: bytes) -> str:
    """Decode a line that is not UTF-8 for a message, with invalid bytes as `\\xe9`."""
    return line.decode(errors="backslashreplace")


def first_text(path: str, encoding: str = "auto") -> str:
    """Return the first characters of a text file, without byte order mark and undecodable bytes."""
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


def _legacy_encoding(path: str, cure: str) -> str:
    wrong: list[tuple[int, bytes]] = []
    num_right = num_wrong = 0
    with open_binary(path) as file:
        for line_number, line in enumerate(file, start=1):
            if line.isascii():
                continue
            try:
                line.decode("utf-8")
                num_right += 1
            except UnicodeDecodeError:
                num_wrong += 1
                if len(wrong) < _SAMPLE_LINES:
                    wrong.append((line_number, line))
    if num_right > num_wrong:
        return "utf-8"  # with damaged lines, which the reader counts
    name = _guess(b"".join(line for _, line in wrong))
    line_number, line = wrong[0]
    if name is None:
        by_setting = "Set it in the recipe, as encoding: cp1252, or encoding: utf-8 to leave out such lines."
        raise DataError(
            f"{path} line {line_number}",
            line.decode("cp1252", errors="replace").strip()[:80],
            f"is the line read as cp1252: it is not UTF-8, like {num_wrong:,} lines of the file, and the encoding"
            " cannot be detected",
            by_setting if "encoding" in cure else f"{cure[0].upper()}{cure[1:]}.",
        )
    logger.warning(
        "%s is not UTF-8 (%s lines) and is read as %s: line %d as %r. If that is wrong, %s.",
        path,
        f"{num_wrong:,}",
        name,
        line_number,
        line.decode(name, errors="replace").strip()[:80],
        cure,
    )
    return name


def _guess(sample: bytes) -> str | None:
    """Detect the legacy encoding of a sample; None unless it is nearly certain."""
    best = from_bytes(sample).best()
    coherent = best is not None and best.coherence >= _MIN_COHERENCE
    try:
        text = sample.decode("cp1252")
    except UnicodeDecodeError:
        text = ""
    western = bool(text) and _WESTERN.fullmatch(text) is not None and not _SIGN_IN_WORD.search(text)
    # Cyrillic, Greek or CJK words are runs of high bytes; Western words have single ones.
    if western and not _LETTER_RUN.search(text):
        is_other = coherent and best is not None and best.encoding in _OTHER_LATIN and str(best) != text
        return None if is_other else "cp1252"
    if not western and coherent and best is not None and best.encoding not in ("ascii", "utf_8"):
        return codecs.lookup(best.encoding).name
    return None


def utf8_blocks(path: str, encoding: str = "auto") -> Iterator[bytes]:
    """Yield the text of a file as UTF-8, in blocks of complete lines (except the last), without byte order mark.

    All line ends become `\\n`. Invalid bytes of a file that is mostly UTF-8 are not changed. A block is as long as the
    longest line if that is longer than `BLOCK_BYTES`.

    Args:
        path: path or URL.
        encoding: Python's name, or `auto`.

    Raises:
        DataError: if the file cannot be read or decoded.
    """
    name = resolve_encoding(path, encoding)
    is_utf8 = codecs.lookup(name).name in ("utf-8", "utf-8-sig")
    blocks = _raw_blocks(path) if is_utf8 else (text.encode() for text in _decoded_blocks(path, name))
    rest: list[bytes] = []  # parts of the unfinished line
    for block in _with_line_feeds(blocks):
        end = block.rfind(b"\n") + 1
        if end:
            yield b"".join([*rest, block[:end]])
            rest = []
        rest.append(block[end:])
    if last := b"".join(rest):
        yield last


def _with_line_feeds(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Remove the byte order mark and convert line ends to `\\n`; a lone carriage return is part of a text."""
    head = b""
    for block in blocks:
        head += block
        if b"\n" in head or len(head) >= _MAC_SAMPLE:
            break
    is_mac = b"\r" in head and b"\n" not in head
    returned = b""  # carriage returns at the end of a block; their line feed may start the next one
    for block in chain([head.removeprefix(codecs.BOM_UTF8)], blocks):
        if is_mac:
            yield block.replace(b"\r", b"\n")
            continue
        block, returned = returned + block, b""
        if block.endswith(b"\r"):
            returned = block[len(block.rstrip(b"\r")) :]
            block = block.rstrip(b"\r")
        while b"\r\n" in block:  # again for \r\r\n, which a conversion of line ends leaves if it is done twice
            block = block.replace(b"\r\n", b"\n")
        yield block


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
                "Set another one in the recipe, or leave it out.",
            ) from error


def text_blocks(path: str, encoding: str) -> Iterator[str]:
    """Yield the text of a file in blocks, without byte order mark.

    Raises:
        DataError: if the file cannot be read or decoded, at its first invalid byte.
    """
    blocks = _decoded_blocks(path, encoding)
    yield next(blocks, "").removeprefix("\ufeff")
    yield from blocks


def text_lines(path: str, encoding: str = "auto") -> Iterator[tuple[int, bytes]]:
    """Yield line number, from 1, and UTF-8 bytes of each line, without its end."""
    line_number = 0
    for block in utf8_blocks(path, encoding):
        for line in block.removesuffix(b"\n").split(b"\n"):
            line_number += 1
            yield line_number, line


def first_lines(path: str, encoding: str, count: int) -> list[bytes]:
    """Return the first `count` lines of a file."""
    return [line for _, line in islice(text_lines(path, encoding), count)]
