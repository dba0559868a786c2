"""The linear memory compared with dense EASE, and its scores with a dense product, at 1 to 3 ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from cllm4rec_dist.config import LinearConfig
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model import linear_fit, linear_memory
from cllm4rec_dist.model.linear_fit import (
    LinearSettings,
    WordCounts,
    history_weights,
    item_features,
    ridge_weights,
    strongest_neighbors,
    text_features,
)
from cllm4rec_dist.model.linear_memory import LinearMemory, fit_linear_memory
from tests.harness import alone, run_ranks

NUM_USERS, NUM_ITEMS = 60, 23
L2, ALPHA = 3.0, 2.0
SETTINGS = LinearSettings(ALPHA, L2)
ITEMS = np.arange(NUM_ITEMS)


def interactions() -> sp.csr_matrix:
    """Interactions in two tastes; the last item has none."""
    random = np.random.default_rng(0)
    same = np.arange(NUM_USERS)[:, None] % 2 == np.arange(NUM_ITEMS)[None, :] % 2
    dense = random.random((NUM_USERS, NUM_ITEMS)) < np.where(same, 0.4, 0.05)
    dense[:, -1] = False
    return sp.csr_matrix(dense.astype(np.float32))


def texts() -> sp.csr_matrix:
    """Titles of a few words; one item has no title."""
    words = ["red", "blue", "green", "shirt", "shoe", "hat"]
    titles = [f"{words[item % 3]} {words[3 + item % 2]} number{item % 5}" for item in range(NUM_ITEMS)]
    return text_features(["", *titles[1:]])


def gram(text_weight: float, history_power: float = 0.0) -> np.ndarray:
    train, titles = interactions().toarray().astype(np.float64), texts().toarray().astype(np.float64)
    counts = train.sum(axis=1)
    user_weights = np.where(counts > 0, np.maximum(counts, 1), 1) ** -history_power
    user_weights *= counts.sum() / (user_weights * counts).sum()
    return (train.T * user_weights) @ train + text_weight * titles @ titles.T


def dense_ease(text_weight: float, history_power: float, dropout: float) -> np.ndarray:
    """Weights [from, to] in closed form (Steck 2019, equation 8), with dropout (Steck 2020)."""
    matrix = gram(text_weight, history_power)
    penalties = L2 + dropout / (1 - dropout) * np.diag(matrix)
    inverse = np.linalg.inv(matrix + np.diag(penalties))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights


def as_dense(neighbors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return weights [from, to] of rectangular arrays [to, K]."""
    dense = np.zeros((NUM_ITEMS, NUM_ITEMS))
    item, column = np.nonzero(neighbors >= 0)
    dense[neighbors[item, column], item] = weights[item, column]
    return dense


def fitted(num_neighbors: int, settings: LinearSettings, *, keeps_gram: bool) -> tuple[np.ndarray, np.ndarray]:
    features = item_features(interactions(), texts(), settings.text_weight, settings.history_power)
    features = features.with_gram() if keeps_gram else features
    neighbors = strongest_neighbors(features, ITEMS, num_neighbors)
    return neighbors, ridge_weights(features, ITEMS, neighbors, settings)


@pytest.mark.parametrize("text_weight", [0.0, ALPHA])
@pytest.mark.parametrize("num_neighbors", [NUM_ITEMS - 1, 1000])
@pytest.mark.parametrize(("history_power", "dropout"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.25), (0.0, 0.75)])
@pytest.mark.parametrize("keeps_gram", [False, True])
def test_with_all_neighbors_it_is_ease(
    text_weight: float, num_neighbors: int, history_power: float, dropout: float, keeps_gram: bool
) -> None:
    settings = LinearSettings(text_weight, L2, history_power, dropout)
    neighbors, weights = fitted(num_neighbors, settings, keeps_gram=keeps_gram)
    assert neighbors.shape == (NUM_ITEMS, NUM_ITEMS - 1)
    expected = dense_ease(text_weight, history_power, dropout)
    np.testing.assert_allclose(as_dense(neighbors, weights), expected, rtol=1e-9, atol=1e-12)


def test_a_history_counts_less_for_each_item_the_longer_it_is_and_interactions_as_much_as_before() -> None:
    train = sp.csr_matrix(np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32))
    np.testing.assert_allclose(history_weights(train, 0.0), [1, 1, 1])
    np.testing.assert_allclose(history_weights(train, 0.5), np.array([0.5, 1, 1]) * 5 / 3)
    assert history_weights(sp.csr_matrix((2, 3)), 0.5).tolist() == [0, 0]


def test_any_items_can_be_fitted() -> None:
    features = item_features(interactions(), texts(), ALPHA)
    neighbors, weights = fitted(6, SETTINGS, keeps_gram=False)
    chosen = np.array([20, 3, 7])
    np.testing.assert_array_equal(strongest_neighbors(features, chosen, 6), neighbors[chosen])
    np.testing.assert_allclose(
        ridge_weights(features, chosen, neighbors[chosen], SETTINGS), weights[chosen], rtol=1e-12
    )


def test_dropout_gives_the_weights_that_are_best_on_average_over_masks() -> None:
    """The mean squared error over all masks of two neighbors, as least squares on the masked rows."""
    train = interactions()[:, :3]
    target, (first, second) = train[:, [2]].toarray()[:, 0], train[:, :2].toarray().T.astype(np.float64)
    kept, l2 = 0.6, 1e-9
    rows, targets = [], []
    for mask in np.ndindex(2, 2):
        share = np.prod([kept if bit else 1 - kept for bit in mask])
        rows.append(np.stack([first * mask[0], second * mask[1]], axis=1) / kept * np.sqrt(share))
        targets.append(target * np.sqrt(share))
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets))[0]
    features = item_features(train, sp.csr_matrix((3, 0)), 0.0)
    settings = LinearSettings(0.0, l2, dropout=1 - kept)
    result = ridge_weights(features, np.array([2]), np.array([[0, 1]], np.int32), settings)
    np.testing.assert_allclose(result[0], expected, rtol=1e-6)


def test_a_large_catalog_keeps_no_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    features = item_features(interactions(), texts(), ALPHA)
    monkeypatch.setattr(linear_fit, "_DENSE_ITEMS", NUM_ITEMS)
    assert features.with_gram().gram is not None
    monkeypatch.setattr(linear_fit, "_DENSE_ITEMS", NUM_ITEMS - 1)
    assert features.with_gram().gram is None


@pytest.mark.parametrize("text_weight", [0.0, ALPHA])
@pytest.mark.parametrize("num_neighbors", [1, 4, 15])
@pytest.mark.parametrize("batch_entries", [1, 100, 1 << 20])
@pytest.mark.parametrize("keeps_gram", [False, True])
def test_each_item_is_a_ridge_regression_on_its_strongest_neighbors(
    monkeypatch: pytest.MonkeyPatch, text_weight: float, num_neighbors: int, batch_entries: int, keeps_gram: bool
) -> None:
    monkeypatch.setattr(linear_fit, "_BATCH_ENTRIES", batch_entries)
    neighbors, weights = fitted(num_neighbors, LinearSettings(text_weight, L2), keeps_gram=keeps_gram)
    matrix = gram(text_weight)
    scale = np.sqrt(np.diag(matrix))
    strength = np.divide(matrix, scale[None, :], out=np.zeros_like(matrix), where=scale[None, :] > 0)
    np.fill_diagonal(strength, 0.0)
    for item in range(NUM_ITEMS):
        strongest = np.sort(strength[item])[::-1][:num_neighbors]
        chosen = neighbors[item, : (strongest > 0).sum()]
        assert (np.diff(chosen) > 0).all()
        np.testing.assert_allclose(np.sort(strength[item, chosen])[::-1], strongest[strongest > 0], rtol=1e-12)
        assert (neighbors[item, len(chosen) :] == -1).all()
        system = matrix[np.ix_(chosen, chosen)] + L2 * np.eye(len(chosen))
        np.testing.assert_allclose(weights[item, : len(chosen)], np.linalg.solve(system, matrix[chosen, item]))
        assert (weights[item, len(chosen) :] == 0).all()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_which_of_equally_strong_neighbors_are_chosen_does_not_depend_on_the_block(num_threads: int) -> None:
    train = sp.csr_matrix(np.eye(2, dtype=np.float32)[:, ITEMS % 2])
    features = item_features(train, sp.csr_matrix((NUM_ITEMS, 0)), 0.0)
    together = strongest_neighbors(features, ITEMS, 3, num_threads)
    alone = [strongest_neighbors(features, ITEMS[[item]], 3)[0] for item in ITEMS]
    np.testing.assert_array_equal(together, alone)
    assert (np.diff(together) > 0).all()
    assert not (together == ITEMS[:, None]).any()
    assert (together % 2 == ITEMS[:, None] % 2).all()


def test_batches_in_several_threads_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    features = item_features(interactions(), texts(), ALPHA)
    neighbors = strongest_neighbors(features, ITEMS, 6)
    expected = ridge_weights(features, ITEMS, neighbors, SETTINGS)
    monkeypatch.setattr(linear_fit, "_BATCH_ENTRIES", 100)
    np.testing.assert_allclose(ridge_weights(features, ITEMS, neighbors, SETTINGS, num_threads=3), expected, rtol=1e-12)


@pytest.mark.parametrize("index_type", [np.int32, np.int64])
def test_items_without_features_have_no_neighbors(index_type: type) -> None:
    without = np.array([0, 7, NUM_ITEMS - 1])
    has_features = ~np.isin(ITEMS, without)
    features = item_features(
        sp.csr_matrix(interactions().multiply(has_features)),
        sp.csr_matrix(texts().multiply(has_features[:, None])),
        ALPHA,
    )
    for part in (features.rows, features.directions):
        part.indices, part.indptr = part.indices.astype(index_type), part.indptr.astype(index_type)
    assert (strongest_neighbors(features, without, 4) == -1).all()
    neighbors = strongest_neighbors(features, ITEMS, 4)
    assert (neighbors[without] == -1).all()
    assert not np.isin(neighbors, without).any()
    nothing = item_features(sp.csr_matrix((NUM_USERS, NUM_ITEMS), dtype=np.float32), sp.csr_matrix((NUM_ITEMS, 0)), 0.0)
    assert (strongest_neighbors(nothing, ITEMS, 4) == -1).all()
    for num_neighbors in (4, NUM_ITEMS):
        neighbors = strongest_neighbors(nothing, ITEMS, num_neighbors)
        assert (ridge_weights(nothing, ITEMS, neighbors, SETTINGS) == 0).all()


def test_texts_without_words_are_no_features() -> None:
    assert text_features(["", "-", "a"]).shape == (3, 0)
    features = item_features(interactions(), text_features([""] * NUM_ITEMS), ALPHA)
    assert features.rows.shape == (NUM_ITEMS + 1, NUM_USERS)


HISTORIES = [[], [0], [1, 3, 7], list(range(0, NUM_ITEMS, 2)), [NUM_ITEMS - 1]]
NUM_NEIGHBORS = 6


def filled(world: World) -> LinearMemory:
    memory = LinearMemory(RowPartition(NUM_ITEMS, world.size), world)
    assert memory.is_empty
    fit_linear_memory(memory, interactions(), texts(), NUM_NEIGHBORS, SETTINGS, world)
    return memory


def history_pairs() -> Tensor:
    return torch.tensor([(query, item) for query, items in enumerate(HISTORIES) for item in items])


def scored(world: World) -> dict[str, Tensor]:
    memory = filled(world)
    neighbors, weights = memory.rows()
    rows = torch.arange(len(neighbors))
    scores = torch.ones(len(rows), len(HISTORIES), dtype=torch.float64)
    memory.add_scores(scores, rows, history_pairs())
    return {"neighbors": neighbors, "weights": weights, "scores": scores}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_fit_and_score_as_one_dense_matrix(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(linear_memory, "_FITTED_ENTRIES", 5 * NUM_NEIGHBORS)
    ranks: list[dict[str, Any]] = run_ranks(size, scored)
    neighbors, weights = fitted(NUM_NEIGHBORS, SETTINGS, keeps_gram=True)
    parts = {name: torch.cat([rank[name] for rank in ranks]).numpy() for name in ranks[0]}
    np.testing.assert_array_equal(parts["neighbors"], neighbors)
    np.testing.assert_allclose(parts["weights"], weights, rtol=1e-6)
    histories = np.array([[float(item in items) for item in range(NUM_ITEMS)] for items in HISTORIES])
    np.testing.assert_allclose(parts["scores"], 1 + (histories @ as_dense(neighbors, weights)).T, rtol=1e-6)


def test_any_rows_can_be_scored() -> None:
    memory = filled(alone())
    every = torch.zeros(NUM_ITEMS, len(HISTORIES))
    memory.add_scores(every, torch.arange(NUM_ITEMS), history_pairs())
    for chosen in ([4], [2, 3, 4], [0, 5, 6, 20], [NUM_ITEMS - 1], []):
        rows = torch.tensor(chosen, dtype=torch.int64)
        scores = torch.zeros(len(rows), len(HISTORIES))
        memory.add_scores(scores, rows, history_pairs())
        torch.testing.assert_close(scores, every[rows])


def sparse_rows(num_rows: int, num_items: int, width: int, share: float) -> tuple[Tensor, Tensor]:
    """Rows of a linear memory with gaps at their ends, explicit zeros of both signs and rows without neighbors."""
    random = np.random.default_rng(num_rows)
    neighbors = np.full((num_rows, width), -1, np.int32)
    weights = np.zeros((num_rows, width), np.float32)
    for row in range(num_rows):
        chosen = np.flatnonzero(random.random(num_items) < share)[:width]
        neighbors[row, : len(chosen)] = chosen
        weights[row, : len(chosen)] = random.choice(np.array([0.0, -0.0, 1.5, -0.3, 2.7], np.float32), len(chosen))
    return torch.from_numpy(neighbors), torch.from_numpy(weights)


def indexed(rows: tuple[Tensor, Tensor], partition: RowPartition, rank: int) -> LinearMemory:
    memory = LinearMemory(partition, World(rank, partition.world_size, rank, torch.device("cpu")))
    start, stop = partition.range(rank)
    memory.fill(rows[0][start:stop], rows[1][start:stop], SETTINGS)
    return memory


SHAPES = [(1, 1, 1), (7, 7, 6), (5, 40, 3), (40, 5, 9), (23, 23, 22), (4, 9, 0)]
"""Rows, items and width: also more columns than entries, and rows that no item fills."""


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("chunk_entries", [1, 7, 1 << 20])
def test_rows_are_the_same_bytes_after_they_were_indexed(
    monkeypatch: pytest.MonkeyPatch, size: int, share: float, chunk_entries: int
) -> None:
    monkeypatch.setattr(linear_memory, "_CHUNK_ENTRIES", chunk_entries)
    for num_rows, num_items, width in SHAPES:
        expected, partition = sparse_rows(num_rows, num_items, width, share), RowPartition(num_rows, size)
        parts = [indexed(expected, partition, rank).rows() for rank in range(size)]
        for rows, whole in zip(zip(*parts, strict=True), expected, strict=True):
            result = torch.cat(rows)
            assert (result.dtype, result.shape) == (whole.dtype, whole.shape)
            assert result.numpy().tobytes() == whole.numpy().tobytes(), (num_rows, num_items, width)


def test_rows_in_any_order_of_their_neighbors_score_alike() -> None:
    neighbors, weights = sparse_rows(23, 23, 9, 0.3)
    mirrored = indexed((neighbors.flip(1), weights.flip(1)), RowPartition(23, 1), 0)
    for part, expected in zip(mirrored.rows(), (neighbors, weights), strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("chunk_entries", [7, 1 << 20])
def test_chunks_of_any_rows_score_as_a_dense_product(
    monkeypatch: pytest.MonkeyPatch, size: int, share: float, chunk_entries: int
) -> None:
    monkeypatch.setattr(linear_memory, "_CHUNK_ENTRIES", chunk_entries)
    random = np.random.default_rng(0)
    for num_rows, num_items, width in SHAPES:
        # New items, which are neighbors of none, may be in histories.
        in_history = random.random((5, num_items + 3)) < [[0.0], [0.1], [0.3], [0.9], [1.0]]
        history = torch.from_numpy(random.permutation(np.argwhere(in_history)))
        rows, partition = sparse_rows(num_rows, num_items, width, share), RowPartition(num_rows, size)
        matrix = torch.zeros(num_rows, num_items + 3, dtype=torch.float64)
        row, column = (rows[0] >= 0).nonzero().T
        matrix[row, rows[0][row, column].long()] = rows[1][row, column].double()
        expected = 1 + matrix @ torch.from_numpy(in_history).double().T
        for rank in range(size):
            memory, (start, stop) = indexed(rows, partition, rank), partition.range(rank)
            local = torch.arange(stop - start)
            for chosen in (local, local[::2].contiguous(), local[random.random(len(local)) < 0.6]):
                for chunk in (c for length in (1, 3, 100) for c in chosen.split(length)):
                    scores = torch.ones(len(chunk), len(in_history), dtype=torch.float64)
                    memory.add_scores(scores, chunk, history)
                    torch.testing.assert_close(scores, expected[start:stop][chunk], rtol=1e-12, atol=1e-12)


def test_a_chunk_of_rows_expands_no_entries_of_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = indexed(sparse_rows(40, 40, 39, 1.0), RowPartition(40, 1), 0)
    history, expand, expanded = torch.tensor([[0, 3], [1, 38]]), torch.repeat_interleave, []

    def record(counts: Tensor) -> Tensor:
        expanded.append(counts.tolist())
        return expand(counts)

    monkeypatch.setattr(torch, "repeat_interleave", record)
    for rows in ([5, 6, 9], [0], [39], [*range(40)]):
        memory.add_scores(torch.zeros(len(rows), 2), torch.tensor(rows), history)
    assert expanded == [[5, 5], [1, 1], [1, 1], [40, 40]]


@pytest.mark.parametrize("most", [20_000, 2])
def test_word_counts_give_the_text_features_of_a_larger_catalog(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_fit, "_WORD_ITEMS", (most, most))
    known = ["red tea tea", "", "blue tea", "blue cup", "red tea cup"]
    for texts, more in ((known, ["tea pot pot", "", "pot kettle blue"]), (known, ["?"]), (["", "-"], ["tea", "a"])):
        result, expected = WordCounts.of(texts).text_features(more), text_features([*texts, *more])
        products = [(rows @ rows.T).toarray() for rows in (result, expected)]
        np.testing.assert_allclose(*products, atol=1e-6)
        assert result.shape[0] == len(texts) + len(more)


def test_regressions_of_a_batch_take_no_room_for_columns_that_they_do_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = np.arange(80).reshape(40, 2)  # two items of each of 40 users
    train = sp.csr_matrix((np.ones(80), (np.repeat(np.arange(40), 2), pairs.ravel())), shape=(40, 80))
    features = item_features(train, sp.csr_matrix((80, 0)), 0.0)
    sizes, make = [], sp.csc_matrix

    def record(*arguments: Any, **settings: Any) -> sp.csc_matrix:
        matrix = make(*arguments, **settings)
        sizes.append(max(matrix.shape))
        return matrix

    monkeypatch.setattr(linear_fit.sp, "csc_matrix", record)
    weights = ridge_weights(features, pairs[:, 0], pairs[:, 1:].astype(np.int32), SETTINGS)
    np.testing.assert_allclose(weights, 1 / (1 + L2))
    assert max(sizes) == 80, "a row for each item and neighbor; a column for each of 40 users"


def test_large_catalogs_get_fewer_neighbors_and_rarer_words() -> None:
    config = LinearConfig()
    sizes = (100, 100_000, 200_000, 1_000_000, 10_000_000)
    assert [config.num_neighbors(size) for size in sizes] == [300, 300, 150, 30, 30]
    assert LinearConfig(neighbors=7).num_neighbors(200_000) == 7
    assert LinearConfig(max_entries=300_000_000).num_neighbors(1_000_000) == 300
    assert [linear_fit._max_word_items(size) for size in (1, 20_000, 100_000, 200_000, 10_000_000)] == [
        20_000,
        20_000,
        4_000,
        2_000,
        2_000,
    ]
