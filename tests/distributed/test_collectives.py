"""Collectives over ragged rows: values, and gradients of the sum of all ranks' losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cllm4rec_dist.distributed.collectives import (
    all_gather_rows,
    all_reduce_sum,
    all_to_all_rows,
    broadcast_text,
    combine_logsumexp,
    exchange_counts,
    gather_counts,
    reduce_scatter_rows,
)
from cllm4rec_dist.distributed.topology import World
from tests.harness import alone, run_ranks

WIDTH = 3
COUNTS = {2: [[3, 0], [2, 5], [0, 0], [4, 4]], 3: [[2, 0, 3], [0, 4, 1], [0, 0, 0], [2, 2, 2]]}
CASES = [(size, index) for size in COUNTS for index in range(len(COUNTS[size]))]


def random(*shape: int, seed: int) -> Tensor:
    """Normal fp64 numbers, equal on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(counts: list[int], seed: int) -> list[Tensor]:
    """Every rank's rows."""
    return list(random(sum(counts), WIDTH, seed=seed).split(counts))


def whole(size: int, total: int, seed: int) -> list[Tensor]:
    """Rows of every rank for all of `total` positions."""
    return [random(total, WIDTH, seed=seed + 1 + rank) for rank in range(size)]


def gathered(world: World, counts: list[int]) -> dict[str, Any]:
    """All-gather: value, gradient, and the two sides of adjointness."""
    x = parts(counts, 1)[world.rank].clone().requires_grad_()
    y = all_gather_rows(x, counts, world)
    seed = whole(world.size, len(y), 10)[world.rank]
    (y * seed).sum().backward()
    return {"y": y.detach(), "grad": x.grad, "left": (y.detach() * seed).sum(), "right": (x.detach() * x.grad).sum()}


def scattered(world: World, counts: list[int]) -> dict[str, Any]:
    """Reduce-scatter: value, gradient, and the two sides of adjointness."""
    x = whole(world.size, sum(counts), 20)[world.rank].clone().requires_grad_()
    y = reduce_scatter_rows(x, counts, world)
    seed = parts(counts, 2)[world.rank]
    (y * seed).sum().backward()
    return {"y": y.detach(), "grad": x.grad, "left": (y.detach() * seed).sum(), "right": (x.detach() * x.grad).sum()}


def partial_logsumexp(size: int, total: int) -> list[Tensor]:
    """Each shard's log-sum-exp of every row; the last shard has no column, the others are far apart in size."""
    columns = [random(total, seed=30 + rank) + 200 * rank for rank in range(size)]
    columns[-1] = torch.full_like(columns[-1], -torch.inf)
    return columns


def combined(world: World, counts: list[int]) -> dict[str, Any]:
    """Log-sum-exp over the shards: value and gradient."""
    x = partial_logsumexp(world.size, sum(counts))[world.rank].clone().requires_grad_()
    y = combine_logsumexp(x, counts, world)
    (y * random(sum(counts), seed=40).split(counts)[world.rank]).sum().backward()
    return {"y": y.detach(), "grad": x.grad}


def everything(world: World) -> dict[str, Any]:
    """Run all checks of a world, so that its ranks start only once."""
    results: dict[str, Any] = {"counts": gather_counts(10 * world.rank + 1, world)}
    results["texts"] = [broadcast_text(text * (world.rank + 1), world, "a text") for text in ("", "音楽 and ü")]
    for index, counts in enumerate(COUNTS[world.size]):
        results[f"gather-{index}"] = gathered(world, counts)
        results[f"scatter-{index}"] = scattered(world, counts)
        results[f"combine-{index}"] = combined(world, counts)
        integers = torch.arange(sum(counts)).split(counts)[world.rank]
        results[f"integers-{index}"] = all_gather_rows(integers, counts, world)
    local = torch.tensor([1.0, 10.0]) * (world.rank + 1)
    local.requires_grad_()
    total = all_reduce_sum(local, world)
    results["sum"], results["local"], results["sum has a gradient"] = total, local.detach(), total.requires_grad

    # Rank r sends r + destination rows (none from 0 to 0) whose entries say from where to where.
    send = torch.tensor([world.rank + other for other in range(world.size)])
    receive = exchange_counts(send, world)
    rows = torch.cat([torch.full((int(n), 2), 10 * world.rank + other) for other, n in enumerate(send)])
    results["receive"] = receive
    results["exchanged"] = all_to_all_rows(rows, send.tolist(), receive.tolist(), world)
    return results


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, Any]]]:
    return {size: run_ranks(size, everything) for size in COUNTS}


@pytest.mark.parametrize(("size", "index"), CASES)
def test_gathered_rows_are_those_of_all_ranks_in_order(ranks: Any, size: int, index: int) -> None:
    expected = torch.cat(parts(COUNTS[size][index], 1))
    for rank in ranks[size]:
        torch.testing.assert_close(rank[f"gather-{index}"]["y"], expected, rtol=0, atol=0)
        assert rank[f"integers-{index}"].tolist() == list(range(sum(COUNTS[size][index])))


@pytest.mark.parametrize(("size", "index"), CASES)
def test_the_gradient_of_a_gather_is_that_of_the_sum_over_ranks(ranks: Any, size: int, index: int) -> None:
    counts = COUNTS[size][index]
    leaves = [part.clone().requires_grad_() for part in parts(counts, 1)]
    gathered = torch.cat(leaves)
    sum((gathered * seed).sum() for seed in whole(size, len(gathered), 10)).backward()
    for rank, leaf in zip(ranks[size], leaves, strict=True):
        torch.testing.assert_close(rank[f"gather-{index}"]["grad"], leaf.grad)


@pytest.mark.parametrize(("size", "index"), CASES)
def test_reduce_scatter_sums_the_ranks_and_its_gradient_is_that_of_the_sum(ranks: Any, size: int, index: int) -> None:
    counts = COUNTS[size][index]
    leaves = [x.clone().requires_grad_() for x in whole(size, sum(counts), 20)]
    summed = torch.stack(leaves).sum(0).split(counts)
    sum((y * seed).sum() for y, seed in zip(summed, parts(counts, 2), strict=True)).backward()
    for rank, y, leaf in zip(ranks[size], summed, leaves, strict=True):
        torch.testing.assert_close(rank[f"scatter-{index}"]["y"], y.detach())
        torch.testing.assert_close(rank[f"scatter-{index}"]["grad"], leaf.grad)


@pytest.mark.parametrize("kind", ["gather", "scatter"])
@pytest.mark.parametrize(("size", "index"), CASES)
def test_backward_is_the_adjoint_of_forward(ranks: Any, size: int, index: int, kind: str) -> None:
    sides = [(rank[f"{kind}-{index}"]["left"], rank[f"{kind}-{index}"]["right"]) for rank in ranks[size]]
    torch.testing.assert_close(sum(left for left, _ in sides), sum(right for _, right in sides))


@pytest.mark.parametrize(("size", "index"), CASES)
def test_combined_logsumexp_equals_one_process(ranks: Any, size: int, index: int) -> None:
    counts = COUNTS[size][index]
    leaves = [x.clone().requires_grad_() for x in partial_logsumexp(size, sum(counts))]
    dense = torch.stack(leaves).logsumexp(0)
    (dense * random(sum(counts), seed=40)).sum().backward()
    for rank, y, leaf in zip(ranks[size], dense.split(counts), leaves, strict=True):
        torch.testing.assert_close(rank[f"combine-{index}"]["y"], y.detach())
        torch.testing.assert_close(rank[f"combine-{index}"]["grad"], leaf.grad)


@pytest.mark.parametrize("size", COUNTS)
def test_counts_sums_and_exchanged_rows_reach_every_rank(ranks: Any, size: int) -> None:
    for rank, results in enumerate(ranks[size]):
        assert results["counts"] == [10 * other + 1 for other in range(size)]
        assert results["texts"] == ["", "音楽 and ü"]
        factor = size * (size + 1) / 2
        assert results["sum"].tolist() == [factor, 10 * factor]
        assert results["local"].tolist() == [rank + 1, 10 * (rank + 1)]
        assert not results["sum has a gradient"]
        assert results["receive"].tolist() == [other + rank for other in range(size)]
        expected = [10 * other + rank for other in range(size) for _ in range(other + rank)]
        assert results["exchanged"].tolist() == [[value, value] for value in expected]


def test_a_world_of_one_needs_no_process_group() -> None:
    world = alone()
    x = random(4, WIDTH, seed=1).requires_grad_()
    for function in (all_gather_rows, reduce_scatter_rows, combine_logsumexp):
        torch.testing.assert_close(function(x, [4], world), x, rtol=0, atol=0)
    assert gather_counts(7, world) == [7]
    assert broadcast_text("ü", world, "a text") == "ü"
    assert exchange_counts(torch.tensor([7]), world).tolist() == [7]
    torch.testing.assert_close(all_to_all_rows(x, [4], [4], world), x, rtol=0, atol=0)
    summed = all_reduce_sum(x, world)
    assert not summed.requires_grad
    assert summed.data_ptr() != x.data_ptr()
