"""Writing a corpus: the layout of `shards.py`, deterministic to the byte.

Tars carry no time, user or group of the machine; the manifest names no path of it. A local corpus is built in a
sibling folder and renamed when it is whole; on other file systems, which rename slowly or not at all, the manifest is
written last. Either way an interrupted build is never taken for a corpus.

Filtering and splitting are done before, in `catalog.py`; the tokenizer is given.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, Protocol, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm
from webdataset import TarWriter

from cllm4rec_dist.corpus.catalog import Catalog
from cllm4rec_dist.corpus.manifest import MANIFEST_NAME, SPLITS, ContentKind, FileEntry, Manifest
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.recipe import PrepareConfig, TextsConfig
from cllm4rec_dist.errors import CorpusError
from cllm4rec_dist.filesystems import as_os_errors, locate

logger = logging.getLogger(__name__)

_KNOWN_NAMES = {MANIFEST_NAME, "users.parquet", "items.parquet", "interactions", "content"}
_TOKENIZER_BATCH = 1024

Record = dict[str, np.ndarray]
T = TypeVar("T")


class Tokenizer(Protocol):
    """What is asked of a word tokenizer."""

    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Word ids of each text."""
        ...


@dataclass(frozen=True)
class Text:
    """A text and what it is about; the row that a kind does not use is 0."""

    kind: ContentKind
    user: int
    item: int
    text: str


def write_corpus(
    catalog: Catalog, tokenizer: Tokenizer, out: str, config: PrepareConfig, *, overwrite: bool = False,
    progress: bool = True,
) -> Manifest:  # fmt: skip
    """Write all files of a corpus; the same input gives the same bytes.

    Args:
        catalog: users, items and interactions.
        tokenizer: makes the words of the content corpus.
        out: folder or fsspec URL.
        config: name, texts, sizes of records and shards.
        overwrite: replace a corpus (nothing else) that is there.
        progress: show a progress bar.

    Raises:
        CorpusError: if `out` is in use.
    """
    fs, root = locate("out", out, CorpusError)
    _check_room(fs, root, overwrite)
    with _building(fs, root) as folder:
        writer = _Writer(fs, folder, config.records_per_shard)
        writer.table("users", _user_table(catalog))
        writer.table("items", _item_table(catalog))
        writer.shards("interactions", _interaction_records(catalog, config.examples_per_record))
        skipped, num_content = Counter(catalog.skipped), Counter[str]()
        texts = tqdm(_texts(catalog, config.texts), desc="texts", unit="text", disable=not progress)
        words = _tokenized(texts, tokenizer, config.max_text_tokens, skipped)
        writer.shards("content", _content_records(words, config.examples_per_record, num_content))
        manifest = Manifest(
            name=config.name,
            num_users=catalog.num_users,
            num_items=catalog.num_items,
            num_interactions={split: len(getattr(catalog, split).values) for split in SPLITS},
            num_content={kind.name.lower(): num_content[kind.name] for kind in ContentKind},
            tokenizer_fingerprint=tokenizer.fingerprint,
            preparation=config.preparation(),
            skipped=dict(sorted(skipped.items())),
            files=tuple(writer.entries),
        )
        fs.pipe_file(f"{folder}/{MANIFEST_NAME}", manifest.to_bytes())
    return manifest


def _check_room(fs: fsspec.AbstractFileSystem, root: str, overwrite: bool) -> None:
    """Refuse a place that is in use: only a corpus is ever overwritten, and only if that is asked for."""
    try:
        with as_os_errors():
            exists = fs.exists(root)
    except OSError as error:
        raise CorpusError("out", root, f"cannot be reached ({error})", "Mend the URL or its credentials.") from error
    if not exists:
        return
    if not fs.isdir(root):
        raise CorpusError("out", root, "is a file", "Give a folder.")
    found = {path.rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)}
    if not found:
        return
    if strangers := sorted(found - _KNOWN_NAMES):
        raise CorpusError("out", root, f"holds files that are no corpus's ({strangers[0]})", "Give another folder.")
    if not overwrite:
        raise CorpusError("out", root, "is not empty", "Give another folder, or ask to overwrite it.")


@contextmanager
def _building(fs: fsspec.AbstractFileSystem, root: str) -> Iterator[str]:
    """The folder to build in; what is there is replaced when the build is whole."""
    if not isinstance(fs, LocalFileSystem):
        # The marker goes first: what is half removed or half written is no corpus.
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
    """Lists of `size` values, the last one may be shorter."""
    stream = iter(values)
    return iter(lambda: list(islice(stream, size)), [])


class _Writer:
    """Writes files and keeps their entries for the manifest."""

    def __init__(self, fs: fsspec.AbstractFileSystem, folder: str, records_per_shard: int) -> None:
        self._fs, self._folder, self._records_per_shard = fs, folder, records_per_shard
        self.entries: list[FileEntry] = []

    def table(self, kind: Literal["users", "items"], table: pa.Table) -> None:
        stream = io.BytesIO()
        pq.write_table(table, stream, compression="zstd")
        self._write(f"{kind}.parquet", kind, stream.getvalue(), ())

    def shards(self, kind: Literal["interactions", "content"], records: Iterable[Record]) -> None:
        for shard, group in enumerate(_batched(records, self._records_per_shard)):
            sizes = tuple(len(record["users"]) for record in group)
            content = _tar(group, first=shard * self._records_per_shard)
            self._write(f"{kind}/{kind}-{shard:06d}.tar", kind, content, sizes)

    def _write(
        self, path: str, kind: Literal["users", "items", "interactions", "content"], content: bytes,
        record_sizes: tuple[int, ...],
    ) -> None:  # fmt: skip
        target = f"{self._folder}/{path}"
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(target, content)
        sha256 = hashlib.sha256(content).hexdigest()
        entry = FileEntry(path=path, kind=kind, num_bytes=len(content), sha256=sha256, record_sizes=record_sizes)
        self.entries.append(entry)


def _tar(records: Sequence[Record], first: int) -> bytes:
    """A WebDataset shard whose records are numbered from `first`."""
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
    return pa.table({"row": np.arange(catalog.num_users), "user": catalog.user_ids, "text": catalog.user_texts})


def _item_table(catalog: Catalog) -> pa.Table:
    return pa.table(
        {
            "row": np.arange(catalog.num_items),
            "item": catalog.item_ids,
            "title": catalog.item_titles,
            "description": catalog.item_descriptions,
        }
    )


def _interaction_records(catalog: Catalog, size: int) -> Iterator[Record]:
    for start in range(0, catalog.num_users, size):
        stop = min(start + size, catalog.num_users)
        record: Record = {"users": np.arange(start, stop, dtype=np.int64)}
        for split in SPLITS:
            lists: Ragged = getattr(catalog, split).slice(start, stop)
            record |= {f"{split}_offsets": lists.offsets, f"{split}_items": lists.values}
        yield record


def _texts(catalog: Catalog, use: TextsConfig) -> Iterator[Text]:
    """Every text of the catalog that is used, empty ones left out."""
    if use.user_item:
        reviews = catalog.reviews
        for user, item, text in zip(reviews.users.tolist(), reviews.items.tolist(), reviews.texts, strict=True):
            yield Text(ContentKind.USER_ITEM, user, item, text)
    if use.item:
        titles = ((ContentKind.ITEM_TITLE, row, text) for row, text in enumerate(catalog.item_titles))
        descriptions = ((ContentKind.ITEM_DESCRIPTION, row, text) for row, text in enumerate(catalog.item_descriptions))
        yield from (Text(kind, 0, row, text) for kind, row, text in chain(titles, descriptions) if text)
    if use.user:
        yield from (Text(ContentKind.USER_PROFILE, row, 0, text) for row, text in enumerate(catalog.user_texts) if text)


def _tokenized(
    texts: Iterable[Text], tokenizer: Tokenizer, longest: int, skipped: Counter[str]
) -> Iterator[tuple[Text, list[int]]]:
    """Texts with their words; those without any are left out and those that are cut are counted."""
    for batch in _batched(texts, _TOKENIZER_BATCH):
        for text, tokens in zip(batch, tokenizer.encode_batch([text.text for text in batch]), strict=True):
            if not tokens:
                skipped["text without words"] += 1
                continue
            if len(tokens) > longest:
                skipped[f"end of a text longer than {longest} words"] += 1
            yield text, tokens[:longest]


def _content_records(words: Iterable[tuple[Text, list[int]]], size: int, num_content: Counter[str]) -> Iterator[Record]:
    """Records of `size` texts; counts the texts by kind."""
    for group in _batched(words, size):
        tokens = Ragged.from_lists([tokens for _, tokens in group], dtype=np.int32)
        num_content.update(text.kind.name for text, _ in group)
        yield {
            "kind": np.array([text.kind for text, _ in group], dtype=np.uint8),
            "users": np.array([text.user for text, _ in group], dtype=np.int64),
            "items": np.array([text.item for text, _ in group], dtype=np.int64),
            "offsets": tokens.offsets,
            "tokens": tokens.values,
        }
