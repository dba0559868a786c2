"""Item rows from texts: the sharded ridge regression against a dense one, and what the map returns."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cllm4rec_dist.distributed.topology import World
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


def test_a_rank_may_have_no_items() -> None:
    one, other = run_ranks(2, fit_on_two_ranks)
    torch.testing.assert_close(one, fit_on_two_ranks(alone())[0][None])
    assert torch.equal(one, other)


def test_items_without_words_have_no_map() -> None:
    assert fit_text_rows(["", ""], np.array([1, 1]), torch.ones(2, 3), None, 0, alone(), None) is None
