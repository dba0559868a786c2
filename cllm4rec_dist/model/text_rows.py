"""Rows of items that were not trained on, from their texts.

Two directions are added, both learned from the items that have training interactions (docs/quality.md has what each
brings, and what else was tried):

- a ridge regression from the words of an item's text to the direction of its trained row. All words are kept: singular
  vectors of the word matrix lose a tenth of Recall@20 among new items. Conjugate gradients need no matrix of
  [words, words].
- the mean of the trained rows of items with similar texts.

A large catalog has far more items than these need, so a sample of them, drawn by a hash, is fitted.

Legend: I items, N fitted items, F words, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from cllm4rec_dist.corpus.stateless_rng import keyed_bits
from cllm4rec_dist.distributed.collectives import all_gather_rows, all_reduce_sum, gather_counts
from cllm4rec_dist.distributed.topology import World

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

_L2 = 0.3
"""Strength of the ridge regression, for TF-IDF rows of unit norm."""
_HALF_WEIGHT = 10.0
"""Training interactions of an item whose row counts half as much as that of a popular item."""
_SIMILAR = 0.5
"""Weight of the mean of similar items' rows, beside 1 of the regression; both have unit norm."""
_POWER = 3
"""A similar item counts by this power of the TF-IDF cosine."""
_MIN_COSINE = 0.1
"""Lowest TF-IDF cosine that counts: the third power of a lower one is below a thousandth, and most are lower."""
_BLOCK = 256
"""Texts whose cosines are computed at once: at most [256, 50,000] in memory."""
DEFAULT_OFFSET = -1.5
"""Difference to the mean item bias, if `head.new_item_offset` is left out."""
_MAX_WORDS = 1 << 16
"""Most frequent words that are used; bounds the all-reduce of an iteration, [F, D]."""
MAX_ITEMS = 50_000
"""Most items that the regression is fitted on; 100 iterations with titles and a width of 64 take 5 CPU seconds."""
_SAMPLE = 0x7E87
"""Key of the random bits by which they are sampled."""
_MAX_ITERATIONS = 100
_TOLERANCE = 1e-4
"""Norm of the residual, relative to the right side, at which the solution is exact enough."""


def fit_ridge(features: sp.csr_matrix, targets: Tensor, weights: Tensor, l2: float, world: World) -> Tensor:
    """Return W [F, D] that minimizes sum_i weights_i |features_i W - targets_i|^2 + l2 |W|^2 over all ranks' items.

    Args:
        features: [local items, F] of this rank.
        targets: fp32 [local items, D].
        weights: fp32 [local items]; 0 leaves an item out.

    Collectives: one all-reduce of [F, D] per iteration of conjugate gradients, at most 101.
    """
    matrix = features.astype(np.float32).tocsr()
    transposed, scale = matrix.T.tocsr(), weights.cpu().numpy()[:, None]

    def summed(local: np.ndarray) -> Tensor:
        local = np.ascontiguousarray(transposed @ local, dtype=np.float32)
        return all_reduce_sum(torch.from_numpy(local).to(world.device), world, "ridge regression of item texts")

    def normal_matrix(x: Tensor) -> Tensor:
        return summed(scale * (matrix @ x.cpu().numpy())) + l2 * x

    residual = summed(scale * targets.cpu().numpy())
    solution, direction = torch.zeros_like(residual), residual
    squared = residual.square().sum(dim=0)
    enough = squared * _TOLERANCE**2
    for _ in range(_MAX_ITERATIONS):
        if bool((squared <= enough).all()):
            break
        product = normal_matrix(direction)
        step = squared / (direction * product).sum(dim=0).clamp_min(1e-30)
        solution = solution + step * direction
        residual = residual - step * product
        previous, squared = squared, residual.square().sum(dim=0)
        direction = residual + squared / previous.clamp_min(1e-30) * direction
    return solution


@dataclass(frozen=True)
class TextRows:
    """Maps item texts to rows.

    Attributes:
        vectorizer: fitted TF-IDF of the catalog's texts.
        weights: coefficients of the ridge regression, fp32 [F, D].
        words: TF-IDF of the fitted items' texts, [F, N].
        directions: fitted items' rows of unit norm, times the items' weights, fp32 [N, D] on the host.
        norm: norm of the rows; the mean of trained rows.
        bias: item bias; the mean of trained ones (0 if there are none) and the offset.
    """

    vectorizer: TfidfVectorizer
    weights: Tensor
    words: sp.csr_matrix
    directions: np.ndarray
    norm: float
    bias: float

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return fp32 rows [n, D] on the host; zeros for a text without known words."""
        features = _features(self.vectorizer, texts)
        rows = _unit_norm(features @ self.weights.cpu().numpy())
        for first in range(0, len(texts), _BLOCK):
            block = slice(first, first + _BLOCK)
            rows[block] += _SIMILAR * _unit_norm(self._similar_items(features[block]))
        return F.normalize(rows, dim=1) * self.norm

    def _similar_items(self, features: sp.csr_matrix) -> np.ndarray:
        """Return the sum of the fitted items' directions, each times a power of its cosine: fp32 [n, D]."""
        cosines = features @ self.words
        cosines.data[cosines.data < _MIN_COSINE] = 0
        cosines.eliminate_zeros()
        return cosines.power(_POWER) @ self.directions


def _unit_norm(rows: np.ndarray) -> Tensor:
    """Return the rows with unit norm; zeros stay zeros."""
    return F.normalize(torch.from_numpy(np.ascontiguousarray(rows)), dim=1)


def _features(vectorizer: TfidfVectorizer, texts: Sequence[str]) -> sp.csr_matrix:
    """Return TF-IDF rows [n, F]; n may be 0, which scikit-learn refuses."""
    if not texts:
        return sp.csr_matrix((0, len(vectorizer.vocabulary_)), dtype=np.float32)
    return vectorizer.transform(texts)


def fit_text_rows(
    texts: Sequence[str],
    interactions: np.ndarray,
    local_rows: Tensor,
    local_bias: Tensor | None,
    first: int,
    world: World,
    offset: float | None,
) -> TextRows | None:
    """Fit the map from texts to rows on the N items with interactions, or a sample of them; None if none has words.

    Args:
        texts: text of each of the I items, "" if it has none; the same on all ranks.
        interactions: int64 [I] training interactions of each item.
        local_rows: fp32 [local items, D], this rank's rows.
        local_bias: fp32 [local items, 1], or None.
        first: item of the first local row.
        offset: `head.new_item_offset`.

    Collectives: those of `fit_ridge`, all-gathers of a count and of [N, D], and an all-reduce of three numbers.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second to import

    vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32, max_features=_MAX_WORDS)
    fitted = _fitted_items(interactions)
    try:
        features = vectorizer.fit_transform([texts[item] for item in fitted.tolist()])
    except ValueError:  # no text has a word
        return None
    counts = torch.from_numpy(interactions[first : first + len(local_rows)].astype(np.float32)).to(local_rows.device)
    rows = local_rows.detach().float()
    is_local = (fitted >= first) & (fitted < first + len(local_rows))
    index = torch.from_numpy(fitted[is_local] - first).to(local_rows.device)
    directions, weights = F.normalize(rows[index], dim=1), counts[index] / (counts[index] + _HALF_WEIGHT)
    ridge = fit_ridge(features[is_local], directions, weights, _L2, world)
    all_directions = all_gather_rows(directions * weights[:, None], gather_counts(len(index), world), world)
    is_warm = counts > 0
    bias = torch.zeros_like(counts) if local_bias is None else local_bias.detach().float().squeeze(1)
    sums = torch.stack([is_warm.sum(), rows.norm(dim=1)[is_warm].sum(), bias[is_warm].sum()])
    number, norm, total_bias = all_reduce_sum(sums.double(), world, "norms of item rows").tolist()
    offset = DEFAULT_OFFSET if offset is None else offset
    return TextRows(
        vectorizer, ridge, features.T.tocsr(), all_directions.cpu().numpy(), norm / number, total_bias / number + offset
    )


def _fitted_items(interactions: np.ndarray) -> np.ndarray:
    """Return the items with interactions, or a sample of them, ascending: int64; the same on all ranks."""
    items = np.flatnonzero(interactions)
    if len(items) <= MAX_ITEMS:
        return items
    chosen = np.argsort(keyed_bits(_SAMPLE, items), kind="stable")[:MAX_ITEMS]
    return items[np.sort(chosen)]
