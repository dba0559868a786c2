"""Baseline models and the grids of settings that each is tuned over.

Popularity is the floor. EASE (`ease.py`) and iALS (`ials.py`) are strong at little cost. The title-aware EASE also uses
the item texts, so that a gain of the language model over EASE is not mistaken for a gain from text as such. Both EASE
models need dense [I, I] matrices; in a catalog that is too large for them the sparse EASE takes their place, the linear
memory tuned as a baseline.

New users, who are held out whole, are scored from their histories and are not part of the training data: EASE
multiplies a history with the weights of the training users, iALS solves for the factors of each new user alone.

Shapes: U training users, N new ones, P = U + N, I items, b users of a block.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from itertools import product

import numpy as np
import scipy.sparse as sp

from cllm4rec_dist.evaluation import ials
from cllm4rec_dist.evaluation.baseline_config import BaselineConfig
from cllm4rec_dist.evaluation.baseline_names import LABELS, BaselineName
from cllm4rec_dist.evaluation.ease import Float32Array, ease_weights, gram_blocks, gram_matrix
from cllm4rec_dist.evaluation.split_data import (
    Candidate,
    Grid,
    IntArray,
    Sample,
    Scorer,
    SplitData,
    middle_point,
    sample_items,
)
from cllm4rec_dist.model.linear_fit import (
    LinearSettings,
    item_features,
    ridge_weights,
    strongest_neighbors,
    text_features,
)

logger = logging.getLogger(__name__)

_DENSE: tuple[BaselineName, ...] = ("ease", "title_ease")
"""Baselines with dense [I, I] matrices."""
_FIT_ITEMS = 1 << 14
"""Items of the sparse EASE that are fitted at a time."""
_WORD = re.compile(r"\b\w\w+\b")  # a word of TfidfVectorizer


def has_words(texts: Sequence[str]) -> bool:
    """True if any text has a word of TF-IDF."""
    return any(_WORD.search(text) for text in texts)


def select_baselines(data: SplitData, config: BaselineConfig) -> tuple[list[BaselineName], dict[BaselineName, str]]:
    """Return the baselines that can run on a split, and the reasons for leaving out others of `config.names`."""
    reasons: dict[BaselineName, str] = {}
    num_items = data.train.shape[1]
    needed_gib = 2 * num_items**2 * np.dtype(np.float32).itemsize / 2**30
    if not has_words(data.item_texts):
        reasons["title_ease"] = "no item has a text with words"
    too_large = needed_gib > config.max_dense_gib
    if too_large:
        reason = (
            f"the dense matrices of {num_items:,} x {num_items:,} need {needed_gib:,.1f} GiB, more than"
            f" max_dense_gib, {config.max_dense_gib:g}"
        )
        reasons |= dict.fromkeys(_DENSE, reason)
    if num_items > config.max_grid_items:
        reasons["sparse_ease"] = (
            f"{num_items:,} regressions take too long (max_grid_items is {config.max_grid_items:,}); the linear"
            " memory of a run is the same model"
        )
    if "ials" in config.names and (why := ials.too_large(data, config)) is not None:
        reasons["ials"] = why
    names = ["sparse_ease" if too_large and name in _DENSE else name for name in config.names]
    kept: list[BaselineName] = [name for name in dict.fromkeys(names) if name not in reasons]
    return kept, {name: reason for name, reason in reasons.items() if name in {*config.names, *names}}


def make_grids(data: SplitData, config: BaselineConfig) -> dict[BaselineName, Grid]:
    """Return the grid of each baseline that can run (`select_baselines`)."""
    names, reasons = select_baselines(data, config)
    for name, reason in reasons.items():
        logger.warning("baseline %s is left out: %s", LABELS[name], reason)
    if not set(_DENSE).isdisjoint(names):
        gram = gram_matrix(data.train)
    grids: dict[BaselineName, Grid] = {}
    for name in names:
        if name == "popularity":
            grids[name] = Grid(_popularity(data))
        elif name == "ease":
            grids[name] = Grid(_ease(data, gram, config))
        elif name == "title_ease":
            grids[name] = Grid(_title_ease(data, gram, config))
        elif name == "sparse_ease":
            grids[name] = _sparse_ease(data, config)
        else:
            grids[name] = ials.ials_grid(data, config)
    return grids


def _popularity(data: SplitData) -> list[Candidate]:
    counts = np.asarray(data.train.sum(axis=0), dtype=np.float32).ravel()
    return [Candidate({}, lambda swept: lambda users: np.tile(counts, (len(users), 1)))]


def _linear_scorer(histories: sp.csr_matrix, weights: Float32Array) -> Scorer:
    return lambda users: histories[users] @ weights


def _ease(data: SplitData, gram: Float32Array, config: BaselineConfig) -> list[Candidate]:
    def candidate(l2: float) -> Candidate:
        return Candidate({"lambda": l2}, lambda swept: _linear_scorer(data.histories, ease_weights(gram.copy(), l2)))

    return [candidate(l2) for l2 in config.ease_lambdas]


def _title_ease(data: SplitData, gram: Float32Array, config: BaselineConfig) -> list[Candidate]:
    """EASE on the interactions stacked on sqrt(alpha) times the text features as further rows ("users")."""
    features = text_features(data.item_texts)

    def fit(alpha: float, l2: float) -> Scorer:
        stacked_gram = gram.copy()
        for rows, block in gram_blocks(features):
            stacked_gram[rows] += np.float32(alpha) * block
        return _linear_scorer(data.histories, ease_weights(stacked_gram, l2))

    def candidate(alpha: float, l2: float) -> Candidate:
        return Candidate({"alpha": alpha, "lambda": l2}, lambda swept: fit(alpha, l2))

    return [candidate(*point) for point in product(config.title_ease_alphas, config.title_ease_lambdas)]


def _sparse_ease(data: SplitData, config: BaselineConfig) -> Grid:
    """Ridge regression of each item on its strongest neighbors, as in the linear memory."""
    texts = text_features(data.item_texts)
    num_items, num_threads = data.train.shape[1], config.num_threads or os.cpu_count() or 1

    def fit(fitted: IntArray, alpha: float, l2: float) -> Scorer:
        settings = LinearSettings(alpha, l2)
        features, columns = item_features(data.train, texts, alpha), []
        for start in range(0, len(fitted), _FIT_ITEMS):
            items = fitted[start : start + _FIT_ITEMS]
            neighbors = strongest_neighbors(features, items, config.sparse_ease_neighbors, num_threads)
            weights = ridge_weights(features, items, neighbors, settings, num_threads).astype(np.float32)
            item, rank = np.nonzero(neighbors >= 0)
            entries = weights[item, rank], (neighbors[item, rank], item)
            columns.append(sp.csc_matrix(entries, shape=(num_items, len(items))))
        weights = sp.hstack(columns, format="csr")
        return lambda users: (data.histories[users] @ weights).toarray()

    def candidates(items: IntArray) -> list[Candidate]:
        def candidate(alpha: float, l2: float) -> Candidate:
            return Candidate({"alpha": alpha, "lambda": l2}, lambda swept: fit(items, alpha, l2))

        return [candidate(*point) for point in product(*axes)]

    def draw() -> Sample | None:
        drawn = sample_items(data, max(1, config.max_grid_items // num_points), num_points)
        if drawn is None:
            return None
        items, of_items = drawn
        return Sample(of_items, candidates(items), f"{len(items):,} of {num_items:,} items")

    axes = config.sparse_ease_alphas, config.sparse_ease_lambdas
    whole = candidates(np.arange(num_items))
    num_points = len(whole)
    is_small = num_points == 1 or num_items * num_points <= config.max_grid_items
    return Grid(whole) if is_small else Grid(whole, draw, num_points, middle_point(*axes))
