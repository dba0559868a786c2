"""Documents one at a time, for tests and for what the package is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cllm4rec_dist.corpus.collate import MicroBatch, collate
from cllm4rec_dist.corpus.documents import Documents
from cllm4rec_dist.corpus.loader import BatchLoader
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.tokenizer import TokenSpace, WordTokenizer


@dataclass(frozen=True)
class Document:
    """One sequence and what is predicted in it.

    Attributes:
        token_ids: int64 [t] in the common id space.
        queries: int64 [q] positions whose hidden state predicts.
        target_query: int64 [m] index into `queries` for each target.
        targets: int64 [m] item rows, or word ids.
        key: seed of this document's embedding dropout.
    """

    token_ids: np.ndarray
    queries: np.ndarray
    target_query: np.ndarray
    targets: np.ndarray
    key: int


def each(documents: Documents) -> Iterator[Document]:
    """The documents of a batch, one after the other."""
    columns = documents.tokens, documents.queries, documents.target_query, documents.targets
    return map(Document, *columns, documents.keys.tolist())


def join(documents: Sequence[Document]) -> Documents:
    """A batch of documents."""

    def lists(name: str) -> Ragged:
        return Ragged.from_lists([getattr(document, name) for document in documents], np.int64)

    keys = np.array([document.key for document in documents], np.int64)
    return Documents(lists("token_ids"), lists("queries"), lists("target_query"), lists("targets"), keys)


def collate_each(items: Sequence[Document], space: TokenSpace, texts: Sequence[Document] | None = None) -> MicroBatch:
    """A micro-batch of documents."""
    return collate(join(items), space, None if texts is None else join(texts))


def documents_of_step(loader: BatchLoader, step: int) -> tuple[list[Document], list[Document]]:
    """A rank's documents over items and over words of an optimizer step."""
    items: list[Document] = []
    texts: list[Document] = []
    for parts in zip(*loader.examples(step), strict=True):
        for found, documents in zip((items, texts), loader.documents([*parts]), strict=False):
            found.extend(each(documents))
    return items, texts


def decode(tokenizer: WordTokenizer, token_ids: Sequence[int], space: TokenSpace) -> str:
    """Text in bracket notation, the reverse of `WordTokenizer.encode`."""
    parts: list[str] = []
    words: list[int] = []
    for token_id in [*token_ids, None]:
        if token_id is not None and token_id < space.first_user:
            words.append(token_id)
            continue
        if words:
            parts.append(str(tokenizer._tokenizer.decode(words)))
            words = []
        if token_id is not None:
            is_item = token_id >= space.first_item
            row = token_id - (space.first_item if is_item else space.first_user)
            parts.append(f"<{'item' if is_item else 'user'}_{row}>")
    return "".join(parts)
