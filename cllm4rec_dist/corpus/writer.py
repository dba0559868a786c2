"""Write a corpus in the layout of `shards.py`; equal input gives equal bytes.

Tars contain no time, user or group of the machine, and the manifest no path. A local corpus is built in a sibling
folder and renamed when it is complete; on other file systems, where renaming is slow or impossible, the manifest is
written last. Either way an interrupted build is never mistaken for a corpus.

`catalog.py` has filtered and split before.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, Protocol, TypeVar

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm
from webdataset import TarWriter

from cllm4rec_dist.corpus.catalog import Catalog
from cllm4rec_dist.corpus.manifest import (
    MANIFEST_NAME,
    NEW_USER_SPLITS,
    SPLITS,
    ContentKind,
    FileEntry,
    LeftOut,
    Manifest,
    OrderColumns,
)
from cllm4rec_dist.corpus.pair_keys import split_digests
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.recipe import PrepareConfig, SourceConfig, TableSource, TextsConfig
from cllm4rec_dist.corpus.skips import Skip, SkipLog
from cllm4rec_dist.errors import CorpusError
from cllm4rec_dist.filesystems import as_os_errors, locate

logger = logging.getLogger(__name__)

_CORPUS_NAMES = {MANIFEST_NAME, "users.parquet", "items.parquet", "new_users.parquet", "interactions", "content"}
_TOKENIZER_BATCH = 1024

Record = dict[str, np.ndarray]
T = TypeVar("T")
RunTasks = Callable[[Callable[[Any], "Shard"], Iterable[Any]], Iterable["Shard"]]
"""`map`, or a parallel equivalent."""


class Tokenizer(Protocol):
    """The interface of a word tokenizer."""

    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the word ids of each text."""
        ...


@dataclass(frozen=True)
class Shard:
    """A tar file to write.

    Attributes:
        content: bytes of the file.
        record_sizes: examples of each record.
        counts: int64 [kinds] texts of each kind; content shards only.
        num_empty, num_cut: number of texts without words, and of truncated ones.
    """

    content: bytes
    record_sizes: tuple[int, ...]
    counts: np.ndarray | None = None
    num_empty: int = 0
    num_cut: int = 0


@dataclass(frozen=True)
class InteractionSlice:
    """The input of a shard of interactions."""

    first_record: int
    first_user: int
    examples_per_record: int
    lists: dict[str, Ragged]


@dataclass(frozen=True)
class TextSlice:
    """The input of a shard of texts: columns kind, user, item, text."""

    first_record: int
    texts: pl.DataFrame


def write_corpus(
    catalog: Catalog,
    tokenizer: Tokenizer,
    out: str,
    config: PrepareConfig,
    *,
    overwrite: bool = False,
    progress: bool = True,
    run_tasks: RunTasks = map,
) -> Manifest:
    """Write all files of a corpus; equal input gives equal bytes.

    Args:
        catalog: users, items and interactions.
        tokenizer: encodes the texts.
        out: folder or fsspec URL.
        config: name, texts, sizes of records and shards.
        overwrite: replace an existing corpus, but no other folder.
        progress: show a progress bar if there is a terminal.
        run_tasks: maps a function over a stream of shards, in order, like `map`; `tasks.ray_tasks` runs several calls
            at a time.

    Raises:
        CorpusError: if `out` is in use.
    """
    fs, root = locate("out", out, CorpusError)
    check_room(out, overwrite=overwrite)
    log = catalog.log.copy()
    with _building(fs, root) as folder:
        writer = _Writer(fs, folder)
        writer.table("users", _user_table(catalog))
        writer.table("items", _item_table(catalog))
        if len(catalog.new_users):
            writer.table("new_users", _new_user_table(catalog))
        writer.shards("interactions", run_tasks(_interaction_shard, _interaction_slices(catalog, config)))
        num_content = np.zeros(len(ContentKind), dtype=np.int64)
        make = partial(_content_shard, tokenizer, config.max_text_tokens, config.examples_per_record)
        num_texts = _count_texts(catalog, config.texts)
        with tqdm(total=num_texts, desc="texts", unit="text", disable=None if progress else True) as bar:
            shards = run_tasks(make, _text_slices(catalog, config))
            writer.shards("content", _counted(shards, num_content, log, config.max_text_tokens, num_texts, bar.update))
        manifest = Manifest(
            name=config.name,
            num_users=catalog.num_users,
            num_items=catalog.num_items,
            num_interactions={split: len(getattr(catalog, split).values) for split in SPLITS},
            num_new_users=len(catalog.new_users),
            num_new_interactions={name: len(lists.values) for name, lists in _new_user_lists(catalog).items()},
            num_content={kind.name.lower(): int(num_content[kind]) for kind in ContentKind},
            tokenizer_fingerprint=tokenizer.fingerprint,
            preparation=config.preparation(),
            order_columns=_order_columns(config.source),
            split_digests=split_digests(
                catalog.item_ids.to_list(),
                (catalog.user_ids.to_list(), {split: getattr(catalog, split) for split in SPLITS}),
                (catalog.new_users.ids.to_list(), _new_user_lists(catalog)),
            ),
            skipped={reason: _left_out(skip) for reason, skip in sorted(log.skipped.items())},
            files=tuple(writer.entries),
        )
        fs.pipe_file(f"{folder}/{MANIFEST_NAME}", manifest.to_bytes())
    return manifest


def _order_columns(source: SourceConfig) -> OrderColumns | None:
    if not isinstance(source, TableSource):
        return None
    return OrderColumns(**source.interactions.model_dump(include=set(OrderColumns.model_fields)))


def _left_out(skip: Skip) -> LeftOut:
    return LeftOut(count=skip.count, share=round(skip.share, 6), file=skip.file, line=skip.line, value=skip.value)


def check_room(out: str, *, overwrite: bool) -> None:
    """Refuse an output folder that is in use: only a corpus may be overwritten, and only if `overwrite` is set.

    Raises:
        CorpusError: if the folder is in use or cannot be reached.
    """
    fs, root = locate("out", out, CorpusError)
    try:
        with as_os_errors():
            exists = fs.exists(root)
    except OSError as error:
        raise CorpusError("out", root, f"cannot be reached ({error})", "Fix the URL or its credentials.") from error
    if not exists:
        return
    if not fs.isdir(root):
        raise CorpusError("out", root, "is a file", "Give a folder.")
    names = {path.rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)}
    if not names:
        return
    if other_names := sorted(names - _CORPUS_NAMES):
        raise CorpusError("out", root, f"has files that are not of a corpus ({other_names[0]})", "Give another folder.")
    if not overwrite:
        raise CorpusError("out", root, "is not empty", "Give another folder, or --overwrite to replace it.")


@contextmanager
def _building(fs: fsspec.AbstractFileSystem, root: str) -> Iterator[str]:
    """Yield the folder to build in; afterwards it replaces an existing corpus."""
    if not isinstance(fs, LocalFileSystem):
        # Remove the manifest first: a partly removed or partly written folder must not look like a corpus.
        if fs.exists(f"{root}/{MANIFEST_NAME}"):
            fs.rm_file(f"{root}/{MANIFEST_NAME}")
        if fs.exists(root):
            fs.rm(root, recursive=True)
        fs.makedirs(root, exist_ok=True)
        yield root
        return
    parent, _, name = root.rpartition("/")
    folder = f"{parent}/.{name}.partial"
    if fs.exists(folder):
        fs.rm(folder, recursive=True)
    fs.makedirs(folder)
    yield folder
    if fs.exists(root):
        fs.rm(root, recursive=True)
    fs.mv(folder, root, recursive=True)


def _batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` values; the last one may be shorter."""
    stream = iter(values)
    return iter(lambda: list(islice(stream, size)), [])


class _Writer:
    """Writes files and collects their entries for the manifest."""

    def __init__(self, fs: fsspec.AbstractFileSystem, folder: str) -> None:
        self._fs, self._folder = fs, folder
        self.entries: list[FileEntry] = []

    def table(self, kind: Literal["users", "items", "new_users"], table: pa.Table) -> None:
        stream = io.BytesIO()
        pq.write_table(table, stream, compression="zstd")
        self._write(f"{kind}.parquet", kind, stream.getvalue(), ())

    def shards(self, kind: Literal["interactions", "content"], shards: Iterable[Shard]) -> None:
        for index, shard in enumerate(shards):
            if shard.record_sizes:
                self._write(f"{kind}/{kind}-{index:06d}.tar", kind, shard.content, shard.record_sizes)

    def _write(
        self,
        path: str,
        kind: Literal["users", "items", "new_users", "interactions", "content"],
        content: bytes,
        record_sizes: tuple[int, ...],
    ) -> None:
        target = f"{self._folder}/{path}"
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(target, content)
        sha256 = hashlib.sha256(content).hexdigest()
        entry = FileEntry(path=path, kind=kind, num_bytes=len(content), sha256=sha256, record_sizes=record_sizes)
        self.entries.append(entry)


def _tar(records: Sequence[Record], first: int) -> bytes:
    """Return a WebDataset shard whose records are numbered from `first`."""
    stream = io.BytesIO()
    with TarWriter(stream, encoder=False, mtime=0, user="", group="", mode=0o644) as tar:
        for index, record in enumerate(records, start=first):
            tar.write({"__key__": f"{index:08d}"} | {f"{name}.npy": _npy(array) for name, array in record.items()})
    return stream.getvalue()


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _user_table(catalog: Catalog) -> pa.Table:
    columns = {"user": catalog.user_ids, "text": catalog.user_texts}
    return _arrow_table(catalog.num_users, columns)


def _item_table(catalog: Catalog) -> pa.Table:
    columns = {"item": catalog.item_ids, "title": catalog.item_titles, "description": catalog.item_descriptions}
    if catalog.item_categories is not None:
        columns["category"] = catalog.item_categories
    return _arrow_table(catalog.num_items, columns)


def _new_user_lists(catalog: Catalog) -> dict[str, Ragged]:
    """Return the items of the users who are held out whole, by part; empty if there are none."""
    users = catalog.new_users
    return {name: getattr(users, name) for name in NEW_USER_SPLITS} if len(users) else {}


def _new_user_table(catalog: Catalog) -> pa.Table:
    lists = {
        name: pa.LargeListArray.from_arrays(lists.offsets, lists.values.astype(np.int32, copy=False))
        for name, lists in _new_user_lists(catalog).items()
    }
    return pa.table({"user": catalog.new_users.ids.to_arrow().cast(pa.string()), **lists})


def _arrow_table(num_rows: int, columns: dict[str, pl.Series]) -> pa.Table:
    texts = {name: column.to_arrow().cast(pa.string()) for name, column in columns.items()}
    return pa.table({"row": np.arange(num_rows), **texts})


def _interaction_slices(catalog: Catalog, config: PrepareConfig) -> Iterator[InteractionSlice]:
    """Yield the users of each shard, with their items by split."""
    size = config.examples_per_record * config.records_per_shard
    for index, start in enumerate(range(0, catalog.num_users, size)):
        lists = {split: getattr(catalog, split).slice(start, start + size) for split in SPLITS}
        yield InteractionSlice(index * config.records_per_shard, start, config.examples_per_record, lists)


def _interaction_shard(part: InteractionSlice) -> Shard:
    records: list[Record] = []
    num_users = len(part.lists["train"])
    for start in range(0, num_users, part.examples_per_record):
        stop = min(start + part.examples_per_record, num_users)
        record: Record = {"users": part.first_user + np.arange(start, stop, dtype=np.int64)}
        for split, lists in part.lists.items():
            items = lists.slice(start, stop)
            record |= {f"{split}_offsets": items.offsets, f"{split}_items": items.values}
        records.append(record)
    sizes = tuple(len(record["users"]) for record in records)
    return Shard(_tar(records, part.first_record), sizes)


def _count_texts(catalog: Catalog, use: TextsConfig) -> int:
    tables = ([catalog.item_titles, catalog.item_descriptions] if use.item else []) + (
        [catalog.user_texts] if use.user else []
    )
    return (len(catalog.reviews.users) if use.user_item else 0) + sum(int((texts != "").sum()) for texts in tables)


def _texts(catalog: Catalog, use: TextsConfig) -> Iterator[pl.DataFrame]:
    """Yield the nonempty texts to use, in tables with columns kind, user, item (0 if the kind has none) and text."""
    if use.user_item and len(catalog.reviews.users):
        reviews = catalog.reviews
        for table in reviews.store.sorted_by(reviews.ranks):
            ranks = table["rank"].to_numpy()
            yield _text_table(ContentKind.USER_ITEM, reviews.users[ranks], reviews.items[ranks], table["text"])
    for kind, texts, used in (
        (ContentKind.ITEM_TITLE, catalog.item_titles, use.item),
        (ContentKind.ITEM_DESCRIPTION, catalog.item_descriptions, use.item),
        (ContentKind.USER_PROFILE, catalog.user_texts, use.user),
    ):
        if used:
            rows = np.flatnonzero((texts != "").to_numpy())
            none = np.zeros(len(rows), dtype=np.int64)
            users, items = (rows, none) if kind is ContentKind.USER_PROFILE else (none, rows)
            yield _text_table(kind, users, items, texts[rows])


def _text_table(kind: ContentKind, users: np.ndarray, items: np.ndarray, texts: pl.Series) -> pl.DataFrame:
    kinds = np.full(len(texts), kind, dtype=np.uint8)
    return pl.DataFrame({"kind": kinds, "user": users.astype(np.int64), "item": items.astype(np.int64), "text": texts})


def _text_slices(catalog: Catalog, config: PrepareConfig) -> Iterator[TextSlice]:
    """Yield the texts of each shard."""
    size, index = config.examples_per_record * config.records_per_shard, 0
    rest: pl.DataFrame | None = None
    for table in _texts(catalog, config.texts):
        rest = table if rest is None else pl.concat([rest, table])
        while len(rest) >= size:
            yield TextSlice(index * config.records_per_shard, rest[:size])
            rest, index = rest[size:], index + 1
    if rest is not None and len(rest):
        yield TextSlice(index * config.records_per_shard, rest)


def _content_shard(tokenizer: Tokenizer, longest: int, examples_per_record: int, part: TextSlice) -> Shard:
    """Encode texts into a shard, without those that have no words; truncate and count those longer than `longest`."""
    words = [
        tokens for text in _batched(part.texts["text"], _TOKENIZER_BATCH) for tokens in tokenizer.encode_batch(text)
    ]
    lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    used = np.flatnonzero(lengths > 0)
    columns = {name: part.texts[name].to_numpy()[used] for name in ("kind", "user", "item")}
    records: list[Record] = []
    for start in range(0, len(used), examples_per_record):
        selected = slice(start, start + examples_per_record)
        tokens = Ragged.from_lists([words[index][:longest] for index in used[selected].tolist()], dtype=np.int32)
        records.append(
            {
                "kind": columns["kind"][selected],
                "users": columns["user"][selected],
                "items": columns["item"][selected],
                "offsets": tokens.offsets,
                "tokens": tokens.values,
            }
        )
    counts = np.bincount(columns["kind"], minlength=len(ContentKind))
    sizes = tuple(len(record["users"]) for record in records)
    content = _tar(records, part.first_record) if records else b""
    return Shard(content, sizes, counts, len(words) - len(used), int((lengths > longest).sum()))


def _counted(
    shards: Iterable[Shard],
    num_content: np.ndarray,
    log: SkipLog,
    longest: int,
    num_texts: int,
    advance: Callable[[int], object],
) -> Iterator[Shard]:
    """Yield the shards, counting their texts and those that were left out."""
    num_empty = num_cut = 0
    for shard in shards:
        assert shard.counts is not None
        num_content += shard.counts
        num_empty, num_cut = num_empty + shard.num_empty, num_cut + shard.num_cut
        advance(int(shard.counts.sum()) + shard.num_empty)
        yield shard
    log.skip("text without words", num_empty, num_texts)
    log.skip(f"end of a text longer than {longest} words", num_cut, num_texts)
