"""Settings of the linear memory that a run leaves open, chosen on validation, and the fit with them.

A good linear model of one catalog is a poor one of another: how much words count, how strongly weights shrink and how
long histories count depends on the data. So each open setting is moved along a grid while the memory alone ranks the
held-out items of validation better by NDCG@100. The items of a sample are fitted, with few neighbors, and ranked among
each other, so that a fit costs the same for any catalog; one of up to `_NUM_ITEMS` items is ranked whole.

Legend: U users, I items, S sampled items, K neighbors, n users with held-out items in the sample.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Self

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from cllm4rec_dist.config import LinearConfig
from cllm4rec_dist.corpus.heldout import HeldOutUsers
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.views import interaction_matrix, item_texts
from cllm4rec_dist.distributed.collectives import all_gather_rows, gather_counts, gather_integers
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.evaluation.metrics import metrics_of_scores
from cllm4rec_dist.model.linear_fit import (
    ItemFeatures,
    LinearSettings,
    item_features,
    ridge_weights,
    strongest_neighbors,
    text_features,
)
from cllm4rec_dist.model.linear_memory import fit_linear_memory
from cllm4rec_dist.system import System

logger = logging.getLogger(__name__)

_GRIDS = {
    "text_weight": (0.3, 1.0, 3.0, 10.0, 30.0),
    "regularization": (50.0, 100.0, 200.0, 500.0, 1000.0),
    "history_power": (0.0, 0.25, 0.5, 0.75),
    "dropout": (0.0, 0.33, 0.5, 0.7),
}
"""Values of each setting, the default among them."""
_NUM_ITEMS, _NUM_USERS, _NUM_NEIGHBORS = 2048, 16384, 100
"""Most sampled items and users, and neighbors of an item: with 300 a fit takes three to ten times as long."""
_METRIC = "ndcg@100"
_BLOCK_SCORES = 1 << 20
"""Scores of a block of users."""


def init_linear_memory(system: System) -> None:
    """Choose open settings and fit the linear memory of a finetuning run, unless it has none.

    Collective: `choose_settings` and `fit_linear_memory`.
    """
    config, corpus, world = system.config.linear, system.corpus, system.world
    if system.config.stage != "finetune" or config.neighbors == 0:
        return
    started = time.perf_counter()
    train = interaction_matrix(corpus.split("train"), corpus.num_items)
    texts = sp.csr_matrix((corpus.num_items, 0)) if config.text_weight == 0 else text_features(item_texts(corpus))
    settings = choose_settings(train, texts, corpus, config, world)
    num_neighbors = config.num_neighbors(corpus.num_items)
    fit_linear_memory(system.linear, train, texts, num_neighbors, settings, system.recommender.world)
    if world.is_main:
        logger.info(
            "linear memory: %d items by up to %d neighbors, %s, in %.1f s",
            corpus.num_items,
            system.linear.num_neighbors,
            ", ".join(f"{name} {value:g}" for name, value in asdict(settings).items()),
            time.perf_counter() - started,
        )


def choose_settings(
    train: sp.csr_matrix, texts: sp.csr_matrix, corpus: Corpus, config: LinearConfig, world: World
) -> LinearSettings:
    """Return the given settings and the best of those left open; the defaults if validation holds nothing out.

    Collective: for each fit two all-gathers [S, K] and one integer of all ranks.

    Args:
        train: binary [U, I], the training interactions alone.
        texts: [I, W], from `linear_fit.text_features`.
    """
    settings = LinearSettings.of(config)
    names = [name for name in _GRIDS if getattr(config, name) is None and (name != "text_weight" or texts.shape[1])]
    if not names:
        return settings
    sample = _Sample.of(corpus)
    if not len(sample.held_out):
        return settings
    num_neighbors = min(config.num_neighbors(corpus.num_items), _NUM_NEIGHBORS)

    @functools.lru_cache(1)
    def neighbors_by(text_weight: float, history_power: float) -> _Neighbors:
        features = item_features(train, texts, text_weight, history_power).with_gram()
        return _Neighbors.of(features, sample.items, num_neighbors, world)

    def ndcg(candidate: LinearSettings) -> float:
        neighbors = neighbors_by(candidate.text_weight, candidate.history_power)
        return sample.ndcg(neighbors.fit(candidate, world), world)

    return climb(settings, names, ndcg)


def climb(
    settings: LinearSettings, names: Sequence[str], value_of: Callable[[LinearSettings], float]
) -> LinearSettings:
    """Move the named settings by one step of their grids at a time, one after the other, while `value_of` rises."""
    value_of = functools.cache(value_of)
    has_moved = True
    while has_moved:
        before = settings
        for name in names:
            grid = _GRIDS[name]
            index = grid.index(getattr(settings, name))
            steps = [replace(settings, **{name: value}) for value in grid[max(0, index - 1) : index + 2]]
            settings = max([settings, *steps], key=value_of)
        has_moved = settings != before
    return settings


@dataclass(frozen=True)
class _Neighbors:
    """Neighbors of this rank's part of the sampled items, which regularization and dropout do not change.

    Attributes:
        items: [s] item rows.
        neighbors: int32 [s, K], see `linear_fit.strongest_neighbors`.
    """

    features: ItemFeatures
    items: NDArray[np.int64]
    neighbors: NDArray[np.int32]

    @classmethod
    def of(cls, features: ItemFeatures, items: NDArray[np.int64], num_neighbors: int, world: World) -> Self:
        """Find the neighbors of this rank's part of S sampled items. No collective."""
        low, high = world.local_range(0, len(items))
        with world.watch.doing("choosing the settings of the linear memory"):
            items, num_threads = items[low:high], torch.get_num_threads()
            return cls(features, items, strongest_neighbors(features, items, num_neighbors, num_threads))

    def fit(self, settings: LinearSettings, world: World) -> sp.csr_matrix:
        """Return the weights [I, S] of all sampled items. Collective: two all-gathers."""
        with world.watch.doing("choosing the settings of the linear memory"):
            weights = ridge_weights(self.features, self.items, self.neighbors, settings, torch.get_num_threads())
        counts = gather_counts(len(self.items), world)
        parts = [torch.from_numpy(part).to(world.device) for part in (self.neighbors, weights.astype(np.float32))]
        neighbors, weights = (all_gather_rows(part, counts, world).cpu().numpy() for part in parts)
        column, rank = np.nonzero(neighbors >= 0)
        entries = weights[column, rank], (neighbors[column, rank], column)
        return sp.csr_matrix(entries, shape=(self.features.num_items, sum(counts)))


@dataclass(frozen=True)
class _Sample:
    """Sampled items, and users with held-out items among them, the same on all ranks.

    Attributes:
        items: [S] item rows, ascending.
        histories: fp32 [n, I].
        held_out: n lists of positions in `items`.
    """

    items: NDArray[np.int64]
    histories: sp.csr_matrix
    held_out: Ragged

    @classmethod
    def of(cls, corpus: Corpus) -> Self:
        """Draw items and users of the validation split; always the same."""
        random, users = np.random.default_rng(0), HeldOutUsers.of(corpus, "valid")
        items = np.sort(random.choice(corpus.num_items, min(corpus.num_items, _NUM_ITEMS), replace=False))
        held_out = interaction_matrix(users.held_out, corpus.num_items)[:, items]
        chosen = np.flatnonzero(np.diff(held_out.indptr))
        if len(chosen) > _NUM_USERS:
            chosen = np.sort(random.choice(chosen, _NUM_USERS, replace=False))
        held_out = held_out[chosen]
        histories = interaction_matrix(users.histories.take(chosen), corpus.num_items)
        return cls(items, histories, Ragged(held_out.indptr.astype(np.int64), held_out.indices))

    def ndcg(self, weights: sp.csr_matrix, world: World) -> float:
        """Return the mean NDCG@100 of lists of sampled items without those of the history, by weights [I, S].

        Collective: ranks evaluate parts of the users, and all-gather one integer each.
        """
        low, high = world.local_range(0, len(self.held_out))
        num_block = max(1, _BLOCK_SCORES // len(self.items))
        total = sum(
            self._ndcg_sum(np.arange(start, min(start + num_block, high)), weights)
            for start in range(low, high, num_block)
        )
        return sum(part for (part,) in gather_integers([total], world)) / 2**32 / len(self.held_out)

    def _ndcg_sum(self, users: NDArray[np.int64], weights: sp.csr_matrix) -> int:
        """Return the sum over some users in units of 2^-32, rounded for each: it does not depend on the order."""
        histories, held_out = self.histories[users], self.held_out.take(users)
        scores = (histories @ weights).toarray()
        scores[histories[:, self.items].nonzero()] = -np.inf
        return int(np.rint(metrics_of_scores(scores, held_out, [_METRIC]) * 2**32).astype(np.int64).sum())
