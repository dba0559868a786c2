"""Exact top-K over row shards compared with a stable sort of the whole score matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.evaluation import sharded_topk as sharded_topk_module
from cllm4rec_dist.evaluation.sharded_topk import (
    LINEAR_ALONE,
    LLM_ALONE,
    Queries,
    mixed_topk,
    score_deviations,
    sharded_topk,
)
from cllm4rec_dist.model.linear_fit import LinearSettings
from cllm4rec_dist.model.linear_memory import LinearMemory
from tests.harness import alone, run_ranks

WIDTH, NUM_ITEMS = 4, 37
WORLDS = [1, 2, 3, 4]
USERS = {1: [5], 2: [4, 0], 3: [2, 0, 5], 4: [1, 3, 0, 2]}
CUTOFFS = [1, 7, 20, NUM_ITEMS]  # 20 and 37 are more than a shard of 2 or more ranks holds
MAX_LOGITS = [1, 60, 1 << 20]
KINDS = ["distinct", "ties", "equal"]


def case(size: int, kind: str) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Return every rank's queries, all rows, and every rank's seen pairs.

    `ties`: scores are small integers, so that most of them are repeated. `equal`: all scores are equal.
    """
    random = torch.Generator().manual_seed(size)
    counts = USERS[size]
    queries = torch.randn(sum(counts), WIDTH, generator=random, dtype=torch.float64)
    rows = torch.randn(NUM_ITEMS, WIDTH, generator=random, dtype=torch.float64)
    if kind != "distinct":  # sums of integers are exact in any order
        queries, rows = queries.round().clamp(-1, 1), rows.round().clamp(-1, 1)
    if kind == "equal":
        rows = rows[:1].expand(NUM_ITEMS, -1).contiguous()
    seen = []
    for rank, count in enumerate(counts):
        # The first user has seen many items, the second one none.
        pairs = [(user, row) for user in range(count) for row in range(rank, NUM_ITEMS, 2 + user) if user != 1]
        seen.append(torch.tensor(pairs, dtype=torch.int64).view(-1, 2))
    return list(queries.split(counts)), rows, seen


def ranked(world: World) -> dict[str, tuple[Tensor, Tensor]]:
    partition = RowPartition(NUM_ITEMS, world.size)
    start, stop = partition.range(world.rank)
    results = {}
    for kind in KINDS:
        queries, rows, seen = case(world.size, kind)
        for cutoff in CUTOFFS:
            for max_logits in MAX_LOGITS:
                results[f"{kind}-{cutoff}-{max_logits}"] = sharded_topk(
                    queries[world.rank], rows[start:stop], cutoff, seen[world.rank], partition, world, max_logits
                )
    return results


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, tuple[Tensor, Tensor]]]]:
    return {size: run_ranks(size, ranked) for size in WORLDS}


def expected(queries: Tensor, rows: Tensor, seen: Tensor, cutoff: int) -> tuple[Tensor, Tensor]:
    """Sort by score, highest first, equal ones by row."""
    scores = queries @ rows.T
    scores[seen[:, 0], seen[:, 1]] = -torch.inf
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :cutoff]
    return scores.gather(1, order), order


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_logits", MAX_LOGITS)
@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("size", WORLDS)
def test_ranking_equals_a_stable_sort_of_all_scores(
    ranks: Any, size: int, cutoff: int, max_logits: int, kind: str
) -> None:
    queries, rows, seen = case(size, kind)
    for rank in range(size):
        scores, items = ranks[size][rank][f"{kind}-{cutoff}-{max_logits}"]
        exact_scores, exact_items = expected(queries[rank], rows, seen[rank], cutoff)
        assert scores.shape == items.shape == (USERS[size][rank], cutoff)
        torch.testing.assert_close(scores, exact_scores)
        # The order of excluded items at the end does not matter, as long as each is listed once.
        kept = exact_scores > -torch.inf
        assert items[kept].tolist() == exact_items[kept].tolist()
        for row in items.tolist():
            assert len(set(row)) == cutoff
            assert set(row) <= set(range(NUM_ITEMS))


CANDIDATES = {"few": range(30, 34), "every third": range(1, NUM_ITEMS, 3), "all": range(NUM_ITEMS)}


def ranked_candidates(world: World) -> dict[str, tuple[Tensor, Tensor]]:
    partition = RowPartition(NUM_ITEMS, world.size)
    start, stop = partition.range(world.rank)
    queries, rows, seen = case(world.size, "ties")
    results = {}
    for name, chosen in CANDIDATES.items():
        mask = torch.zeros(NUM_ITEMS, dtype=torch.bool)
        mask[list(chosen)] = True
        for cutoff in {1, len(chosen)}:
            results[f"{name}-{cutoff}"] = sharded_topk(
                queries[world.rank], rows[start:stop], cutoff, seen[world.rank], partition, world, candidates=mask
            )
    return results


@pytest.mark.parametrize("size", WORLDS)
def test_candidates_alone_are_ranked_as_in_the_whole_catalog(size: int) -> None:
    queries, rows, seen = case(size, "ties")
    for rank, results in enumerate(run_ranks(size, ranked_candidates)):
        for name, chosen in CANDIDATES.items():
            for cutoff in {1, len(chosen)}:
                scores, items = results[f"{name}-{cutoff}"]
                whole_scores, whole_items = expected(queries[rank], rows, seen[rank], NUM_ITEMS)
                for query, (got, order) in enumerate(zip(items.tolist(), whole_items.tolist(), strict=True)):
                    exact = [item for item in order if item in chosen]
                    left = int(torch.isfinite(scores[query]).sum())
                    exact_scores = whole_scores[query][[order.index(item) for item in exact]]
                    assert left == min(cutoff, int(torch.isfinite(exact_scores).sum()))
                    assert got[:left] == exact[:left]
                    assert set(got) <= set(chosen)
                    torch.testing.assert_close(scores[query, :left], exact_scores[:left])


@pytest.mark.parametrize("size", WORLDS)
def test_seen_items_are_ranked_last(ranks: Any, size: int) -> None:
    _, _, seen = case(size, "distinct")
    for rank in range(size):
        scores, items = ranks[size][rank][f"distinct-{NUM_ITEMS}-{MAX_LOGITS[0]}"]
        for user in range(USERS[size][rank]):
            left_out = set(seen[rank][seen[rank][:, 0] == user, 1].tolist())
            hidden = items[user][scores[user] == -torch.inf].tolist()
            assert set(hidden) == left_out
            assert set(items[user].tolist()[: NUM_ITEMS - len(left_out)]).isdisjoint(left_out)


@pytest.mark.parametrize("num_items", [64, 640, 1000])  # 1,000: the last chunk and the last group are short
@pytest.mark.parametrize("num_best", [1, 3, 9, 50])  # fewer and more than a chunk of 400 has groups
@pytest.mark.parametrize("rising", [False, True])
def test_groups_of_neighbouring_rows_do_not_change_the_ranking(num_items: int, num_best: int, rising: bool) -> None:
    random = torch.Generator().manual_seed(num_items)
    queries = torch.randint(-1, 2, (5, WIDTH), generator=random).double()
    rows = torch.randint(-2, 3, (num_items, WIDTH), generator=random).double()
    if rising:  # every chunk beats the ones before it
        rows += torch.arange(num_items)[:, None] // 100 * queries[0]
    seen = torch.stack([torch.arange(5).repeat_interleave(60), torch.randint(num_items, (300,), generator=random)], 1)
    scores, items = sharded_topk(queries, rows, num_best, seen, RowPartition(num_items, 1), alone(), 5 * 400)
    exact_scores, exact_items = expected(queries, rows, seen, num_best)
    torch.testing.assert_close(scores, exact_scores)
    kept = exact_scores > -torch.inf
    assert items[kept].tolist() == exact_items[kept].tolist()


def test_scores_that_are_mostly_equal_keep_few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(2)
    scores = torch.randint(1, 4, (1600, 7), generator=random) * (torch.rand(1600, 7, generator=random) < 0.001)
    scores[:, 0] = 0.0
    counts = []

    def counted(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        found = above_threshold(*arguments)
        counts.append(len(found[0]))
        return found

    above_threshold = sharded_topk_module._above_threshold
    monkeypatch.setattr(sharded_topk_module, "_above_threshold", counted)
    for num_chunks in (1, 4):
        best = sharded_topk_module._RunningTopk(torch.empty(7, 2), 5, 1600)
        for start in range(0, 1600, 1600 // num_chunks):
            best.add(scores[start : start + 1600 // num_chunks].float(), start)
        values, rows = scores.T.float().sort(dim=1, descending=True, stable=True)
        assert torch.equal(best.scores, values[:, :5])
        assert torch.equal(best.rows, rows[:, :5])
    assert max(counts) <= 7 * 1600 // 8


WEIGHTS = [0.5, LLM_ALONE, LINEAR_ALONE, 8.0]
NUM_NEIGHBORS = 5


def linear_matrix() -> Tensor:
    """Weights [to, from] of multiples of 1/4, at most `NUM_NEIGHBORS` in a row and none in some."""
    random = torch.Generator().manual_seed(9)
    matrix = torch.randint(-4, 9, (NUM_ITEMS, NUM_ITEMS), generator=random).double() / 4
    kept = torch.rand(NUM_ITEMS, NUM_ITEMS, generator=random).argsort(dim=1) < NUM_NEIGHBORS
    kept[3] = False
    return torch.where(kept, matrix, 0.0)


def memory_of(world: World) -> LinearMemory:
    memory = LinearMemory(RowPartition(NUM_ITEMS, world.size), world)
    start, stop = memory.partition.range(world.rank)
    matrix = linear_matrix()[start:stop]
    order = (matrix != 0).int().argsort(dim=1, descending=True, stable=True)[:, :NUM_NEIGHBORS]
    weights = matrix.gather(1, order)
    memory.fill(torch.where(weights != 0, order, -1).int(), weights.float(), LinearSettings())
    return memory


def histories(size: int) -> list[Tensor]:
    """Pairs (query, item) of each rank; the last query of each rank has no history."""
    pairs = [
        [(query, item) for query in range(count - 1) for item in range(query, NUM_ITEMS, 3 + rank)]
        for rank, count in enumerate(USERS[size])
    ]
    return [torch.tensor(part, dtype=torch.int64).view(-1, 2) for part in pairs]


def mixed(world: World) -> dict[str, Any]:
    memory = memory_of(world)
    start, stop = memory.partition.range(world.rank)
    vectors, rows, seen = case(world.size, "ties")
    queries = Queries(vectors[world.rank], histories(world.size)[world.rank])
    mask = torch.zeros(NUM_ITEMS, dtype=torch.bool)
    mask[list(CANDIDATES["every third"])] = True
    results: dict[str, Any] = {"deviations": score_deviations(queries, rows[start:stop], memory, world)}
    for name, candidates in {"all": None, "every third": mask}.items():
        for max_logits in MAX_LOGITS:
            results[f"{name}-{max_logits}"] = mixed_topk(
                queries, rows[start:stop], memory, WEIGHTS, 7, seen[world.rank], world, max_logits, candidates
            )
    return results


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sums_with_the_linear_memory_equal_a_stable_sort_of_all_scores(size: int) -> None:
    vectors, rows, seen = case(size, "ties")
    linear = linear_matrix()
    pairs = histories(size)
    by_rank = []
    for rank, results in enumerate(run_ranks(size, mixed)):
        history = torch.zeros(len(vectors[rank]), NUM_ITEMS, dtype=torch.float64)
        history[pairs[rank][:, 0], pairs[rank][:, 1]] = 1.0
        dots, added = vectors[rank] @ rows.T, history @ linear.T
        by_rank.append(torch.stack([dots.std(dim=1, correction=0), added.std(dim=1, correction=0)], dim=1))
        for name, chosen in {"all": CANDIDATES["all"], "every third": CANDIDATES["every third"]}.items():
            for max_logits in MAX_LOGITS:
                for weight, (scores, items) in zip(WEIGHTS, results[f"{name}-{max_logits}"], strict=True):
                    exact = added.clone() if weight == LINEAR_ALONE else dots + weight * added
                    exact[seen[rank][:, 0], seen[rank][:, 1]] = -torch.inf
                    left_out = torch.ones(NUM_ITEMS, dtype=torch.bool)
                    left_out[list(chosen)] = False
                    exact[:, left_out] = -torch.inf
                    order = exact.argsort(dim=1, descending=True, stable=True)[:, :7]
                    torch.testing.assert_close(scores, exact.gather(1, order))
                    kept = scores > -torch.inf
                    assert items[kept].tolist() == order[kept].tolist(), (name, max_logits, weight)
    torch.testing.assert_close(results["deviations"], torch.cat(by_rank))


def test_selected_queries_keep_their_histories() -> None:
    queries = Queries(torch.arange(8.0).view(4, 2), torch.tensor([[0, 5], [2, 6], [2, 1], [3, 4]]))
    taken = queries.take([2, 0])
    assert taken.vectors.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert sorted(taken.history.tolist()) == [[0, 1], [0, 6], [1, 5]]
