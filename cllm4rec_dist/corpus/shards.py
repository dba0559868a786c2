"""A corpus on disk: open it, check it and read records at random.

A corpus is a folder or any fsspec URL:

    manifest.json            counts, settings, size and sha256 of every file (`manifest.py`)
    users.parquet            row, user, text
    items.parquet            row, item, title, description; category, if the recipe names one
    new_users.parquet        user, and lists of item rows: history, valid, test; if whole users are held out
    interactions/*.tar       users and their items, by split
    content/*.tar            texts as word ids

Shards are WebDataset tars, readable with plain `webdataset`; a record packs many examples as ragged .npy arrays, which
is about fifty times faster than one example per record. Random reads use a byte index of each tar, made from its
headers on first use. File systems other than the local one are read through fsspec's `simplecache`. Nothing is ever
unpickled or extracted.

    interactions record      users.npy int64 [n]; for each split: {split}_offsets.npy int64 [n+1],
                             {split}_items.npy int32
    content record           kind.npy uint8 [n], users.npy int64 [n], items.npy int64 [n] (0 where the kind has none),
                             offsets.npy int64 [n+1], tokens.npy int32

`writer.py` builds a corpus; `stream.py` orders the examples.

Legend: R records, n examples of a record.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Collection, Sequence
from typing import Literal, Self

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from cllm4rec_dist.corpus.manifest import NEW_USER_SPLITS, SPLITS, ContentKind, FileEntry, Manifest, load_manifest
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.writer import write_corpus
from cllm4rec_dist.errors import CorpusError
from cllm4rec_dist.filesystems import as_os_errors, locate

__all__ = ["NEW_USER_SPLITS", "SPLITS", "ContentKind", "Corpus", "Manifest", "ShardSet", "write_corpus"]


_MEMBER = re.compile(r"(\d+)\.(\w+)\.npy")
_REBUILD = "Copy the corpus again, or build it again with `cllm4rec prepare`."
_Span = tuple[int, int]
_LAYOUT: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "interactions": (("users",), {f"{split}_offsets": f"{split}_items" for split in SPLITS}),
    "content": (("users", "items", "kind"), {"offsets": "tokens"}),
}
"""Arrays of each kind of record: those with a value per example, and offsets arrays with the values they split."""


class ShardSet:
    """All records of one kind of shards, numbered through these shards.

    Attributes:
        record_sizes: int64 [R] examples of each record.
        num_examples: examples of all records.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, root: str, entries: Sequence[FileEntry]) -> None:
        self._fs, self._root, self._entries = fs, root, entries
        self._ends = np.cumsum([len(entry.record_sizes) for entry in entries], dtype=np.int64)
        self._indexes: dict[int, list[dict[str, _Span]]] = {}
        self.record_sizes = np.array([n for entry in entries for n in entry.record_sizes], dtype=np.int64)
        self.num_examples = int(self.record_sizes.sum())

    def __len__(self) -> int:
        """R."""
        return len(self.record_sizes)

    def read_record(self, index: int, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """Read the arrays of a record by name (`users`, `train_offsets`, ...); `names` selects some of them.

        Safe to call from several threads and after a fork: no file stays open.

        Raises:
            CorpusError: if the shard is missing or damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        path = f"{self._root}/{self._entries[shard].path}"
        if shard not in self._indexes:
            self._indexes[shard] = self._scan(path, len(self._entries[shard].record_sizes))
        spans = self._indexes[shard][index - int(self._ends[shard])]
        try:
            with as_os_errors(), self._fs.open(path, "rb") as file:
                selected = spans if names is None else {name: spans[name] for name in names if name in spans}
                arrays = {name: _read_array(file, span) for name, span in selected.items()}
        except OSError as error:
            raise CorpusError(f"{path} record {index}", str(error), "cannot be read", _REBUILD) from error
        self._check(arrays, index, path, self._entries[shard].kind, names)
        return arrays

    def _scan(self, path: str, num_records: int) -> list[dict[str, _Span]]:
        """Return the byte spans of each record's arrays in a tar, from its headers alone."""
        records: dict[str, dict[str, _Span]] = {}
        try:
            with as_os_errors(), self._fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    match = _MEMBER.fullmatch(member.name)
                    if match is None or not member.isreg():
                        raise CorpusError(path, member.name, "is not a member that a corpus may hold", _REBUILD)
                    records.setdefault(match[1], {})[match[2]] = member.offset_data, member.size
        except OSError as error:
            raise CorpusError(path, str(error), "is not a whole tar file", _REBUILD) from error
        if len(records) != num_records:
            raise CorpusError(path, len(records), f"records, but the manifest says {num_records}", _REBUILD)
        return list(records.values())

    def _check(
        self, arrays: dict[str, np.ndarray], index: int, path: str, kind: str, names: Collection[str] | None
    ) -> None:
        expected = int(self.record_sizes[index])
        where = f"{path} record {index}"
        columns, lists = _LAYOUT[kind]
        if names is not None:
            columns = tuple(name for name in columns if name in names)
            lists = {offsets: values for offsets, values in lists.items() if offsets in names}
        if "users" in columns and len(arrays.get("users", ())) != expected:
            num_examples = len(arrays.get("users", ()))
            raise CorpusError(where, num_examples, f"examples, but the manifest says {expected}", _REBUILD)
        missing = {*columns, *lists, *lists.values()} - arrays.keys()
        if missing:
            raise CorpusError(where, sorted(missing), "are missing", _REBUILD)
        for name, array in arrays.items():
            if array.ndim != 1 or array.dtype.kind not in "iu":
                shape = f"{array.dtype} {list(array.shape)}"
                raise CorpusError(f"{where} {name}", shape, "is not a list of whole numbers", _REBUILD)
        for name in columns:
            if len(arrays[name]) != expected:
                raise CorpusError(f"{where} {name}", len(arrays[name]), f"values, not {expected}", _REBUILD)
        for name, values in lists.items():
            offsets = arrays[name].astype(np.int64)
            ends = len(offsets) == expected + 1 and (offsets[0], offsets[-1]) == (0, len(arrays[values]))
            if not ends or (np.diff(offsets) < 0).any():
                raise CorpusError(f"{where} {name}", offsets, f"do not cut {values} into {expected} lists", _REBUILD)


def _read_array(file: io.BufferedIOBase, span: _Span) -> np.ndarray:
    start, size = span
    file.seek(start)
    # np.load would also open zip archives; a record holds plain arrays only.
    return np.lib.format.read_array(io.BytesIO(file.read(size)), allow_pickle=False)


class Corpus:
    """An opened corpus.

    Attributes:
        url: folder or fsspec URL.
        manifest: contents of `manifest.json`.
        fingerprint: sha256 of the manifest, which contains those of all files; identifies the corpus.
        interactions: records of users and their items.
        content: records of texts; without records if the corpus has no texts.
    """

    def __init__(
        self, url: str, fs: fsspec.AbstractFileSystem, root: str, manifest: Manifest, fingerprint: str
    ) -> None:
        self.url, self._fs, self._root = url, fs, root
        self.manifest, self.fingerprint = manifest, fingerprint
        self.interactions = ShardSet(fs, root, manifest.of_kind("interactions"))
        self.content = ShardSet(fs, root, manifest.of_kind("content"))
        self._training_counts: np.ndarray | None = None

    @classmethod
    def open(cls, url: str, *, verify: bool | Collection[str] = True) -> Self:
        """Open and check a corpus.

        Args:
            url: folder or fsspec URL.
            verify: True to hash every file (reads the whole corpus), or the kinds of files to hash (`users`, `items`,
                `interactions`, `content`). For other files only presence and size are checked.

        Raises:
            CorpusError: if the corpus is absent, incomplete, damaged or of another schema version.
        """
        source, root = locate("corpus", url, CorpusError)
        # Sizes come from the source: the cache would download a file to get its size.
        fs = source if isinstance(source, LocalFileSystem) else fsspec.filesystem("simplecache", fs=source)
        manifest, fingerprint = load_manifest(url)
        for entry in manifest.files:
            _check_size(source, f"{root}/{entry.path}", entry)
            if verify if isinstance(verify, bool) else entry.kind in verify:
                _check_hash(fs, f"{root}/{entry.path}", entry)
        return cls(str(url), fs, root, manifest, fingerprint)

    @property
    def num_users(self) -> int:
        """Number of users."""
        return self.manifest.num_users

    @property
    def num_items(self) -> int:
        """Number of items."""
        return self.manifest.num_items

    def users(self) -> pa.Table:
        """Read columns row int64, user string (external id) and text string, sorted by row."""
        return self._table("users", self.num_users)

    def items(self) -> pa.Table:
        """Read columns row int64, item string (external id), title string and description string, sorted by row.

        A column category string follows if the recipe names one.
        """
        return self._table("items", self.num_items)

    def ids(self, kind: Literal["users", "items"]) -> pa.Table:
        """Read the external ids alone, by row: a table of one column, user or item."""
        size = self.num_users if kind == "users" else self.num_items
        return self._table(kind, size, [kind.removesuffix("s")])

    def _table(self, kind: str, num_rows: int, columns: list[str] | None = None) -> pa.Table:
        (entry,) = self.manifest.of_kind(kind)
        path = f"{self._root}/{entry.path}"
        try:
            with as_os_errors(), self._fs.open(path, "rb") as file:
                table = pq.read_table(file if columns else pa.BufferReader(file.read()), columns=columns)
        except OSError as error:
            raise CorpusError(path, str(error), "cannot be read", _REBUILD) from error
        if table.num_rows != num_rows:
            raise CorpusError(path, table.num_rows, f"rows, but the manifest says {num_rows}", _REBUILD)
        return table

    def split(self, name: str, users: np.ndarray | None = None) -> Ragged:
        """Read the items of each user, by user row, or of some users: lists of int32 item rows in stored (time) order.

        Args:
            name: train, valid or test.
            users: int64 rows of users, in any order; None for all U.
        """
        return self.splits((name,), users)[0]

    def splits(self, names: Sequence[str], users: np.ndarray | None = None) -> list[Ragged]:
        """Like `split` for several splits. Reads each record that has one of the users once, and only these splits.

        Keeps the lists of these users alone in memory, beside one record.
        """
        assert set(names) <= set(SPLITS), names
        arrays = [array for name in names for array in (f"{name}_offsets", f"{name}_items")]
        sizes = self.interactions.record_sizes
        ends = np.cumsum(sizes)
        of_user = np.searchsorted(ends, users, side="right") if users is not None else np.empty(0, np.int64)
        order = np.argsort(of_user, kind="stable")
        indexes = np.arange(len(sizes)) if users is None else np.unique(of_user)
        bounds = np.searchsorted(of_user[order], indexes), np.searchsorted(of_user[order], indexes, side="right")
        parts: list[list[Ragged]] = [[] for _ in names]
        for index, low, high in zip(indexes.tolist(), *bounds, strict=True):
            record = self.interactions.read_record(index, arrays)
            for name, lists in zip(names, parts, strict=True):
                part = Ragged(record[f"{name}_offsets"], record[f"{name}_items"])
                if users is not None:
                    part = part.take(users[order[low:high]] - (ends - sizes)[index])
                lists.append(part)
        if not len(indexes):
            return [Ragged.from_lists([]) for _ in names]
        if users is None:
            return [Ragged.concat(lists) for lists in parts]
        return [Ragged.concat(lists).take(np.argsort(order, kind="stable")) for lists in parts]

    def history(self, users: np.ndarray | None = None) -> Ragged:
        """Read all items of each user, including held-out ones: U lists of int32 item rows.

        Training items come first, then validation, then test, each in stored order. With a split of the last items this
        is the order of time; with a random split only each part is in that order.

        Args:
            users: as of `split`.
        """
        return Ragged.hstack(self.splits(SPLITS, users))

    def training_counts(self) -> np.ndarray:
        """Number of training interactions of each item, int64 [I]. Read once, because it is small."""
        if self._training_counts is None:
            self._training_counts = np.bincount(self.split("train").values, minlength=self.num_items)
        return self._training_counts

    def new_users(self) -> pa.Table:
        """Read the users who are held out whole: column user string (external id), sorted."""
        return self._new_users().select(["user"])

    def new_user_split(self, name: str) -> Ragged:
        """Read the items of each user who is held out whole, as `new_users` orders them: int32 item rows in time order.

        Args:
            name: history (input of predictions), valid or test (held out).
        """
        return self.new_user_splits((name,))[0]

    def new_user_splits(self, names: Sequence[str]) -> list[Ragged]:
        """Like `new_user_split` for several splits, read once."""
        assert set(names) <= set(NEW_USER_SPLITS), names
        table = self._new_users()
        columns = [table[name].combine_chunks() for name in names]
        lengths = [pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64) for lists in columns]
        return [
            Ragged.from_lengths(length, lists.flatten().to_numpy(zero_copy_only=False))
            for length, lists in zip(lengths, columns, strict=True)
        ]

    def new_user_history(self) -> Ragged:
        """Read all items of each user who is held out whole, in the order of `history`."""
        return Ragged.hstack(self.new_user_splits(NEW_USER_SPLITS))

    def _new_users(self) -> pa.Table:
        lists = dict.fromkeys(NEW_USER_SPLITS, pa.large_list(pa.int32()))
        schema = pa.schema({"user": pa.string(), **lists})
        if not self.manifest.num_new_users:
            return schema.empty_table()
        table = self._table("new_users", self.manifest.num_new_users)
        path = f"{self._root}/new_users.parquet"
        try:
            with as_os_errors():
                table = table.select(schema.names).cast(schema)
        except (OSError, KeyError) as error:
            raise CorpusError(path, str(error), "has other columns than new users have", _REBUILD) from error
        for name in NEW_USER_SPLITS:
            items = pc.list_flatten(table[name])
            bounds = pc.min_max(items).as_py()
            wrong = table[name].null_count or items.null_count or not self._are_items(bounds)
            if wrong or len(items) != self.manifest.num_new_interactions.get(name):
                raise CorpusError(f"{path} {name}", bounds, "are not the item rows of its users", _REBUILD)
        if table["user"].null_count:
            raise CorpusError(f"{path} user", None, "is not an id", _REBUILD)
        return table

    def _are_items(self, bounds: dict[str, int | None]) -> bool:
        low, high = bounds["min"], bounds["max"]
        return low is None or high is None or (low >= 0 and high < self.num_items)


def _check_size(fs: fsspec.AbstractFileSystem, path: str, entry: FileEntry) -> None:
    try:
        with as_os_errors():
            size = fs.info(path)["size"]
    except OSError as error:
        raise CorpusError(path, "missing", "is named by the manifest but cannot be found", _REBUILD) from error
    if size != entry.num_bytes:
        raise CorpusError(path, size, f"bytes, but the manifest says {entry.num_bytes}", _REBUILD)


def _check_hash(fs: fsspec.AbstractFileSystem, path: str, entry: FileEntry) -> None:
    try:
        with as_os_errors(), fs.open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CorpusError(path, str(error), "cannot be read", _REBUILD) from error
    if digest != entry.sha256:
        raise CorpusError(path, digest, f"is its sha256, but the manifest says {entry.sha256}", _REBUILD)
