"""Folders that are committed as a whole or not at all, on any file system of fsspec.

    URL/NAME/FILE...        the files, flat
    URL/NAME/COMMIT.json    size and sha256 of each file (the marker); written last

Readers ignore a folder without its marker. So no file is renamed (an object store cannot), a writer that dies leaves
only uncommitted files that `sweep` removes, and every file is verified against the marker before it is read. What the
files contain is described in `format.py`. No function here is a collective.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, ValidationError, field_validator

from cllm4rec_dist.config import StrictModel
from cllm4rec_dist.config.loading import ModelT
from cllm4rec_dist.errors import CheckpointError, DamagedCheckpointError
from cllm4rec_dist.filesystems import as_os_errors, locate

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
COMMIT = "COMMIT.json"
DAMAGED = "DAMAGED.json"
"""New name of the marker of a damaged folder."""
USE_ANOTHER = "Use another checkpoint."
"""Cure for damage."""
_PLAIN_NAME = re.compile(r"\w[\w.-]*")


class FileEntry(StrictModel):
    """Size and digest of a committed file."""

    num_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Marker(StrictModel):
    """Contents of `COMMIT.json`."""

    schema_version: int = SCHEMA_VERSION
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if not _PLAIN_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a plain file name")
        return files


class Store:
    """Committed folders below a URL.

    Args:
        url: folder or fsspec URL, which need not exist yet.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = locate("checkpoint", self.url, CheckpointError)
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._fetched: dict[tuple[str, str], Path] = {}
        self._copies: tempfile.TemporaryDirectory[str] | None = None

    def path(self, name: str) -> str:
        """Return the URL of a folder, for messages."""
        return f"{self.url}/{name}"

    def names(self, prefix: str) -> list[str]:
        """Return the names of committed folders that start with `prefix`, sorted."""
        return [name for name in self._folders() if name.startswith(prefix) and self.is_committed(name)]

    def is_committed(self, name: str) -> bool:
        """Return True if a folder has its marker."""
        with self._fresh_listing():
            return self._info(f"{name}/{COMMIT}") is not None

    def _folders(self) -> list[str]:
        with self._fresh_listing():
            if self._info("") is None:
                return []
            entries = self._fs.ls(self._root, detail=True)
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory")

    def write(self, name: str, file: str, write: Callable[[Path], object]) -> FileEntry:
        """Create a file of a folder with `write`, which takes a local path. Return its size and digest.

        Raises:
            Exception: whatever the file system raises; the folder is then not committed.
        """
        if self._is_local:
            path = Path(self._root) / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            return _write_through(path, write)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file
            entry = _write_through(path, write)
            self._fs.makedirs(f"{self._root}/{name}", exist_ok=True)
            self._fs.put_file(str(path), f"{self._root}/{name}/{file}")
        return entry

    def unseen(self, name: str, files: dict[str, FileEntry]) -> list[str]:
        """Return those of `files` that this host does not see, or sees with another size."""
        with self._fresh_listing():
            infos = {file: self._info(f"{name}/{file}") or {"size": None} for file in files}
        return [file for file, info in infos.items() if info["size"] != files[file].num_bytes]

    def commit(self, name: str, files: dict[str, FileEntry]) -> FileEntry:
        """Write the marker, which makes the folder visible to readers. Return its size and digest."""
        content = Marker(files=files).model_dump_json(indent=1).encode()
        entry = _entry_of(content)
        if not self._is_local:
            self._fs.pipe_file(f"{self._root}/{name}/{COMMIT}", content)
            return entry
        folder = Path(self._root) / name
        part = folder / f".{COMMIT}.part"
        _write_through(part, lambda path: path.write_bytes(content))
        part.replace(folder / COMMIT)
        for changed in (folder, folder.parent):
            _sync(changed)
        return entry

    def remove(self, name: str) -> None:
        """Remove a folder, its marker first, so that a part of it never looks committed."""
        if self.is_committed(name):
            self._fs.rm_file(f"{self._root}/{name}/{COMMIT}")
        if self._info(name) is not None:
            self._fs.rm(f"{self._root}/{name}", recursive=True)

    def sweep(self, prefixes: tuple[str, ...]) -> None:
        """Remove uncommitted folders of writers that died. Quarantined folders stay for inspection."""
        for name in self._folders():
            if name.startswith(prefixes) and not self.is_committed(name) and not self._is_quarantined(name):
                logger.warning("removing %s, which was never finished", self.path(name))
                self.remove(name)

    def quarantined_names(self, prefix: str) -> list[str]:
        """Return the names of quarantined folders that start with `prefix`, sorted."""
        return [name for name in self._folders() if name.startswith(prefix) and self._is_quarantined(name)]

    def _is_quarantined(self, name: str) -> bool:
        with self._fresh_listing():
            return self._info(f"{name}/{DAMAGED}") is not None

    def _info(self, path: str) -> dict[str, Any] | None:
        """Return fsspec's info of a path below the root; None if nothing is there.

        Not `isfile` or `isdir`: they return False if the store does not answer, and `sweep` would remove the folder.
        """
        try:
            return dict(self._fs.info(f"{self._root}/{path}".rstrip("/")))
        except FileNotFoundError:
            return None

    @contextmanager
    def _fresh_listing(self) -> Iterator[None]:
        """Drop cached listings; inside, an OSError of the file system becomes a CheckpointError."""
        self._fs.invalidate_cache()
        try:
            with as_os_errors():
                yield
        except OSError as error:
            raise _unreadable(self.url, error) from error

    def modified(self, name: str) -> datetime | None:
        """Return when a folder was committed, in UTC; None if the file system does not record it."""
        try:
            with self._fresh_listing():
                time: datetime = self._fs.modified(f"{self._root}/{name}/{COMMIT}")
        except (CheckpointError, NotImplementedError):
            return None
        return time.astimezone(UTC)

    def quarantine(self, name: str) -> None:
        """Mark a folder as damaged: it is no longer committed, but not removed."""
        self._fs.mv(f"{self._root}/{name}/{COMMIT}", f"{self._root}/{name}/{DAMAGED}")

    def marker(self, name: str, expected: FileEntry | None = None) -> Marker:
        """Read the marker of a folder.

        Args:
            expected: what `commit` returned; any other marker is damage.

        Raises:
            DamagedCheckpointError: if it is missing or malformed, or another one than expected.
            CheckpointError: for another schema version, or if the store cannot be read.
        """
        origin = f"{self.path(name)}/{COMMIT}"
        try:
            with as_os_errors():
                content = self._fs.cat_file(f"{self._root}/{name}/{COMMIT}")
        except FileNotFoundError as error:
            raise DamagedCheckpointError(origin, "missing", "is not there", USE_ANOTHER) from error
        except OSError as error:
            raise _unreadable(origin, error) from error
        if expected is not None:
            _require_entry(origin, _entry_of(content), expected)
        return parse(Marker, content, origin)

    def fetch(self, name: str, file: str, entry: FileEntry) -> Path:
        """Return the local path of a file after verifying its digest, once; copies it first from a remote store.

        Raises:
            DamagedCheckpointError: if it is missing or has changed.
            CheckpointError: if the store cannot be read.
        """
        if (name, file) not in self._fetched:
            self._fetched[name, file] = self._verified(name, file, entry)
        return self._fetched[name, file]

    def _verified(self, name: str, file: str, entry: FileEntry) -> Path:
        origin = f"{self.path(name)}/{file}"
        path = Path(self._root) / name / file
        try:
            if not self._is_local:
                self._copies = self._copies or tempfile.TemporaryDirectory()
                path = Path(self._copies.name) / f"{name}-{file}"
                with as_os_errors():
                    self._fs.get_file(f"{self._root}/{name}/{file}", str(path))
            actual = FileEntry(num_bytes=path.stat().st_size, sha256=_sha256(path))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise DamagedCheckpointError(origin, "missing", "was committed but is not there", USE_ANOTHER) from error
        except OSError as error:
            raise _unreadable(origin, error) from error
        _require_entry(origin, actual, entry)
        return path


def parse(model: type[ModelT], content: bytes, origin: str) -> ModelT:
    """Validate a JSON file of a committed folder. Checks the version first, because a newer file may have new fields.

    Raises:
        CheckpointError: for another schema version.
        DamagedCheckpointError: for any other invalid content.
    """
    try:
        version = _Versioned.model_validate_json(content).schema_version
    except ValidationError as error:
        raise DamagedCheckpointError(origin, _first(error), "is not readable", USE_ANOTHER) from None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{origin}: schema_version",
            version,
            f"is not {SCHEMA_VERSION}, which this cllm4rec_dist reads",
            "Use the version of cllm4rec_dist that wrote the checkpoint.",
        )
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise DamagedCheckpointError(origin, _first(error), "is not readable", USE_ANOTHER) from None


class _Versioned(StrictModel, extra="ignore"):
    schema_version: int


def _require_entry(origin: str, actual: FileEntry, entry: FileEntry) -> None:
    if actual != entry:
        what = f"{actual.num_bytes} bytes" if actual.num_bytes != entry.num_bytes else f"sha256 {actual.sha256}"
        raise DamagedCheckpointError(origin, what, f"is not what was committed ({entry})", USE_ANOTHER)


def _entry_of(content: bytes) -> FileEntry:
    return FileEntry(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"


def _unreadable(origin: str, error: OSError) -> CheckpointError:
    return CheckpointError(origin, str(error), "cannot be read", "Repair the storage and start again; nothing is lost.")


def _write_through(path: Path, write: Callable[[Path], object]) -> FileEntry:
    write(path)
    _sync(path)
    return FileEntry(num_bytes=path.stat().st_size, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
