"""Spectral rows of a sharded matrix: those of a dense singular value decomposition, at any world size."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model import spectral
from cllm4rec_dist.model.item_features import to_sparse_csr
from cllm4rec_dist.model.spectral import RowShardedFeatures, spectral_rows
from tests.harness import alone, run_ranks

NUM_ROWS, NUM_SPARSE, NUM_DENSE = 47, 61, 5
RANK = 8
"""Singular values after these are several times smaller, so that the truncation is well defined."""


def matrix() -> np.ndarray:
    """A matrix of many zeros with a gap in its singular values, and two rows of zeros."""
    random = np.random.default_rng(0)
    groups = np.arange(NUM_ROWS)[:, None] % RANK == np.arange(NUM_SPARSE)[None] % RANK
    part = groups * random.uniform(0.7, 1.3, (NUM_ROWS, NUM_SPARSE))
    dense = 0.1 * random.standard_normal((NUM_ROWS, NUM_DENSE))
    whole = np.concatenate([part, dense], axis=1)
    whole[[3, 40]] = 0
    return whole


def local_features(world: World, *, num_dense: int = NUM_DENSE) -> tuple[RowShardedFeatures, RowPartition]:
    partition = RowPartition(NUM_ROWS, world.size)
    local = matrix()[slice(*partition.range(world.rank))]
    sparse = sp.csr_matrix(local[:, : NUM_SPARSE + NUM_DENSE - num_dense])
    dense = torch.from_numpy(local[:, NUM_SPARSE + NUM_DENSE - num_dense :]).float()
    return RowShardedFeatures(to_sparse_csr(sparse, world), to_sparse_csr(sparse.T.tocsr(), world), dense), partition


def noise(partition: RowPartition, num_factors: int, world: World) -> Tensor:
    whole = torch.randn(NUM_ROWS, num_factors, generator=torch.Generator().manual_seed(0))
    return whole[slice(*partition.range(world.rank))].clone()


def rows_of(world: World, num_factors: int, block_bytes: int = 1 << 20, **options: Any) -> Tensor:
    spectral._BLOCK_BYTES = block_bytes  # the process ends with the test
    features, partition = local_features(world, **options)
    return spectral_rows(features, noise(partition, num_factors, world), world)


def dense_rows(num_factors: int) -> Tensor:
    left, values, _ = np.linalg.svd(matrix(), full_matrices=False)
    exact = left[:, :num_factors] * np.sqrt(values[:num_factors])
    exact[[3, 40]] = 0  # but for rounding, which the division would enlarge
    return torch.from_numpy(exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-6))


@pytest.mark.parametrize("num_factors", [RANK, NUM_ROWS])
def test_scores_are_those_of_the_dense_decomposition(num_factors: int) -> None:
    rows, exact = rows_of(alone(), num_factors).double(), dense_rows(num_factors)
    torch.testing.assert_close(rows @ rows.T, exact @ exact.T, rtol=0, atol=1e-4)
    assert not rows[[3, 40]].any()


def test_a_dense_block_is_as_good_as_a_sparse_one() -> None:
    torch.testing.assert_close(rows_of(alone(), RANK), rows_of(alone(), RANK, num_dense=0), rtol=0, atol=1e-5)


def test_blocks_of_factors_do_not_matter() -> None:
    one_at_a_time = rows_of(alone(), RANK, block_bytes=1)
    torch.testing.assert_close(one_at_a_time, rows_of(alone(), RANK), rtol=0, atol=1e-5)


def test_more_factors_than_the_rank_of_the_matrix_change_nothing() -> None:
    features, partition = local_features(alone(), num_dense=0)
    dense = sp.csr_matrix(matrix()[:, :NUM_SPARSE] * 0 + np.outer(np.arange(NUM_ROWS), np.ones(NUM_SPARSE)))
    features = RowShardedFeatures(
        to_sparse_csr(dense, alone()), to_sparse_csr(dense.T.tocsr(), alone()), features.dense
    )
    rows = spectral_rows(features, noise(partition, 6, alone()), alone())
    cosines = rows[1:] @ rows[1:].T
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-3)
    assert not rows[0].any()


def test_a_matrix_without_entries_gives_rows_of_zeros() -> None:
    empty = sp.csr_matrix((NUM_ROWS, 4), dtype=np.float32)
    features = RowShardedFeatures(
        to_sparse_csr(empty, alone()), to_sparse_csr(empty.T.tocsr(), alone()), torch.zeros(NUM_ROWS, 0)
    )
    rows = spectral_rows(features, torch.randn(NUM_ROWS, 4), alone())
    assert rows.shape == (NUM_ROWS, 4)
    assert not rows.any()


@pytest.mark.parametrize("size", [2, 3])
def test_rows_do_not_depend_on_the_world_size(size: int) -> None:
    # With blocks of one factor there are more collectives than in any real run.
    rows = torch.cat(run_ranks(size, rows_of, RANK, 1))
    torch.testing.assert_close(rows, rows_of(alone(), RANK), rtol=0, atol=1e-5)


def slow_rows(world: World) -> float:
    """Seconds of a computation in which one rank takes 0.4 s for each product."""
    product = RowShardedFeatures.product

    def slow(features: RowShardedFeatures, x: Tensor, world: World) -> Tensor:
        time.sleep(0.4 * world.rank)
        return product(features, x, world)

    RowShardedFeatures.product = slow  # type: ignore[assignment, method-assign]  # the process ends with the test
    started = time.monotonic()
    rows_of(world, RANK)
    return time.monotonic() - started


@pytest.mark.slow
def test_a_computation_longer_than_the_timeout_of_collectives_does_not_end_a_run() -> None:
    timeout = 2.0
    assert min(run_ranks(2, slow_rows, timeout=timeout)) > 2 * timeout
