"""Scores of a loaded system for people given by item rows, in this process: forwards in batches, and top-K.

Legend: n people, I items with the new ones, D hidden.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.distributed.host_memory import return_freed_memory
from cllm4rec_dist.evaluation.sharded_topk import Queries, mixed_scores, mixed_topk, sharded_topk
from cllm4rec_dist.evaluation.topk import encode_histories, history_pairs
from cllm4rec_dist.system import InferenceSystem

_BATCH = 256
"""Maximum number of histories in a forward."""
_BATCH_ITEMS = 1 << 15
"""Maximum number of history items in a forward; bounds its memory."""


@dataclass(frozen=True)
class Person:
    """User row (-1 if there is none) and distinct item rows of the whole history, oldest first."""

    row: int
    items: list[int]

    @property
    def is_unknown(self) -> bool:
        """True if there is neither a user row nor a known item."""
        return self.row < 0 and not self.items


class Scorer:
    """Scores items for people. Thread-safe: forwards are serialized by a lock."""

    def __init__(self, system: InferenceSystem) -> None:
        self._system = system
        system.train(False)
        return_freed_memory()  # before the largest matrix is allocated
        self._output_weight = system.recommender.output_weight()
        self._forward = threading.Lock()  # the backbone keeps state during a forward

    def for_system(self, system: InferenceSystem) -> Scorer:
        """Return a scorer of the same weights with other new items; both share the lock."""
        other = copy.copy(self)
        other._system = system
        return other

    def encode(self, people: Sequence[Person]) -> Queries:
        """Queries of n people: vectors [n, D or D+1] for the output weight, and histories for the linear memory."""
        weight = self._output_weight
        encoded = torch.empty(len(people), weight.shape[1], device=weight.device)
        for batch in _batches([len(person.items) for person in people]):
            users = np.array([people[index].row for index in batch], dtype=np.int64)
            histories = Ragged.from_lists([people[index].items for index in batch])
            with torch.no_grad(), self._forward:
                encoded[torch.tensor(batch)] = encode_histories(self._system, users, histories).to(encoded.dtype)
        histories = Ragged.from_lists([person.items for person in people])
        return Queries(encoded, history_pairs(histories).to(encoded.device))

    def scores(self, people: Sequence[Person], rows: Sequence[int]) -> np.ndarray:
        """Scores of items, float32 [n, len(rows)]."""
        chosen = torch.tensor(rows, dtype=torch.int64, device=self._output_weight.device)
        distinct, position = chosen.unique(return_inverse=True)
        queries, system, num_known = self.encode(people), self._system, len(self._output_weight)
        known = distinct[distinct < num_known]
        parts = [(self._output_weight[known], system.linear, known)]
        if system.new_items is not None:
            new = distinct[distinct >= num_known] - num_known
            parts.append((system.new_items.output_weight[new], system.new_items.linear, new))
        scores = []
        for weight, memory, index in parts:
            dots = weight @ queries.vectors.T
            linear = torch.zeros_like(dots)
            memory.add_scores(linear, index, queries.history)
            scores.append(mixed_scores(dots, linear, system.linear.weight))
        return torch.cat(scores)[position].T.float().cpu().numpy()

    def similar(self, row: int, num_best: int) -> tuple[Tensor, Tensor]:
        """Cosines and rows [K] of the items whose embeddings are most similar to that of an item, on the host."""
        system, new_items = self._system, self._system.new_items
        num_best = min(num_best, system.num_items - 1)
        if not num_best:
            return torch.empty(0), torch.empty(0, dtype=torch.int64)
        normalized = F.normalize(system.recommender.collaborative.items.local_rows.detach(), dim=1)
        query = normalized[row : row + 1]
        if new_items is not None:
            new_items = replace(new_items, output_weight=F.normalize(new_items.rows, dim=1))
            if row >= len(normalized):
                query = new_items.output_weight[row - len(normalized)][None]
        itself = torch.tensor([[0, row]], device=system.world.device)
        scores, rows = sharded_topk(
            query,
            normalized,
            num_best,
            itself,
            system.recommender.item_partition,
            system.recommender.world,
            new_items=new_items,
        )
        return scores[0].cpu(), rows[0].cpu()

    def top(
        self,
        queries: Queries,
        masked: Sequence[Collection[int]],
        num_best: int,
        candidates: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and item rows [n, num_best] of the best items, best first; masked ones have the score -inf.

        Args:
            queries: of n people, from `encode`.
            masked: item rows to leave out for each person.
            candidates: bool [I], rank only these; None for all items.
        """
        world, memory = self._system.world, self._system.linear
        pairs = [(index, row) for index, rows in enumerate(masked) for row in rows]
        seen = torch.tensor(pairs, dtype=torch.int64, device=world.device).view(-1, 2)
        mask = None if candidates is None else torch.from_numpy(candidates).to(world.device)
        with torch.no_grad():
            (best,) = mixed_topk(
                queries,
                self._output_weight,
                memory,
                [memory.weight],
                num_best,
                seen,
                world,
                candidates=mask,
                new_items=self._system.new_items,
            )
        return best


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of histories of similar length for each forward."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        longest = max(1, lengths[index])
        if batch and (len(batch) == _BATCH or (len(batch) + 1) * longest > _BATCH_ITEMS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
