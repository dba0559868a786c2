"""Initial rows: equal at any world size, scaled like the words, item rows from interactions and texts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from cllm4rec_dist.config import EmbeddingsConfig
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.embedding_init import init_content, init_items, init_prior, spectral_item_init, standard_normal
from cllm4rec_dist.model.sharded_embedding import RowShardedEmbedding
from tests.harness import alone, run_ranks

SCALE = 0.02
NUM_ROWS = 9001  # three noise blocks of 4,096 rows, which no shard of 2 or 3 ranks begins or ends with
WIDTH = 6


def table(num_rows: int, width: int, world: World) -> RowShardedEmbedding:
    return RowShardedEmbedding(num_rows, width, world, sparse_gradients=False)


def directions() -> Tensor:
    """Unit rows, and zero for every third item."""
    rows = torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    rows = rows / rows.norm(dim=1, keepdim=True)
    rows[::3] = 0
    return rows


def started(world: World) -> dict[str, Tensor]:
    users, items, content = (table(NUM_ROWS, WIDTH, world) for _ in range(3))
    few = table(2, WIDTH, world)  # more ranks than rows
    init_prior(users, SCALE, world, seed=3, index=1)
    init_items(items, directions() if world.is_main else None, SCALE, world, seed=3)
    init_content(content, items, EmbeddingsConfig(lambda_l=0.1, lambda_c=0.4), SCALE, world, seed=3, index=2)
    init_prior(few, SCALE, world, seed=3, index=1)
    tables = {"users": users, "items": items, "content": content, "few": few}
    return {name: rows.local_rows.detach().clone() for name, rows in tables.items()}


@pytest.fixture(scope="module")
def starts() -> dict[int, dict[str, Tensor]]:
    """Whole tables by world size."""
    whole: dict[int, dict[str, Tensor]] = {}
    for size in (1, 2, 3):
        ranks = run_ranks(size, started)
        whole[size] = {name: torch.cat([rank[name] for rank in ranks]) for name in ranks[0]}
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ["users", "items", "content", "few"])
@pytest.mark.parametrize("size", [2, 3])
def test_initial_rows_do_not_depend_on_the_world_size(starts: Any, size: int, name: str) -> None:
    torch.testing.assert_close(starts[size][name], starts[1][name], rtol=0, atol=0)


def test_items_start_from_their_direction_or_from_the_prior(starts: Any) -> None:
    items, direction = starts[1]["items"], directions()
    has_direction = direction.norm(dim=1) > 0
    expected = direction[has_direction] * math.sqrt(WIDTH) * SCALE
    torch.testing.assert_close(items[has_direction], expected)
    # Both kinds have entries of root mean square `scale`.
    for part in (items[has_direction], items[~has_direction]):
        assert part.square().mean().sqrt().item() == pytest.approx(SCALE, rel=0.02)


def test_collaborative_rows_are_samples_of_the_prior() -> None:
    rows = table(20_000, 10, alone())
    init_prior(rows, SCALE, alone(), seed=0, index=1)
    values = rows.local_rows.detach().double()
    assert values.std().item() == pytest.approx(SCALE, rel=0.01)
    assert abs(values.mean().item()) < SCALE * 0.01
    # Fourth moment of a normal distribution: three times the squared variance.
    assert values.pow(4).mean().item() == pytest.approx(3 * SCALE**4, rel=0.05)
    assert len(rows.local_rows.unique(dim=0)) == 20_000, "a row comes twice"


@pytest.mark.parametrize(
    ("lambda_l", "lambda_c", "ratio"),
    [(0.1, 0.4, 0.5), (1e-3, 1e-2, math.sqrt(0.1)), (0.4, 0.1, 1.0), (0.1, 0.0, 1.0), (0.0, 0.0, 1.0), (0.0, 0.1, 0.0)],
)
def test_content_rows_are_samples_around_the_collaborative_ones(lambda_l: float, lambda_c: float, ratio: float) -> None:
    collaborative, content = table(20_000, 10, alone()), table(20_000, 10, alone())
    init_prior(collaborative, SCALE, alone(), seed=0, index=1)
    init_content(
        content, collaborative, EmbeddingsConfig(lambda_l=lambda_l, lambda_c=lambda_c), SCALE, alone(), seed=0, index=2
    )
    difference = (content.local_rows - collaborative.local_rows).detach().double()
    assert difference.std().item() == pytest.approx(SCALE * ratio, rel=0.01, abs=1e-9)
    if ratio:
        pair = torch.stack([difference.flatten(), collaborative.local_rows.detach().double().flatten()])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.02, "the noise must not depend on the rows"


def test_noise_depends_on_seed_and_table() -> None:
    partition = RowPartition(50, 1)

    def noise(seed: int, index: int) -> Tensor:
        return standard_normal(partition, 4, alone(), seed, index)

    assert torch.equal(noise(1, 0), noise(1, 0))
    assert not torch.equal(noise(1, 0), noise(2, 0))
    assert not torch.equal(noise(1, 0), noise(1, 1))


def matrices() -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Interactions of 30 users with 12 items in two tastes; words that pair other items; item 11 has neither."""
    random = np.random.default_rng(0)
    train = np.zeros((30, 12), dtype=np.float32)
    for user in range(30):
        train[user, random.choice(np.arange(user % 2, 11, 2), 3, replace=False)] = 1
    words = np.zeros((12, 8), dtype=np.float32)
    for item in range(11):
        words[item, item // 3] = 2
        words[item, 4 + item % 4] = 1
    return sp.csr_matrix(train), sp.csr_matrix(words)


def test_items_have_a_direction_of_unit_norm_or_zero_without_data() -> None:
    rows = spectral_item_init(*matrices(), text_weight=0.4, width=16, seed=0)
    assert rows.shape == (12, 16)
    assert rows.dtype is torch.float32
    torch.testing.assert_close(rows[:11].norm(dim=1), torch.ones(11))
    assert not rows[11].any()


def test_items_of_one_taste_are_nearer_to_each_other() -> None:
    train, words = matrices()
    rows = spectral_item_init(train, words, text_weight=0.0, width=16, seed=0)
    cosines = rows[:11] @ rows[:11].T
    same = torch.arange(11)[:, None] % 2 == torch.arange(11)[None] % 2
    off_diagonal = ~torch.eye(11, dtype=torch.bool)
    assert cosines[same & off_diagonal].mean() > cosines[~same].mean() + 0.2


def test_a_text_weight_of_zero_ignores_the_texts() -> None:
    train, words = matrices()
    without = spectral_item_init(train, sp.csr_matrix(words.shape, dtype=np.float32), text_weight=0.4, width=16, seed=0)
    assert torch.equal(spectral_item_init(train, words, text_weight=0.0, width=16, seed=0), without)
    assert not torch.allclose(spectral_item_init(train, words, text_weight=0.4, width=16, seed=0), without, atol=1e-3)


def test_an_item_without_interactions_starts_from_its_texts() -> None:
    train, words = matrices()
    train = sp.csr_matrix(train.toarray() * (np.arange(12) != 5))
    rows = spectral_item_init(train, words, text_weight=0.4, width=16, seed=0)
    assert rows[5].norm().item() == pytest.approx(1.0)
    assert not spectral_item_init(train, words, text_weight=0.0, width=16, seed=0)[5].any()


def test_directions_have_the_cosines_of_the_exact_decomposition() -> None:
    train, words = matrices()
    x = train.toarray().astype(np.float64)
    x /= np.sqrt(np.maximum(x.sum(1, keepdims=True), 1)) * np.sqrt(np.maximum(x.sum(0, keepdims=True), 1))
    left, values, _ = np.linalg.svd(x.T, full_matrices=False)
    exact = left[:, :4] * np.sqrt(values[:4])
    exact = exact[:11] / np.linalg.norm(exact[:11], axis=1, keepdims=True)
    rows = spectral_item_init(train, words, text_weight=0.0, width=4, seed=0)[:11].double().numpy()
    np.testing.assert_allclose(rows @ rows.T, exact @ exact.T, atol=1e-4)
