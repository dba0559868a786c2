"""Items that no corpus has, from their texts: rows, biases and linear memory, as if the corpus had them.

A new item gets what an item without training interactions gets (`cold_items.py`, `model/linear_fit.py`). The weights
of the items of the corpus stay, so that a new item in a history adds to the linear scores of new items alone.

Legend: I items of the corpus, n new items, K neighbors.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.views import interaction_matrix, item_texts
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.model.linear_fit import (
    LinearSettings,
    WordCounts,
    item_features,
    ridge_weights,
    strongest_neighbors,
)
from cllm4rec_dist.model.linear_memory import LinearMemory
from cllm4rec_dist.model.new_items import NewItems
from cllm4rec_dist.model.text_rows import MAX_ITEMS, TextRows, fit_text_rows
from cllm4rec_dist.system import InferenceSystem

_SHOWN = 60
"""Characters of a text that an error message repeats."""


@dataclass(frozen=True)
class TextItems:
    """Adds items to a loaded system by their texts; whole on every rank. Thread-safe.

    Attributes:
        rows_of: map from texts to rows.
        linear: what the linear memory of a new item is fitted on; None if the run has none, or none of texts.
    """

    rows_of: TextRows
    linear: _LinearData | None

    @classmethod
    def fit(cls, system: InferenceSystem) -> TextItems:
        """Fit the map from texts to rows on the items of a loaded system. Collective (`fit_text_rows`).

        Raises:
            DataError: if no item with training interactions has a text.
        """
        model, corpus = system.recommender, system.corpus
        first, _ = model.item_partition.range(model.world.rank)
        texts = item_texts(corpus)
        rows_of = fit_text_rows(
            texts,
            corpus.training_counts(),
            model.collaborative.items.local_rows,
            model.head.local_bias,
            first,
            model.world,
            system.config.head.new_item_offset,
        )
        if rows_of is None:
            raise DataError(
                "new_items",
                corpus.manifest.name,
                "has no item with words in its title or description, so that texts of new ones mean nothing to the run",
                "Prepare the corpus with texts of its items, and train again.",
            )
        uses_words = not system.linear.is_empty and system.linear.settings.text_weight > 0
        return cls(rows_of, _LinearData(corpus.split("train"), WordCounts.of(texts)) if uses_words else None)

    @torch.no_grad()
    def add(self, system: InferenceSystem, text_by_id: Mapping[str, str]) -> InferenceSystem:
        """Return the system with n new items, instead of those that it has; tables and weights are shared.

        Args:
            text_by_id: text of each, by external id, in the order of their rows.

        Raises:
            DataError: for a text without any word of the trained items' texts.
        """
        texts, device = [*text_by_id.values()], system.world.device
        rows = self.rows_of(texts)
        unknown = (rows.norm(dim=1) == 0).nonzero().flatten().tolist()
        if unknown:
            name, text = [*text_by_id.items()][unknown[0]]
            raise DataError(
                f"new_items: text of {name!r}",
                text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...",
                "has no word that a trained item's title or description has (in a catalog of more than"
                f" {MAX_ITEMS:,}, a sampled item's), so that nothing is known of it",
                "Write more of the text, in the language of the other items, or leave the item out.",
            )
        rows = rows.to(device)
        bias = torch.full((len(rows), 1), self.rows_of.bias, device=device)
        linear = LinearMemory(RowPartition(len(rows), 1), World(0, 1, 0, device))
        if self.linear is not None:
            settings = system.linear.settings
            linear.fill(*self.linear.fit(texts, system.config.linear.neighbors, settings), settings)
        return replace(
            system,
            new_items=NewItems(rows, system.recommender.head.output_weight(rows, bias), linear),
            prompts=system.prompts.with_num_items(system.corpus.num_items + len(rows)),
        )


class LazyTextItems:
    """`TextItems` of a loaded system in one process, fitted when first needed. Thread-safe."""

    def __init__(self, system: InferenceSystem) -> None:
        self._system, self._lock = system, threading.Lock()
        self._fitted: TextItems | None = None

    def get(self) -> TextItems:
        """Return it. Raises DataError as `TextItems.fit`."""
        with self._lock:
            if self._fitted is None:
                self._fitted = TextItems.fit(self._system)
            return self._fitted


@dataclass(frozen=True)
class _LinearData:
    """Training interactions and words of the corpus, kept in memory: requests read no files.

    Attributes:
        train: training items of each user.
        words: words of the I items.
    """

    train: Ragged
    words: WordCounts
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fit(self, texts: Sequence[str], num_neighbors: int, settings: LinearSettings) -> tuple[Tensor, Tensor]:
        """Return neighbors int32 [n, K] and weights fp32 [n, K] of new items, as of items I, I + 1, ... of a corpus."""
        words = self.words.text_features(texts)
        num_items, first = words.shape[0], words.shape[0] - len(texts)
        train, items = interaction_matrix(self.train, num_items), np.arange(first, num_items)
        features = item_features(train, words, settings.text_weight, settings.history_power)
        neighbors = strongest_neighbors(features, items, num_neighbors)
        with self.lock:  # it limits the threads of BLAS and then restores the limit, which may be another thread's
            weights = ridge_weights(features, items, neighbors, settings, torch.get_num_threads())
        return torch.from_numpy(neighbors), torch.from_numpy(weights.astype(np.float32))
