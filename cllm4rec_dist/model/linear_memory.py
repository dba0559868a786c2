"""Linear memory: an additive term of the item score from a sparse item-item matrix, row-sharded like the item table.

    score_j(history) = LLM's score + weight * sum over k of w[j, k] * 1[neighbor k of item j is in the history]

The language model is trained without it; it is fitted in closed form (`linear_fit.py`), and `weight` is chosen on
validation (`evaluation/mixing.py`).

Legend: I items, K neighbors, n local rows, b queries, h pairs of query and history item.
"""

from __future__ import annotations

import logging
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from cllm4rec_dist.distributed.collectives import gather_counts
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.linear_fit import LinearSettings, item_features, ridge_weights, strongest_neighbors

logger = logging.getLogger(__name__)

_FITTED_ENTRIES = 1 << 21
"""Neighbors that a rank finds and weighs between two small collectives, in which no rank waits long for another."""
_CHUNK_ENTRIES = 1 << 20
"""Entries that are indexed at a time, of which there are several copies."""


class LinearMemory:
    """This rank's rows of the item-item matrix, as an index by neighbor; empty until it is filled.

    Args:
        partition: partition of the item rows.

    Attributes:
        num_neighbors: K, the most neighbors of an item, the same on all ranks.
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
        return self.num_neighbors == 0

    def fill(self, neighbors: Tensor, weights: Tensor, settings: LinearSettings) -> None:
        """Take this rank's rows, and index them by neighbor on the device. The arguments are not kept.

        Args:
            neighbors: int32 [n, K] item rows, each once in a row, then -1 for none; on the host, may be mapped.
            weights: fp32 [n, K], on the host; may be mapped.
        """
        assert neighbors.shape == weights.shape
        self.settings = settings
        self._num_rows, self.num_neighbors = neighbors.shape
        starts, rows, values = _by_neighbor(neighbors.numpy(), weights.numpy())
        self._starts, self._rows, self._values = (
            torch.from_numpy(part).to(self._world.device) for part in (starts, rows, values)
        )

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return new neighbors, int32 [n, K], ascending, then -1, and weights, fp32 [n, K], on the host."""
        starts, rows, values = (part.cpu().numpy() for part in (self._starts, self._rows, self._values))
        neighbors, weights = _by_row(starts, rows, values, self._num_rows, self.num_neighbors)
        return torch.from_numpy(neighbors), torch.from_numpy(weights)

    def add_scores(self, scores: Tensor, rows: Tensor, history: Tensor) -> Tensor:
        """Add the linear scores of some rows to `scores` [rows, b], in place; return which have changed. No collective.

        Args:
            scores: contiguous.
            rows: int64 local rows, ascending.
            history: int64 [h, 2] pairs (query, item), each once.

        Returns:
            int64 [e], positions in the flattened scores, of which most linear scores are zero; one may come repeatedly.
        """
        if self.is_empty or not len(rows) or not len(history):
            return history.new_empty(0)
        query, item = history.T
        low, high = self._positions(item, torch.stack([rows[0], rows[-1] + 1]))
        counts = high - low
        pair = torch.repeat_interleave(counts)
        entry = torch.arange(len(pair), device=pair.device) + (low - counts.cumsum(0) + counts)[pair]
        row = self._rows[entry].long()
        position = torch.searchsorted(rows, row)
        values = torch.where(rows[position] == row, self._values[entry], 0.0).to(scores.dtype)
        changed = position * scores.shape[1] + query[pair]
        scores.view(-1).index_add_(0, changed, values)
        return changed

    def _positions(self, items: Tensor, bounds: Tensor) -> Tensor:
        """Return where the first entry of each item with a row of at least each bound is, or would be: [bounds, h].

        By bisection of each item's entries, all at once.
        """
        items = items.clamp(max=len(self._starts) - 2)
        start, stop = self._starts[items], self._starts[items + 1]
        bounds = bounds[:, None].to(self._rows.dtype)
        below = (start - 1).expand(len(bounds), -1)  # last entry that is known to be below the bound
        for halving in reversed(range(int((stop - start).max()).bit_length())):
            further = below + (1 << halving)
            row = self._rows[further.clamp(max=len(self._rows) - 1)]
            below = torch.where((further < stop) & (row < bounds), further, below)
        return below + 1


def _by_neighbor(
    neighbors: NDArray[np.int32], weights: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """Sort the entries of [n, K] by neighbor, then by row.

    Returns:
        starts: where the entries of each item begin and end, [items + 1]; the last item has none.
        rows, values: row and weight of each entry.
    """
    num_items = int(neighbors.max(initial=-1)) + 2
    step = max(1, max(_CHUNK_ENTRIES, num_items) // max(1, neighbors.shape[1]))  # a chunk walks all items
    chunks = [slice(first, first + step) for first in range(0, len(neighbors), step)]
    starts = np.zeros(num_items + 1, np.int64)
    for chunk in chunks:
        starts += np.bincount(neighbors[chunk].ravel() + 1, minlength=num_items + 1)
    starts[0] = 0  # those were padding
    np.cumsum(starts, out=starts)
    rows, values = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
    following = starts[:-1].copy()
    for chunk in chunks:
        exists = neighbors[chunk] >= 0
        offsets = np.concatenate([[0], exists.sum(axis=1).cumsum()])
        entries = weights[chunk][exists], neighbors[chunk][exists], offsets
        _transpose(sp.csr_matrix(entries, shape=(len(exists), num_items)), chunk.start, following, rows, values)
    return starts, rows, values


def _by_row(
    starts: NDArray[np.int64], rows: NDArray[np.int32], values: NDArray[np.float32], num_rows: int, num_neighbors: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Invert `_by_neighbor`: neighbors [n, K], ascending, then -1, and weights [n, K], then 0."""
    neighbors = np.full((num_rows, num_neighbors), -1, np.int32)
    weights = np.zeros((num_rows, num_neighbors), np.float32)
    following = np.arange(num_rows) * num_neighbors
    bounds = np.searchsorted(starts, np.arange(0, len(rows), max(_CHUNK_ENTRIES, num_rows)))  # a chunk walks all rows
    for low, high in pairwise(np.unique([*bounds, len(starts) - 1]).tolist()):
        chunk = slice(starts[low], starts[high])
        entries = values[chunk], rows[chunk], starts[low : high + 1] - starts[low]
        _transpose(
            sp.csr_matrix(entries, shape=(high - low, num_rows)), low, following, neighbors.ravel(), weights.ravel()
        )
    return neighbors, weights


def _transpose(
    chunk: sp.csr_matrix, first: int, following: NDArray[np.int64], rows: NDArray[np.int32], values: NDArray[np.float32]
) -> None:
    """Append some rows of a sparse matrix to its columns, in place.

    Args:
        chunk: rows `first` and following.
        following: where in `rows` and `values` the next entry of each column belongs.
    """
    columns = chunk.tocsc()
    counts = np.diff(columns.indptr)
    position = np.repeat(following - columns.indptr[:-1], counts)
    position += np.arange(len(position))
    rows[position], values[position] = columns.indices + first, columns.data
    following += counts


def fit_linear_memory(
    memory: LinearMemory,
    train: sp.csr_matrix,
    texts: sp.csr_matrix,
    num_neighbors: int,
    settings: LinearSettings,
    world: World,
) -> None:
    """Fit and fill this rank's rows. Collective: a small all-gather for each block of items of a rank.

    Args:
        train: binary [U, I], the training interactions alone.
        texts: [I, W], from `linear_fit.text_features`.
    """
    features = item_features(train, texts, settings.text_weight, settings.history_power).with_gram()
    start, stop = memory.partition.range(world.rank)
    width, num_threads = min(num_neighbors, features.num_items - 1), torch.get_num_threads()
    neighbors, weights = np.full((stop - start, width), -1, np.int32), np.zeros((stop - start, width), np.float32)
    step = max(1, _FITTED_ENTRIES // max(1, width))
    for first in range(0, memory.partition.block, step):
        low, high = min(start + first, stop), min(start + first + step, stop)
        with world.watch.doing("fitting the linear memory"):
            part, items = slice(low - start, high - start), np.arange(low, high)
            neighbors[part] = chosen = strongest_neighbors(features, items, num_neighbors, num_threads)
            weights[part] = ridge_weights(features, items, chosen, settings, num_threads)
        gather_counts(high - start, world)
    memory.fill(torch.from_numpy(neighbors), torch.from_numpy(weights), settings)
