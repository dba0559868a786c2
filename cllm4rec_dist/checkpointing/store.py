"""Folders of files that exist as a whole or not at all, on any file system that fsspec knows.

    URL/NAME/FILE...        the files, flat
    URL/NAME/COMMIT.json    size and sha256 of each; written last

To a reader a folder without its marker is not there. So nothing is renamed (an object store cannot), a writer that dies
leaves only leftovers that `sweep` removes, and what is read is first held against the marker. What the files mean is
left to `checkpoint.py`. No function here is a collective.
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
"""What becomes of the marker of a folder that was found damaged."""
_PLAIN_NAME = re.compile(r"\w[\w.-]*")


class FileEntry(StrictModel):
    """What a committed file must be."""

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
        url: folder or fsspec URL; need not exist yet.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = locate("checkpoint", self.url, CheckpointError)
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._fetched: dict[tuple[str, str], Path] = {}
        self._copies: tempfile.TemporaryDirectory[str] | None = None

    def path(self, name: str) -> str:
        """The URL of a folder, for people."""
        return f"{self.url}/{name}"

    def names(self, prefix: str) -> list[str]:
        """Committed folders whose names start with `prefix`, sorted."""
        return [name for name in self._folders() if name.startswith(prefix) and self.is_committed(name)]

    def is_committed(self, name: str) -> bool:
        """Whether a folder is there as a whole."""
        with self._asking():
            return self._info(f"{name}/{COMMIT}") is not None

    def _folders(self) -> list[str]:
        with self._asking():
            if self._info("") is None:
                return []
            found = self._fs.ls(self._root, detail=True)
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in found if entry["type"] == "directory")

    def write(self, name: str, file: str, write: Callable[[Path], object]) -> FileEntry:
        """Have `write` make a file at a local path, bring it to its folder, and say what it is.

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
        """Those of `files` that are not there in their size, as seen from this host."""
        with self._asking():
            found = {file: self._info(f"{name}/{file}") or {"size": None} for file in files}
        return [file for file, info in found.items() if info["size"] != files[file].num_bytes]

    def commit(self, name: str, files: dict[str, FileEntry]) -> None:
        """Write the marker: from now on the folder is there."""
        content = Marker(files=files).model_dump_json(indent=1).encode()
        if not self._is_local:
            self._fs.pipe_file(f"{self._root}/{name}/{COMMIT}", content)
            return
        folder = Path(self._root) / name
        part = folder / f".{COMMIT}.part"
        _write_through(part, lambda path: path.write_bytes(content))
        part.replace(folder / COMMIT)
        for changed in (folder, folder.parent):
            _sync(changed)

    def remove(self, name: str) -> None:
        """Remove a folder; its marker first, so that it never looks whole."""
        if self.is_committed(name):
            self._fs.rm_file(f"{self._root}/{name}/{COMMIT}")
        if self._info(name) is not None:
            self._fs.rm(f"{self._root}/{name}", recursive=True)

    def sweep(self, prefixes: tuple[str, ...]) -> None:
        """Remove what writers that died have left; folders that were set aside stay for a look."""
        for name in self._folders():
            if name.startswith(prefixes) and not self.is_committed(name) and not self._is_set_aside(name):
                logger.warning("removing %s, which was never finished", self.path(name))
                self.remove(name)

    def set_aside_names(self, prefix: str) -> list[str]:
        """Damaged folders, sorted."""
        return [name for name in self._folders() if name.startswith(prefix) and self._is_set_aside(name)]

    def _is_set_aside(self, name: str) -> bool:
        with self._asking():
            return self._info(f"{name}/{DAMAGED}") is not None

    def _info(self, path: str) -> dict[str, Any] | None:
        """What is at a path below the root; None for nothing.

        Not `isfile` and `isdir`: to them a store that does not answer has no files, and what is not there is swept.
        """
        try:
            return dict(self._fs.info(f"{self._root}/{path}".rstrip("/")))
        except FileNotFoundError:
            return None

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Inside, the file system is asked anew what there is; CheckpointError where it does not answer."""
        self._fs.invalidate_cache()
        try:
            with as_os_errors():
                yield
        except OSError as error:
            raise _unreadable(self.url, error) from error

    def modified(self, name: str) -> datetime | None:
        """When a folder was committed, in UTC; None where the file system does not say."""
        try:
            with self._asking():
                found: datetime = self._fs.modified(f"{self._root}/{name}/{COMMIT}")
        except (CheckpointError, NotImplementedError):
            return None
        return found.astimezone(UTC)

    def quarantine(self, name: str) -> None:
        """Take a damaged folder out of the committed ones, without losing it."""
        self._fs.mv(f"{self._root}/{name}/{COMMIT}", f"{self._root}/{name}/{DAMAGED}")

    def marker(self, name: str) -> Marker:
        """The marker of a folder.

        Raises:
            DamagedCheckpointError: where it cannot be understood.
            CheckpointError: for another schema version.
        """
        origin = f"{self.path(name)}/{COMMIT}"
        try:
            with as_os_errors():
                content = self._fs.cat_file(f"{self._root}/{name}/{COMMIT}")
        except FileNotFoundError as error:
            raise DamagedCheckpointError(origin, "missing", "is not there", "Use another checkpoint.") from error
        except OSError as error:
            raise _unreadable(origin, error) from error
        return parse(Marker, content, origin)

    def fetch(self, name: str, file: str, entry: FileEntry) -> Path:
        """A local path of a file that is what was committed; hashes it once, copies it first from a remote store.

        Raises:
            DamagedCheckpointError: where it is missing or has changed.
            CheckpointError: where the store cannot be read.
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
            found = FileEntry(num_bytes=path.stat().st_size, sha256=_sha256(path))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise DamagedCheckpointError(origin, "missing", "was committed but is not there", _OTHER) from error
        except OSError as error:
            raise _unreadable(origin, error) from error
        if found != entry:
            what = f"{found.num_bytes} bytes" if found.num_bytes != entry.num_bytes else f"sha256 {found.sha256}"
            raise DamagedCheckpointError(origin, what, f"is not what was committed ({entry})", _OTHER)
        return path


_OTHER = "Use another checkpoint."


def parse(model: type[ModelT], content: bytes, origin: str) -> ModelT:
    """A JSON file of a committed folder, validated. The version is looked at first: a newer file may have new fields.

    Raises:
        CheckpointError: for another schema version.
        DamagedCheckpointError: for anything else that is wrong.
    """
    try:
        version = _Versioned.model_validate_json(content).schema_version
    except ValidationError as error:
        raise DamagedCheckpointError(origin, _first(error), "is not readable", _OTHER) from None
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
        raise DamagedCheckpointError(origin, _first(error), "is not readable", _OTHER) from None


class _Versioned(StrictModel, extra="ignore"):
    schema_version: int


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    return f"{'.'.join(map(str, found['loc'])) or 'content'}: {found['msg']}"


def _unreadable(origin: str, error: OSError) -> CheckpointError:
    return CheckpointError(origin, str(error), "cannot be read", "Mend the storage and start again; nothing is lost.")


def _write_through(path: Path, write: Callable[[Path], object]) -> FileEntry:
    write(path)
    _sync(path)
    return FileEntry(num_bytes=path.stat().st_size, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the file system keep a file or folder even if the power fails now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
