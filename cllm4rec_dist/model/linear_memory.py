"""Linear memory: an additive term of the item score from a sparse item-item matrix, row-sharded like the item table.

    score_j(history) = LLM's score + weight * sum over k of w[j, k] * 1[neighbor k of item j is in the history]

The language model is trained without it; it is fitted in closed form (`linear_fit.py`), and `weight` is chosen on
validation (`evaluation/mixing.py`).

Legend: I items, K neighbors, n local rows, b queries, h pairs of query and history item.
"""

from __future__ import annotations

import logging

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from cllm4rec_dist.distributed.collectives import gather_counts
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.linear_fit import LinearSettings, item_features, ridge_weights, strongest_neighbors

logger = logging.getLogger(__name__)

_CHUNK = 1024
"""Items of a rank that are fitted between two small collectives, in which no rank waits long for another."""


class LinearMemory:
    """This rank's rows of the item-item matrix; empty until it is filled.

    Args:
        partition: partition of the item rows.

    Attributes:
        neighbors: int32 [n, K] item rows, -1 for none, on the host.
        weights: fp32 [n, K], on the host.
        settings: those that it was fitted with.
        weight: weight of the linear score relative to the LLM's; 0 until validation has chosen one.
    """

    def __init__(self, partition: RowPartition, world: World) -> None:
        self.partition, self._world = partition, world
        self.weight = 0.0
        num_rows = partition.num_local(world.rank)
        self.fill(torch.empty(num_rows, 0, dtype=torch.int32), torch.empty(num_rows, 0), LinearSettings())

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to add to a score, on any rank."""
        return self.neighbors.shape[1] == 0

    def fill(self, neighbors: Tensor, weights: Tensor, settings: LinearSettings) -> None:
        """Take this rank's rows, and index them by neighbor on the device."""
        assert neighbors.shape == weights.shape
        self.neighbors, self.weights, self.settings = neighbors, weights, settings
        keys, values = _by_neighbor(neighbors.numpy(), weights.numpy())
        self._keys = torch.from_numpy(keys).to(self._world.device)
        self._values = torch.from_numpy(values).to(self._world.device)

    def add_scores(self, scores: Tensor, rows: Tensor, history: Tensor) -> None:
        """Add the linear scores of some rows to `scores` [rows, b], in place. No collective.

        Args:
            scores: contiguous.
            rows: int64 local rows, ascending.
            history: int64 [h, 2] pairs (query, item), each once.
        """
        if self.is_empty or not len(rows) or not len(history):
            return
        num_rows = max(1, len(self.neighbors))
        query, item = history.T
        first, last = rows[0], rows[-1]
        low = torch.searchsorted(self._keys, item * num_rows + first)
        counts = torch.searchsorted(self._keys, item * num_rows + last, right=True) - low
        pair = torch.repeat_interleave(counts)
        entry = torch.arange(len(pair), device=pair.device) + (low - counts.cumsum(0) + counts)[pair]
        row = self._keys[entry] - (item * num_rows)[pair]
        position = torch.searchsorted(rows, row)
        values = torch.where(rows[position] == row, self._values[entry], 0.0).to(scores.dtype)
        scores.view(-1).index_add_(0, position * scores.shape[1] + query[pair], values)


def _by_neighbor(
    neighbors: NDArray[np.int32], weights: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Sort the entries of [n, K] by neighbor, then by row: keys neighbor * n + row, and weights.

    By counting, as a sparse matrix is transposed, which takes half the time and a third of the memory of a sort.
    """
    exists = neighbors >= 0
    offsets = np.concatenate([[0], exists.sum(axis=1).cumsum()])
    shape = len(neighbors), int(neighbors.max(initial=-1)) + 1
    entries = sp.csr_matrix((weights[exists], neighbors[exists], offsets), shape=shape).tocsc()
    keys = np.repeat(np.arange(shape[1]), np.diff(entries.indptr))
    keys *= len(neighbors)
    keys += entries.indices
    return keys, entries.data


def fit_linear_memory(
    memory: LinearMemory,
    train: sp.csr_matrix,
    texts: sp.csr_matrix,
    num_neighbors: int,
    settings: LinearSettings,
    world: World,
) -> None:
    """Fit and fill this rank's rows. Collective: a small all-gather for every 1,024 items of a rank.

    Args:
        train: binary [U, I], the training interactions alone.
        texts: [I, W], from `linear_fit.text_features`.
    """
    features = item_features(train, texts, settings.text_weight, settings.history_power).with_gram()
    start, stop = memory.partition.range(world.rank)
    width = min(num_neighbors, features.num_items - 1)
    neighbors, weights = np.full((stop - start, width), -1, np.int32), np.zeros((stop - start, width), np.float32)
    for first in range(0, memory.partition.block, _CHUNK):
        low, high = min(start + first, stop), min(start + first + _CHUNK, stop)
        with world.watch.doing("fitting the linear memory"):
            part, items = slice(low - start, high - start), np.arange(low, high)
            neighbors[part] = chosen = strongest_neighbors(features, items, num_neighbors)
            weights[part] = ridge_weights(features, items, chosen, settings, torch.get_num_threads())
        gather_counts(high - start, world)
    memory.fill(torch.from_numpy(neighbors), torch.from_numpy(weights), settings)
