"""Item rows from texts: the sharded ridge regression against a dense one, and what the map returns."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfVectorizer

from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model import text_rows
from cllm4rec_dist.model.text_rows import fit_ridge, fit_text_rows
from tests.harness import alone, run_ranks

ITEMS, WORDS, WIDTH = 23, 9, 4


def problem() -> tuple[sp.csr_matrix, torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(0)
    features = sp.random(ITEMS, WORDS, density=0.4, format="csr", dtype=np.float32, rng=random)
    weights = torch.from_numpy(random.random(ITEMS).astype(np.float32))
    weights[::5] = 0
    return features, torch.from_numpy(random.standard_normal((ITEMS, WIDTH)).astype(np.float32)), weights


def solve(world: World) -> torch.Tensor:
    features, targets, weights = problem()
    bounds = {1: [0, 23], 2: [0, 20, 23], 3: [0, 11, 11, 23]}[world.size]  # uneven, and a rank without items
    local = slice(bounds[world.rank], bounds[world.rank + 1])
    return fit_ridge(features[local], targets[local], weights[local], 0.5, world)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_sharded_ridge_regression_equals_a_dense_one(size: int) -> None:
    features, targets, weights = problem()
    x, w = features.toarray().astype(np.float64), weights.double().numpy()[:, None]
    expected = np.linalg.solve(x.T @ (w * x) + 0.5 * np.eye(WORDS), x.T @ (w * targets.double().numpy()))
    for result in [solve(alone())] if size == 1 else run_ranks(size, solve):
        np.testing.assert_allclose(result.numpy(), expected, rtol=2e-3, atol=2e-3)


TEXTS = ["red tea", "green tea", "red mug", "green mug", "red tea mug", ""]


def test_a_new_text_gets_the_direction_of_items_with_its_words() -> None:
    rows = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0], [-9.0, -9.0], [1.0, 1.0]])
    bias = torch.tensor([[1.0], [1.0], [3.0], [3.0], [-99.0], [0.0]])
    counts = np.array([5, 5, 5, 5, 0, 2])
    rows_of = fit_text_rows(TEXTS, counts, rows, bias, 0, alone(), None)
    assert rows_of is not None
    red, green, unknown = rows_of(["red teapot", "green plate", "blue"])
    assert red[0] > 0.9 * rows_of.norm
    assert green[1] > 0.9 * rows_of.norm
    assert unknown.tolist() == [0, 0]
    norms = [2, 2, 2, 2, 2**0.5]
    assert rows_of.norm == pytest.approx(np.mean(norms)), "an item without interactions does not count"
    assert rows_of.bias == pytest.approx(8 / 5 - 1.5)
    raised = fit_text_rows(TEXTS, counts, rows, bias, 0, alone(), 0.25)
    assert raised is not None
    assert raised.bias == pytest.approx(8 / 5 + 0.25)
    torch.testing.assert_close(red.norm(), torch.tensor(rows_of.norm, dtype=torch.float32))


def fit_on_two_ranks(world: World) -> torch.Tensor:
    rows = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0], [-9.0, -9.0], [1.0, 1.0]])
    first, local = (0, rows) if world.rank == 0 else (6, rows[:0])
    rows_of = fit_text_rows(TEXTS, np.array([5, 5, 5, 5, 0, 2]), local, None, first, world, None)
    assert rows_of is not None
    assert rows_of([]).shape == (0, 2)
    return rows_of(["red teapot"])


def catalog() -> tuple[list[str], np.ndarray, torch.Tensor]:
    """Texts of 31 items with words of sixty, training interactions (none for every fifth), and rows."""
    random = np.random.default_rng(3)
    texts = [" ".join(f"word{word}" for word in random.integers(0, 60, random.integers(1, 40))) for _ in range(31)]
    counts = np.where(np.arange(31) % 5 == 4, 0, random.integers(1, 40, 31))
    return texts, counts, torch.from_numpy(random.standard_normal((31, WIDTH)).astype(np.float32))


NEW_TEXTS = ["word1 word2", "word3 word4 word5 word6 word7", "word8 other", "word11 word11 word0", "other"]


def new_rows(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    texts, counts, rows = catalog()
    bounds = {1: [0, 31], 2: [0, 27, 31], 3: [0, 12, 12, 31]}[world.size]  # uneven, and a rank without items
    local = slice(bounds[world.rank], bounds[world.rank + 1])
    rows_of = fit_text_rows(texts, counts, rows[local], None, local.start, world, None)
    assert rows_of is not None
    return rows_of(NEW_TEXTS), torch.cat([rows_of([text]) for text in NEW_TEXTS])


def dense_new_rows() -> np.ndarray:
    """The rows' directions, in fp64 without a sparse or a sharded matrix."""
    texts, counts, rows = catalog()
    warm = np.flatnonzero(counts)
    vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float64)
    x = vectorizer.fit_transform([texts[item] for item in warm]).toarray()
    new = vectorizer.transform(NEW_TEXTS).toarray()
    targets = F.normalize(rows[warm].double(), dim=1).numpy()
    weights = (counts[warm] / (counts[warm] + 10))[:, None]
    regression = new @ np.linalg.solve(x.T @ (weights * x) + 0.3 * np.eye(x.shape[1]), x.T @ (weights * targets))
    cosines = new @ x.T
    assert ((cosines > 0) & (cosines < 0.1)).any()
    similar = np.where(cosines < 0.1, 0, cosines**3) @ (weights * targets)
    both = F.normalize(torch.from_numpy(regression), dim=1) + 0.5 * F.normalize(torch.from_numpy(similar), dim=1)
    return F.normalize(both, dim=1).numpy()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_of_new_items_are_those_of_a_dense_computation(size: int) -> None:
    expected = dense_new_rows()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_rows, "_BLOCK", 2)
        results = [new_rows(alone())] if size == 1 else run_ranks(size, new_rows)
    for together, one_by_one in results:
        assert torch.equal(together, one_by_one), "a text's row depends on no other text"
        np.testing.assert_allclose(F.normalize(together, dim=1).numpy(), expected, rtol=2e-3, atol=2e-3)
        assert torch.equal(together, results[0][0]), "all ranks have the same rows"


def test_a_rank_may_have_no_items() -> None:
    one, other = run_ranks(2, fit_on_two_ranks)
    torch.testing.assert_close(one, fit_on_two_ranks(alone())[0][None])
    assert torch.equal(one, other)


def test_items_without_words_have_no_map() -> None:
    assert fit_text_rows(["", ""], np.array([1, 1]), torch.ones(2, 3), None, 0, alone(), None) is None


def sampled_fit(world: World, most: int | None, counts: np.ndarray) -> tuple[torch.Tensor, float, float]:
    """Fit 40 items with words of ten, of which at most `most` are sampled, and return weights, norm and bias."""
    random = np.random.default_rng(1)
    texts = [" ".join(f"word{word}" for word in random.integers(0, 10, 3)) for _ in range(40)]
    rows = torch.from_numpy(random.standard_normal((40, WIDTH)).astype(np.float32))
    bias = torch.arange(40.0)[:, None]
    first, last = world.local_range(0, 40)
    with pytest.MonkeyPatch.context() as patch:
        if most is not None:
            patch.setattr(text_rows, "MAX_ITEMS", most)
        fitted = fit_text_rows(texts, counts, rows[first:last], bias[first:last], first, world, None)
    assert fitted is not None
    return fitted.weights, fitted.norm, fitted.bias


def test_a_large_catalog_is_fitted_on_a_sample_of_its_items() -> None:
    counts = np.arange(40) % 4  # thirty items have interactions
    sampled, norm, bias = sampled_fit(alone(), 12, counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_rows, "MAX_ITEMS", 12)
        items = text_rows._fitted_items(counts)
    assert len(items) == 12
    assert (np.diff(items) > 0).all()
    assert counts[items].all()
    assert set(items) != set(np.flatnonzero(counts)[:12]), "they are drawn from the whole catalog"
    only = np.where(np.isin(np.arange(40), items), counts, 0)
    assert torch.equal(sampled, sampled_fit(alone(), None, only)[0]), "the other items have no part in the regression"
    whole, *means = sampled_fit(alone(), 30, counts)
    assert [norm, bias] == means, "lengths and biases are means of all items with interactions"
    assert not torch.equal(sampled, whole)
    assert torch.equal(whole, sampled_fit(alone(), None, counts)[0]), "as many items as the limit are all of them"
    for on_rank in run_ranks(3, sampled_fit, 12, counts):
        torch.testing.assert_close(on_rank[0], sampled, rtol=1e-3, atol=1e-3)
        assert on_rank[1:] == pytest.approx((norm, bias))


def test_items_without_interactions_change_no_bit_of_the_regression() -> None:
    counts = np.arange(40) % 4
    seen: list[tuple[sp.csr_matrix, torch.Tensor]] = []

    def with_all_items(
        features: sp.csr_matrix, targets: torch.Tensor, weights: torch.Tensor, l2: float, world: World
    ) -> torch.Tensor:
        seen.append((features, weights))
        padding = sp.csr_matrix(np.full((10, features.shape[1]), 0.5, np.float32))
        rows = torch.full((10, WIDTH), 0.5)
        return fit_ridge(
            sp.vstack([features, padding], format="csr"),
            torch.cat([targets, rows]),
            torch.cat([weights, torch.zeros(10)]),
            l2,
            world,
        )

    expected = sampled_fit(alone(), None, counts)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_rows, "fit_ridge", with_all_items)
        assert torch.equal(sampled_fit(alone(), None, counts)[0], expected)
    ((features, weights),) = seen
    assert features.shape[0] == 30
    assert (weights > 0).all()
