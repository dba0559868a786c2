"""Find raw files and open them, with decompression.

A path is a file, a pattern (`orders-*.csv`), a folder of parts as Spark and Hive write them, or a list of these, on any
fsspec file system. A file's first bytes, not its name, determine the compression. Every failure to read a file is a
`DataError` with its path.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import logging
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

import fsspec
import pyarrow as pa

from cllm4rec_dist.corpus.skips import base_name
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.filesystems import as_os_errors, locate
from cllm4rec_dist.suggestions import plural

logger = logging.getLogger(__name__)

_PATTERN = "*?["
_UNPACK = "Unpack it and give the file or the folder."
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, pa.ArrowInvalid, ValueError)
_BINARIES = {
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
    b"ARROW1": "an Arrow (Feather) file",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "an SQLite database",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x1f\x9d": "a compress (.Z) file",
}
_DOCUMENTS = {
    b"%pdf-": "a PDF document",
    b"<?xml": "an XML file",
    b"<!doctype html": "an HTML page, perhaps of a login,",
    b"<html": "an HTML page, perhaps of a login,",
}
"""First letters of documents, lower case."""
_LAST_CONTROL = 8
"""Largest of the control characters that no text has."""
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_HEAD = 262
"""First bytes that identify every kind of file: the mark of a tar archive is at 257."""
PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True)
class RawFile:
    """One raw file.

    Attributes:
        path: path or URL, for opening it and for messages.
        partition: columns in the names of its folders, as in `country=de/part-0.csv`; None for Hive's null.
    """

    path: str
    partition: dict[str, str | None] = field(default_factory=dict)


def find_files(paths: Sequence[str]) -> list[RawFile]:
    """Return the files of paths, patterns and folders without duplicates, sorted by name in a pattern or folder.

    In a folder, empty files and those whose names start with `_` or `.` (Spark's `_SUCCESS`) are ignored. Warns if the
    compression of a file does not match its suffix.

    Raises:
        DataError: for a path without files.
    """
    files: dict[tuple[str, str], RawFile] = {}
    for file in (file for path in paths for file in _find(path)):
        fs, fs_path = locate("file", file.path, DataError)
        key = str(fs.protocol), fs_path
        if key in files:
            logger.warning("%s is named more than once in the recipe and is read once", file.path)
        else:
            _check_suffix(file.path)
            files[key] = file
    return list(files.values())


def _find(path: str) -> list[RawFile]:
    fs, fs_path = locate("file", path, DataError)
    try:
        with as_os_errors():
            if fs.isfile(fs_path):
                return [RawFile(path)]
            is_folder = fs.isdir(fs_path)
            is_pattern = not is_folder and any(letter in fs_path for letter in _PATTERN)
            if is_pattern:
                names = sorted(str(name) for name in fs.glob(fs_path))
                roots = [name for name in names if fs.isdir(name)]
                files = [
                    RawFile(_full_path(fs, name), _partition(_matched(fs_path, name)[:-1]))
                    for name in names
                    if name not in roots and _is_part(fs, name)
                ]
            else:
                roots, files = ([fs_path] if is_folder else []), []
            for root in roots:
                above = _partition(_matched(fs_path, root)) if is_pattern else {}
                files += [replace(file, partition=above | file.partition) for file in _parts(fs, root)]
            exists = bool(files or roots or is_pattern or fs.exists(fs_path))
    except OSError as error:
        raise DataError("file", path, f"cannot be reached ({error})", "Fix the path or its credentials.") from error
    if files:
        return files
    if roots:
        raise DataError("file", path, "is a folder without files to read", "Give the folder of the parts.")
    if exists and not is_pattern:
        raise DataError("file", path, "is neither a file nor a folder, but perhaps a pipe", "Write it to a file first.")
    constraint = "matches no file" if is_pattern else "does not exist"
    raise DataError("file", path, constraint, "Fix the path in the recipe, or download the data.")


def _parts(fs: fsspec.AbstractFileSystem, root: str) -> list[RawFile]:
    files = []
    for name in sorted(str(name) for name in fs.find(root)):
        inner = name.removeprefix(root).strip("/").split("/")
        if not any(part.startswith(("_", ".")) for part in inner) and _is_part(fs, name):
            files.append(RawFile(_full_path(fs, name), _partition(inner[:-1])))
    return files


def _partition(folders: Sequence[str]) -> dict[str, str | None]:
    """Return the columns in the names of folders, such as `country=de`."""
    pairs = (folder.split("=", 1) for folder in folders if "=" in folder)
    return {unquote(key): None if value == _HIVE_NULL else unquote(value) for key, value in pairs}


def _matched(pattern: str, name: str) -> list[str]:
    """Return the parts of a name from the first one that the pattern leaves open."""
    parts = pattern.split("/")
    first = next(index for index, part in enumerate(parts) if any(letter in part for letter in _PATTERN))
    return name.split("/")[first:]


def _is_part(fs: fsspec.AbstractFileSystem, name: str) -> bool:
    return fs.info(name)["size"] != 0


def _full_path(fs: fsspec.AbstractFileSystem, name: str) -> str:
    return name if "file" in fs.protocol or fs.protocol == "file" else fs.unstrip_protocol(name)


@contextmanager
def open_binary(path: str) -> Iterator[BinaryIO]:
    """Open a path or URL and decompress it according to its first bytes (gz, bz2, xz, zst, a zip of one file).

    Raises:
        DataError: if the file is missing, damaged, or of an unsupported kind.
    """
    fs, fs_path = locate("file", path, DataError)
    with ExitStack() as stack:
        try:
            with as_os_errors():
                file = stack.enter_context(fs.open(fs_path, "rb"))
            content = _decompressed(path, cast(BinaryIO, file), stack)
            yield content
        except FileNotFoundError as error:
            raise DataError(
                "file", path, "does not exist", "Fix the path in the recipe, or download the data."
            ) from error
        except _Unreadable as error:
            raise DataError("file", path, *error.args) from error
        except _DAMAGE as error:
            if isinstance(error, UnicodeError):
                raise
            reason = f"cannot be read ({error or type(error).__name__})"
            raise DataError("file", path, reason, "Download the file again.") from error


def _check_suffix(path: str) -> None:
    fs, fs_path = locate("file", path, DataError)
    with suppress(OSError), as_os_errors(), fs.open(fs_path, "rb") as file:
        magic = file.read(16)
        kind, expected = (
            _compression(magic),
            next((kind for kind in _OPENERS if path.lower().endswith(f".{kind}")), None),
        )
        if magic and kind != expected:
            logger.warning("%s: its first bytes mean %s, so it is read that way", path, kind or "no compression")


def _compression(magic: bytes) -> str | None:
    return next((kind for kind, (marks, _) in _OPENERS.items() if magic.startswith(marks)), None)


def _decompressed(path: str, file: BinaryIO, stack: ExitStack) -> BinaryIO:
    kind = _compression(file.read(16))
    file.seek(0)
    content = file if kind is None else stack.enter_context(_OPENERS[kind][1](file))
    head = read_exactly(content, _HEAD)
    content.seek(0)
    if head[257:] == b"ustar":
        raise DataError("file", path, "is a tar archive", "Unpack it and give its file or folder.")
    what = _unsupported_kind(head)
    if what is not None:
        raise DataError("file", path, f"is {what} that cannot be read", "Save it as CSV, JSON lines or Parquet.")
    return cast(BinaryIO, content)


def _unsupported_kind(head: bytes) -> str | None:
    """Return what a file of an unsupported kind is, by its first bytes; None for any other file."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    is_binary = min(head, default=0) <= _LAST_CONTROL
    for prefix, what in _DOCUMENTS.items():
        if text.startswith(prefix):
            return what
    for prefix, what in _BINARIES.items():
        if head.startswith(prefix) and (is_binary or not prefix.isalnum()):  # a header may begin with ORC
            return what
    return None


def _unzip(file: BinaryIO) -> BinaryIO:
    archive = zipfile.ZipFile(file)
    members = [info for info in archive.infolist() if not info.is_dir() and base_name(info.filename)[:1] not in "_."]
    if any(info.filename == "xl/workbook.xml" for info in members):
        raise _Unreadable("is an Excel workbook", "Save its sheet as CSV.")
    if any(info.filename == "content.xml" for info in members):
        raise _Unreadable("is an OpenDocument file", "Save its sheet as CSV.")
    if len(members) != 1:
        raise _Unreadable(f"is a zip archive of {plural(len(members), 'file')}", _UNPACK)
    try:
        return cast(BinaryIO, archive.open(members[0]))
    except RuntimeError as error:  # encrypted, or a kind of compression that Python cannot read
        raise _Unreadable(f"is a zip archive that cannot be unpacked here ({error})", _UNPACK) from None


class _Unreadable(Exception):
    """A file that another download does not mend; the arguments are why, and the cure."""


class _Zstandard(io.RawIOBase):
    """A zstandard stream that can seek to its start, unlike pyarrow's."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._streams = [self._start()]

    def _start(self) -> pa.CompressedInputStream:
        return pa.CompressedInputStream(pa.PythonFile(self._file, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._streams[-1].read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        if (offset, whence) != (0, 0):
            raise io.UnsupportedOperation("can only seek to the start")
        self._file.seek(0)
        self._streams.append(self._start())  # keep the old one: its destructor closes the file
        return 0


def _open_zstandard(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, _Zstandard(file))


_OPENERS: dict[str, tuple[tuple[bytes, ...], Callable[[BinaryIO], Any]]] = {
    "gz": ((b"\x1f\x8b",), lambda file: gzip.GzipFile(fileobj=file)),
    "bz2": ((b"BZh",), bz2.BZ2File),
    "xz": ((b"\xfd7zXZ\x00",), lzma.LZMAFile),
    "zst": ((b"\x28\xb5\x2f\xfd", *(bytes([low]) + b"\x2a\x4d\x18" for low in range(0x50, 0x60))), _open_zstandard),
    "zip": ((b"PK\x03\x04", b"PK\x05\x06"), _unzip),
}
"""First bytes of each kind of compression, and its opener. A zstandard file may begin with a frame to skip."""


def first_bytes(path: str, count: int = 1 << 16) -> bytes:
    """Return the first bytes of a file, decompressed."""
    with open_binary(path) as file:
        return read_exactly(file, count)


def read_exactly(file: BinaryIO, count: int) -> bytes:
    """Read `count` bytes, or all that are left; a single read of a stream may return fewer."""
    parts: list[bytes] = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def exists(path: str) -> bool:
    """True if the file exists.

    Raises:
        DataError: if its file system cannot be reached.
    """
    fs, fs_path = locate("file", path, DataError)
    try:
        with as_os_errors():
            return bool(fs.isfile(fs_path))
    except OSError as error:
        raise DataError("file", path, f"cannot be reached ({error})", "Fix the path or its credentials.") from error
