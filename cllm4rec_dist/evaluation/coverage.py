"""Use of the catalog by recommendation lists: coverage, popularity and concentration.

Legend: I items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer]

POPULAR_SHARE = 0.1
"""Fraction of the catalog that counts as popular."""


@dataclass(frozen=True)
class CatalogUse:
    """Use of the catalog by a set of lists.

    Attributes:
        num_recommended: number of distinct items in the lists.
        coverage: fraction of the catalog that is in at least one list.
        popular_share: fraction of all list entries that are items of the most popular tenth.
        gini: 0 if every item is listed equally often, close to 1 if few items fill all lists.
    """

    num_recommended: int
    coverage: float
    popular_share: float
    gini: float


def most_popular(popularity: IntArray) -> NDArray[np.bool_]:
    """Return bool [I], True for the most popular tenth of a catalog, rounded up; ties in the order of the rows.

    Args:
        popularity: [I] numbers of training interactions.
    """
    num_popular = int(np.ceil(POPULAR_SHARE * len(popularity)))
    marks = np.zeros(len(popularity), dtype=np.bool_)
    marks[np.argsort(-popularity.astype(np.int64), kind="stable")[:num_popular]] = True
    return marks


def gini(counts: IntArray) -> float:
    """Return the Gini coefficient of counts [I]: 0 for equal or no counts, (I - 1) / I if one item has all of them."""
    total = counts.sum()
    if total == 0:
        return 0.0
    num_items = len(counts)
    ranks = np.arange(1, num_items + 1)
    return float((2 * ranks - num_items - 1) @ np.sort(counts) / (num_items * total))


def share_of_popular(counts: IntArray, popularity: IntArray) -> float:
    """Return the fraction of `counts` [I] that belongs to the most popular tenth; 0 if there are no counts."""
    total = counts.sum()
    return float(counts[most_popular(popularity)].sum() / total) if total else 0.0


def catalog_use(counts: IntArray, popularity: IntArray) -> CatalogUse:
    """Compute the use of the catalog from how often each item is listed.

    Args:
        counts: [I] numbers of lists that contain an item.
        popularity: [I] numbers of training interactions.
    """
    assert counts.shape == popularity.shape
    num_recommended = int(np.count_nonzero(counts))
    coverage = num_recommended / len(counts) if len(counts) else 0.0
    return CatalogUse(num_recommended, coverage, share_of_popular(counts, popularity), gini(counts))
