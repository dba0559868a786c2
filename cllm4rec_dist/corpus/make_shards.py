"""Make the shards of a corpus: records of users and items, and records of encoded texts.

Each shard is made from its own slice of the catalog, so that several can be made at a time (`tasks.py`). `writer.py`
writes them; `shards.py` describes their layout.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import polars as pl
from webdataset import TarWriter

from cllm4rec_dist.corpus.catalog import Catalog
from cllm4rec_dist.corpus.manifest import SPLITS, ContentKind
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.recipe import PrepareConfig, TextsConfig
from cllm4rec_dist.corpus.skips import SkipLog

_TOKENIZER_BATCH = 1024

Record = dict[str, np.ndarray]
T = TypeVar("T")


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


def interaction_slices(catalog: Catalog, config: PrepareConfig) -> Iterator[InteractionSlice]:
    """Yield the users of each shard, with their items by split."""
    size = config.examples_per_record * config.records_per_shard
    for index, start in enumerate(range(0, catalog.num_users, size)):
        lists = {split: getattr(catalog, split).slice(start, start + size) for split in SPLITS}
        yield InteractionSlice(index * config.records_per_shard, start, config.examples_per_record, lists)


def make_interaction_shard(part: InteractionSlice) -> Shard:
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


def count_texts(catalog: Catalog, use: TextsConfig) -> int:
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


def text_slices(catalog: Catalog, config: PrepareConfig) -> Iterator[TextSlice]:
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


def make_content_shard(tokenizer: Tokenizer, longest: int, examples_per_record: int, part: TextSlice) -> Shard:
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


def count_shards(
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


def _batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` values; the last one may be shorter."""
    stream = iter(values)
    return iter(lambda: list(islice(stream, size)), [])
