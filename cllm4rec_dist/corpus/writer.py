"""Write a corpus in the layout of `shards.py`; equal input gives equal bytes.

Tars contain no time, user or group of the machine, and the manifest no path. A local corpus is built in a sibling
folder and renamed when it is complete; on other file systems, where renaming is slow or impossible, the manifest is
written last. Either way an interrupted build is never mistaken for a corpus.

`catalog.py` has filtered and split before; `make_shards.py` makes the shards.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from cllm4rec_dist.corpus.catalog import Catalog
from cllm4rec_dist.corpus.make_shards import (
    Shard,
    Tokenizer,
    count_shards,
    count_texts,
    interaction_slices,
    make_content_shard,
    make_interaction_shard,
    text_slices,
)
from cllm4rec_dist.corpus.manifest import (
    INIT_CACHE,
    MANIFEST_NAME,
    NEW_USER_SPLITS,
    SPLITS,
    ContentKind,
    FileEntry,
    ItemColumns,
    LeftOut,
    Manifest,
    OrderColumns,
)
from cllm4rec_dist.corpus.pair_keys import split_digests
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.recipe import PrepareConfig, SourceConfig, TableSource
from cllm4rec_dist.corpus.skips import Skip
from cllm4rec_dist.errors import CorpusError
from cllm4rec_dist.filesystems import as_os_errors, locate

logger = logging.getLogger(__name__)

_CORPUS_NAMES = {MANIFEST_NAME, "users.parquet", "items.parquet", "new_users.parquet", "interactions", "content"}

RunTasks = Callable[[Callable[[Any], Shard], Iterable[Any]], Iterable[Shard]]
"""`map`, or a parallel equivalent."""


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
        writer.shards("interactions", run_tasks(make_interaction_shard, interaction_slices(catalog, config)))
        num_content = np.zeros(len(ContentKind), dtype=np.int64)
        make = partial(make_content_shard, tokenizer, config.max_text_tokens, config.examples_per_record)
        num_texts = count_texts(catalog, config.texts)
        with tqdm(total=num_texts, desc="texts", unit="text", disable=None if progress else True) as bar:
            shards = run_tasks(make, text_slices(catalog, config))
            writer.shards(
                "content", count_shards(shards, num_content, log, config.max_text_tokens, num_texts, bar.update)
            )
        manifest = Manifest(
            name=config.name,
            num_users=catalog.num_users,
            num_items=catalog.num_items,
            num_new_items=catalog.num_new_items,
            num_interactions={split: len(getattr(catalog, split).values) for split in SPLITS},
            num_new_users=len(catalog.new_users),
            num_new_interactions={name: len(lists.values) for name, lists in _new_user_lists(catalog).items()},
            num_content={kind.name.lower(): int(num_content[kind]) for kind in ContentKind},
            tokenizer_fingerprint=tokenizer.fingerprint,
            preparation=config.preparation(),
            order_columns=_order_columns(config.source),
            item_columns=_item_columns(config.source),
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


def _item_columns(source: SourceConfig) -> ItemColumns | None:
    if not isinstance(source, TableSource) or source.items is None:
        return None
    return ItemColumns(**source.items.model_dump(include=set(ItemColumns.model_fields)))


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
    if other_names := sorted(names - _CORPUS_NAMES - {INIT_CACHE}):
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
