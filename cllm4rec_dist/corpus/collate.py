"""Collate documents of both LLMs into the tensors of one forward.

Legend: n documents, R rows, L their length, Q positions that predict, M targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm4rec_dist.corpus.documents import Documents
from cllm4rec_dist.corpus.packing import pack
from cllm4rec_dist.corpus.ragged import Ragged, ranges
from cllm4rec_dist.corpus.tokenizer import TokenSpace

TABLES = {
    "items": ("collaborative.users", "collaborative.items"),
    "text": ("content.users", "content.items"),
}
"""User and item tables that the documents of each loss look up."""


@dataclass(frozen=True)
class MicroBatch:
    """Documents over items, and over words if there is a content LLM, packed into R rows (`packing.py`).

    A flat position is row * L + column. Dictionaries are keyed by table (`TABLES`) or by loss, `items` or `text`.

    Attributes:
        word_ids: int64 [R, L]; 0 where the token is no word.
        positions: int64 [R, L] position of each token in its document.
        keys: int64 [R, L] dropout key of each token's document.
        content_start: flat position at which the content LLM's documents start; those of the collaborative LLM come
            before it.
        num_tokens: tokens without padding.
        ids: by table, int64 rows to look up.
        id_positions: by table, int64 flat positions of these rows' tokens, ascending.
        query_positions: by loss, int64 [Q] flat positions whose hidden states predict.
        target_query: by loss, int64 [M] index into `query_positions`.
        targets: by loss, int64 [M] item rows or word ids.
        no_user_positions: int64 flat positions of users without a row; None if there are none.
    """

    word_ids: Tensor
    positions: Tensor
    keys: Tensor
    content_start: int
    num_tokens: int
    ids: Mapping[str, Tensor]
    id_positions: Mapping[str, Tensor]
    query_positions: Mapping[str, Tensor]
    target_query: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    no_user_positions: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """Copy to `device`, asynchronously if the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """Copy to page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> MicroBatch:
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                changed[name] = function(value)
            elif isinstance(value, dict):
                changed[name] = {key: function(tensor) for key, tensor in value.items()}
        return replace(self, **changed)


def collate(items: Documents, space: TokenSpace, texts: Documents | None = None) -> MicroBatch:
    """Pack documents over items and documents over words into one batch.

    Without any document the batch is one position of padding that predicts nothing: every rank must run every forward.

    Args:
        texts: None without a content LLM.
    """
    groups = {"items": items} if texts is None else {"items": items, "text": texts}
    lengths = [documents.tokens.lengths for documents in groups.values()]
    shape, starts, content_start = pack(lengths[0], lengths[1] if len(lengths) > 1 else np.empty(0, np.int64))
    # Each padding token is a document by itself, which nothing reads.
    tokens, positions, keys = np.zeros((3, shape[0] * shape[1]), np.int64)
    for documents, first, length in zip(groups.values(), starts, lengths, strict=False):
        index = ranges(first, length)
        tokens[index] = documents.tokens.values
        positions[index] = ranges(np.zeros_like(length), length)
        keys[index] = np.repeat(documents.keys, length)
    ids: dict[str, Tensor] = {}
    id_positions: dict[str, Tensor] = {}
    for loss, part in zip(groups, (slice(0, content_start), slice(content_start, None)), strict=False):
        for table, (start, stop) in zip(
            TABLES[loss], ((space.first_user, space.first_item), (space.first_item, space.size)), strict=True
        ):
            at = np.flatnonzero((tokens[part] >= start) & (tokens[part] < stop)) + part.start
            ids[table], id_positions[table] = _tensor(tokens[at] - start), _tensor(at)
    no_user = np.flatnonzero(tokens == space.no_user)
    return MicroBatch(
        word_ids=_tensor(np.where(tokens < space.first_user, tokens, 0).reshape(shape)),
        positions=_tensor(positions.reshape(shape)),
        keys=_tensor(keys.reshape(shape)),
        content_start=content_start,
        num_tokens=sum(int(length.sum()) for length in lengths),
        ids=ids,
        id_positions=id_positions,
        query_positions={
            loss: _tensor(_shifted(documents.queries, first))
            for (loss, documents), first in zip(groups.items(), starts, strict=False)
        },
        target_query={
            loss: _tensor(_shifted(documents.target_query, documents.queries.offsets[:-1]))
            for loss, documents in groups.items()
        },
        targets={loss: _tensor(documents.targets.values) for loss, documents in groups.items()},
        no_user_positions=_tensor(no_user) if len(no_user) else None,
    )


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int64))


def _shifted(lists: Ragged, shifts: np.ndarray) -> np.ndarray:
    """Add to the values of each list its shift."""
    return lists.values + np.repeat(shifts, lists.lengths)
