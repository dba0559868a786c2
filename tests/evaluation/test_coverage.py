"""Coverage, popularity and concentration of lists, compared with values computed by hand."""

import numpy as np
import pytest

from cllm4rec_dist.evaluation.coverage import CatalogUse, catalog_use, gini, most_popular, share_of_popular


def test_a_catalog_of_ten_by_hand():
    popularity = np.array([5, 1, 9, 0, 3, 2, 2, 2, 2, 2])
    counts = np.array([3, 0, 6, 1, 0, 0, 0, 0, 0, 0])
    use = catalog_use(counts, popularity)
    assert (use.num_recommended, use.coverage, use.popular_share) == (3, 0.3, 0.6)
    # Mean absolute difference / (2 mean): the pairs of 0, 0, 0, 0, 0, 0, 0, 1, 3, 6.
    pairs = np.abs(counts[:, None] - counts[None]).mean()
    assert use.gini == pytest.approx(pairs / (2 * counts.mean()))


def test_the_popular_tenth_is_rounded_up_and_ties_go_to_the_first_rows():
    assert most_popular(np.array([1, 1, 1])).tolist() == [True, False, False]
    assert most_popular(np.array([0, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0])).tolist() == [False, True, True] + [False] * 8
    assert most_popular(np.array([], dtype=int)).tolist() == []


def test_gini_at_its_ends():
    assert gini(np.array([4, 4, 4])) == pytest.approx(0.0)
    assert gini(np.array([0, 0, 0, 7])) == pytest.approx(0.75)
    assert gini(np.array([0, 0])) == 0.0
    assert gini(np.array([5])) == 0.0


def test_nothing_recommended_or_an_empty_catalog():
    assert catalog_use(np.zeros(4, dtype=int), np.ones(4, dtype=int)) == CatalogUse(0, 0.0, 0.0, 0.0)
    assert catalog_use(np.array([], dtype=int), np.array([], dtype=int)) == CatalogUse(0, 0.0, 0.0, 0.0)
    assert share_of_popular(np.array([2, 0]), np.array([0, 0])) == 1.0
