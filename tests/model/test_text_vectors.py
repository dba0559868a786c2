"""Whitening of text vectors: uncorrelated, of unit norm, and the same at any world size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.text_vectors import whiten
from tests.harness import alone, run_ranks

NUM_ITEMS, SIZE = 401, 6


def vectors() -> Tensor:
    """Vectors with a common mean and correlated entries; every fifth item has none."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(NUM_ITEMS, SIZE, generator=random) @ torch.randn(SIZE, SIZE, generator=random) + 7
    rows[::5] = 0
    return rows


def whitened(world: World) -> Tensor:
    start, stop = RowPartition(NUM_ITEMS, world.size).range(world.rank)
    return whiten(vectors()[start:stop], world)


def test_whitened_vectors_are_uncorrelated_and_of_unit_norm() -> None:
    white = whitened(alone())
    some = white[vectors().any(dim=1)].double()
    torch.testing.assert_close(some.norm(dim=1), torch.ones(len(some), dtype=torch.float64))
    assert not white[::5].any()
    assert some.mean(0).abs().max() < 0.1
    covariance = some.T @ some / len(some) * SIZE
    torch.testing.assert_close(covariance, torch.eye(SIZE, dtype=torch.float64), rtol=0, atol=0.2)


def test_fewer_items_than_dimensions_give_finite_vectors() -> None:
    white = whiten(torch.randn(3, 50, generator=torch.Generator().manual_seed(0)), alone())
    assert white.isfinite().all()
    assert not whiten(torch.zeros(3, 5), alone()).any()


@pytest.mark.parametrize("size", [3])
def test_whitening_does_not_depend_on_the_world_size(size: int) -> None:
    torch.testing.assert_close(torch.cat(run_ranks(size, whitened)), whitened(alone()), rtol=0, atol=1e-5)
