"""How a catalog is used by recommendation lists: coverage, popularity and concentration.

Legend: I items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer]

POPULAR_SHARE = 0.1
"""Share of the catalog that counts as popular: the most popular tenth."""


@dataclass(frozen=True)
class CatalogUse:
    """What a set of lists does with the catalog.

    Attributes:
        num_recommended: distinct items in any list.
        coverage: that as a share of the catalog.
        popular_share: share of all list places that items of the most popular tenth take.
        gini: 0 where every item is listed equally often, close to 1 where few items take all places.
    """

    num_recommended: int
    coverage: float
    popular_share: float
    gini: float


def most_popular(popularity: IntArray) -> NDArray[np.bool_]:
    """Mark the most popular tenth of a catalog, rounded up; equal counts in the order of the rows.

    Args:
        popularity: [I] training interactions.
    """
    num_popular = int(np.ceil(POPULAR_SHARE * len(popularity)))
    marks = np.zeros(len(popularity), dtype=np.bool_)
    marks[np.argsort(-popularity.astype(np.int64), kind="stable")[:num_popular]] = True
    return marks


def gini(counts: IntArray) -> float:
    """Gini coefficient of non-negative counts [I]: 0 for equal counts or none at all, (I - 1) / I for a single item."""
    total = counts.sum()
    if total == 0:
        return 0.0
    num_items = len(counts)
    ranks = np.arange(1, num_items + 1)
    return float((2 * ranks - num_items - 1) @ np.sort(counts) / (num_items * total))


def share_of_popular(counts: IntArray, popularity: IntArray) -> float:
    """Share of `counts` [I] that the most popular tenth has; 0 where there are no counts."""
    total = counts.sum()
    return float(counts[most_popular(popularity)].sum() / total) if total else 0.0


def catalog_use(counts: IntArray, popularity: IntArray) -> CatalogUse:
    """Measure lists by how often each item is in them.

    Args:
        counts: [I] lists that an item is in.
        popularity: [I] training interactions.
    """
    assert counts.shape == popularity.shape
    num_recommended = int(np.count_nonzero(counts))
    coverage = num_recommended / len(counts) if len(counts) else 0.0
    return CatalogUse(num_recommended, coverage, share_of_popular(counts, popularity), gini(counts))
