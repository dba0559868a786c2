"""Softmax heads equal dense log_softmax, and never allocate a tensor of size [positions, items]."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.linear_cross_entropy import chunked_logsumexp_and_scores, linear_cross_entropy
from cllm4rec_dist.model.sharded_cross_entropy import GatheringQueries, sample_rows, sharded_cross_entropy
from tests.harness import alone, run_ranks

WIDTH = 5
WORLDS = [1, 2, 3, 4]
NUM_ITEMS = 11
MAX_LOGITS = 12


NONE = torch.empty(0, dtype=torch.int64)


def chunked_logsumexp(queries: Tensor, weight: Tensor, max_logits: int | None = None) -> Tensor:
    return chunked_logsumexp_and_scores(queries, weight, NONE, NONE, max_logits)[0]


def target_scores(queries: Tensor, weight: Tensor, target_query: Tensor, target_row: Tensor) -> Tensor:
    return chunked_logsumexp_and_scores(queries, weight, target_query, target_row)[1]


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.mark.parametrize("max_logits", [1, 7, 30, 1000])
def test_chunked_logsumexp_equals_torchs(max_logits: int) -> None:
    # Large enough for exp to overflow where no maximum is subtracted.
    queries, weight = normal(6, WIDTH, seed=1, scale=40).requires_grad_(), normal(9, WIDTH, seed=2, scale=20)
    weight.requires_grad_()
    lse = chunked_logsumexp(queries, weight, max_logits)
    dense = (queries @ weight.T).logsumexp(1)
    torch.testing.assert_close(lse, dense)
    seed = normal(6, seed=3)
    for got, expected in zip(
        torch.autograd.grad(lse, (queries, weight), seed),
        torch.autograd.grad(dense, (queries, weight), seed),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("max_logits", [1, 8, 1000])
def test_gradients_of_chunked_logsumexp_are_right(max_logits: int) -> None:
    inputs = normal(4, WIDTH, seed=1).requires_grad_(), normal(7, WIDTH, seed=2).requires_grad_()
    pairs = torch.tensor([0, 2, 2, 3]), torch.tensor([6, 1, 1, 0])  # one query without a target, one target twice
    assert torch.autograd.gradcheck(lambda q, w: chunked_logsumexp_and_scores(q, w, *pairs, max_logits), inputs)


def test_a_frozen_weight_gets_no_gradient_and_the_queries_the_same_one() -> None:
    queries, weight = normal(4, WIDTH, seed=1).requires_grad_(), normal(7, WIDTH, seed=2)
    chunked_logsumexp(queries, weight, 8).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(queries.grad, (queries.detach() @ weight.T).softmax(1) @ weight)


def test_no_class_at_all_gives_minus_infinity_and_no_gradient() -> None:
    queries, weight = normal(3, WIDTH, seed=1).requires_grad_(), normal(0, WIDTH, seed=2).requires_grad_()
    lse = chunked_logsumexp(queries, weight)
    assert lse.tolist() == [-math.inf] * 3
    lse.backward(torch.zeros(3, dtype=torch.float64))
    assert queries.grad is not None
    assert not queries.grad.any()
    assert weight.grad is not None
    assert weight.grad.shape == (0, WIDTH)


def test_no_query_at_all_is_fine() -> None:
    queries, weight = normal(0, WIDTH, seed=1).requires_grad_(), normal(3, WIDTH, seed=2).requires_grad_()
    lse = chunked_logsumexp(queries, weight)
    assert lse.shape == (0,)
    lse.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_sums_of_half_precision_queries_are_fp32() -> None:
    queries, weight = normal(4, 8, seed=1).bfloat16(), normal(300, 8, seed=2).float()
    lse = chunked_logsumexp(queries, weight, 64)
    assert lse.dtype is torch.float32
    exact = (queries.double() @ weight.bfloat16().double().T).logsumexp(1)
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=1e-5)
    assert target_scores(queries, weight, torch.tensor([0]), torch.tensor([0])).dtype is torch.float32


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_half_precision_rounds_inputs_and_gradients_but_no_logit(weight_dtype: torch.dtype) -> None:
    """Against fp64 on the same numbers; the error of torch's bf16 logits is a thousand times as large."""
    queries, weight = normal(32, 64, seed=1, scale=0.7).bfloat16(), normal(500, 64, seed=2, scale=0.7)
    target_query, rows = torch.arange(32), torch.randint(500, (32,), generator=torch.Generator().manual_seed(3))

    def run(form: Callable[..., Tensor], dtype: torch.dtype, weight_dtype: torch.dtype) -> list[Tensor]:
        leaves = queries.detach().to(dtype).requires_grad_(), weight.detach().to(weight_dtype).requires_grad_()
        loss = form(*leaves, target_query, rows)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    results = run(linear_cross_entropy, torch.bfloat16, weight_dtype)
    weight = weight.bfloat16()
    exact = run(reference_nll, torch.float64, torch.float64)
    naive = run(reference_nll, torch.bfloat16, torch.bfloat16)

    def error(got: Tensor, expected: Tensor) -> float:
        return float((got.double() - expected).norm() / expected.norm())

    assert error(results[0], exact[0]) < 1e-6
    assert error(naive[0], exact[0]) > 1e-3, "the control must be seen"
    for got, expected, rough in zip(results[1:], exact[1:], naive[1:], strict=True):
        assert error(got, expected) < 2.5e-3  # bf16 itself rounds by up to 3.9e-3, 1.7e-3 in this norm
        assert error(rough, expected) > 2 * error(got, expected)


def rounded(world: World) -> dict[str, Any]:
    """A sharded head whose products are rounded to bf16, on a rank with 2 or 3 of its queries."""
    queries, weight, targets = rounded_case()
    partition, part = RowPartition(len(weight), world.size), slice(*world.local_range(0, len(queries)))
    local_queries = queries[part].float().requires_grad_()
    local_weight = weight[slice(*partition.range(world.rank))].float().requires_grad_()
    gathering = GatheringQueries(local_queries, torch.arange(len(local_queries)), targets[part], partition, world)
    nll = sharded_cross_entropy(gathering, local_weight, 0, None, MAX_LOGITS, torch.bfloat16)
    nll.sum().backward()
    return {"nll": nll.detach(), "queries": local_queries.grad, "weight": local_weight.grad}


def rounded_case() -> tuple[Tensor, Tensor, Tensor]:
    return normal(5, 64, seed=1, scale=0.7), normal(NUM_ITEMS, 64, seed=2, scale=0.7), torch.tensor([3, 3, 0, 10, 7])


@pytest.mark.parametrize("size", [1, 2])
def test_a_sharded_head_in_bf16_rounds_factors_and_sums_in_fp32(size: int) -> None:
    queries, weight, targets = rounded_case()
    leaves = queries.bfloat16().double().requires_grad_(), weight.bfloat16().double().requires_grad_()
    exact = F.cross_entropy(leaves[0] @ leaves[1].T, targets, reduction="none")
    gradients = torch.autograd.grad(exact.sum(), leaves)
    ranks = run_ranks(size, rounded)
    results = {name: torch.cat([rank[name] for rank in ranks]) for name in ranks[0]}
    assert {result.dtype for result in results.values()} == {torch.float32}
    torch.testing.assert_close(results["nll"].double(), exact.detach(), rtol=1e-5, atol=1e-5)
    for got, expected in zip((results["queries"], results["weight"]), gradients, strict=True):
        assert float((got.double() - expected).norm() / expected.norm()) < 4e-3
    unrounded = F.cross_entropy(queries @ weight.T, targets, reduction="none")
    assert not torch.allclose(results["nll"].double(), unrounded, rtol=1e-5, atol=1e-5), "nothing was rounded"


# Queries with one target, with several, with a repeated one, and with none.
TARGET_QUERY, TARGET_ROW = torch.tensor([0, 2, 2, 2, 3, 3]), torch.tensor([4, 0, 6, 1, 5, 5])


def test_target_scores_are_sums_over_each_querys_targets() -> None:
    queries, weight = normal(5, WIDTH, seed=1), normal(7, WIDTH, seed=2)
    expected = torch.zeros(5, dtype=torch.float64)
    for query, row in zip(TARGET_QUERY.tolist(), TARGET_ROW.tolist(), strict=True):
        expected[query] += queries[query] @ weight[row]
    torch.testing.assert_close(target_scores(queries, weight, TARGET_QUERY, TARGET_ROW), expected)


def reference_nll(queries: Tensor, weight: Tensor, target_query: Tensor, target_row: Tensor) -> Tensor:
    """[n] of -sum of log softmax over each query's targets."""
    log_p = torch.log_softmax(queries @ weight.T, dim=1)
    return log_p.new_zeros(len(queries)).index_add(0, target_query, -log_p[target_query, target_row])


def test_dense_nll_equals_log_softmax() -> None:
    queries, weight = normal(5, WIDTH, seed=1).requires_grad_(), normal(7, WIDTH, seed=2).requires_grad_()
    nll = linear_cross_entropy(queries, weight, TARGET_QUERY, TARGET_ROW)
    expected = reference_nll(queries, weight, TARGET_QUERY, TARGET_ROW)
    torch.testing.assert_close(nll, expected)
    assert nll[1] == 0
    for got, exact in zip(
        torch.autograd.grad(nll.sum(), (queries, weight)),
        torch.autograd.grad(expected.sum(), (queries, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, exact)


# Positions of each rank. The last row of a world of 2 or more: no position anywhere, as in an empty micro-batch.
POSITIONS = {1: [[6]], 2: [[4, 0], [3, 5], [0, 0]], 3: [[2, 0, 5], [0, 0, 0]], 4: [[3, 1, 0, 4], [0, 0, 0, 0]]}
SHARDED = [
    (size, index, num_items) for size in WORLDS for index in range(len(POSITIONS[size])) for num_items in (11, 3)
]


def sharded_case(counts: list[int], num_items: int) -> tuple[list[Tensor], Tensor, list[tuple[Tensor, Tensor]], Tensor]:
    """Every rank's queries, the whole weight, every rank's targets, and what each nll is multiplied with."""
    random = torch.Generator().manual_seed(sum(counts))
    targets = []
    for count in counts:
        per_query = torch.randint(0, 4, (count,), generator=random)  # some queries have no target
        rows = torch.randint(num_items, (int(per_query.sum()),), generator=random)
        targets.append((torch.repeat_interleave(torch.arange(count), per_query), rows))
    queries = list(normal(sum(counts), WIDTH, seed=1, scale=3).split(counts))
    return queries, normal(num_items, WIDTH, seed=2), targets, normal(sum(counts), seed=3)


def whole_nll(
    queries: Tensor,
    weight: Tensor,
    target_query: Tensor,
    target_row: Tensor,
    partition: RowPartition,
    world: World,
    *more: Any,
) -> Tensor:
    """Both halves of the head, one after the other."""
    return sharded_cross_entropy(GatheringQueries(queries, target_query, target_row, partition, world), weight, *more)


def sharded(world: World) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for index, counts in enumerate(POSITIONS[world.size]):
        for num_items in (NUM_ITEMS, 3):
            queries, weight, targets, seed = sharded_case(counts, num_items)
            partition = RowPartition(num_items, world.size)
            start, stop = partition.range(world.rank)
            local_queries = queries[world.rank].clone().requires_grad_()
            local_weight = weight[start:stop].clone().requires_grad_()
            nll = whole_nll(local_queries, local_weight, *targets[world.rank], partition, world, 0, None, MAX_LOGITS)
            (nll * seed.split(counts)[world.rank]).sum().backward()
            results[f"{index}-{num_items}"] = {
                "nll": nll.detach(),
                "queries": local_queries.grad,
                "weight": local_weight.grad,
            }
    return results


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, Any]]]:
    return {size: run_ranks(size, sharded) for size in WORLDS}


@pytest.mark.parametrize(("size", "index", "num_items"), SHARDED)
def test_sharded_nll_equals_dense_log_softmax(ranks: Any, size: int, index: int, num_items: int) -> None:
    counts = POSITIONS[size][index]
    queries, weight, targets, seed = sharded_case(counts, num_items)
    leaves = [part.clone().requires_grad_() for part in queries]
    weight.requires_grad_()
    parts = [reference_nll(q, weight, *target) for q, target in zip(leaves, targets, strict=True)]
    (torch.cat(parts) * seed).sum().backward()
    results = [rank[f"{index}-{num_items}"] for rank in ranks[size]]
    for got, nll, leaf in zip(results, parts, leaves, strict=True):
        torch.testing.assert_close(got["nll"], nll.detach())
        torch.testing.assert_close(got["queries"], leaf.grad)
    torch.testing.assert_close(torch.cat([got["weight"] for got in results]), weight.grad)


SAMPLED = 6


def sampled(world: World) -> dict[str, dict[str, Tensor]]:
    results = {}
    for index, counts in enumerate(POSITIONS[world.size]):
        for num_items in (NUM_ITEMS, 3):
            queries, weight, targets, seed = sharded_case(counts, num_items)
            partition = RowPartition(num_items, world.size)
            start, stop = partition.range(world.rank)
            leaves = queries[world.rank].clone().requires_grad_(), weight[start:stop].clone().requires_grad_()
            key = index - 1
            more = SAMPLED, torch.tensor(key), MAX_LOGITS
            nll = whole_nll(*leaves, *targets[world.rank], partition, world, *more)
            (nll * seed.split(counts)[world.rank]).sum().backward()
            all_rows = torch.cat([row for _, row in targets])
            local_targets = all_rows[(all_rows >= start) & (all_rows < stop)] - start
            rows, log_weight = sample_rows(stop - start, SAMPLED, key, local_targets, world)
            results[f"{index}-{num_items}"] = {
                "nll": nll.detach(),
                "queries": leaves[0].grad,
                "weight": leaves[1].grad,
                "rows": rows + start,
                "log_weight": log_weight,
            }
    return results


@pytest.fixture(scope="module")
def sampled_ranks() -> dict[int, list[dict[str, Any]]]:
    return {size: run_ranks(size, sampled) for size in WORLDS}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "index", "num_items"), SHARDED)
def test_a_sampled_softmax_is_the_dense_one_over_the_same_sample(
    sampled_ranks: Any, size: int, index: int, num_items: int
) -> None:
    queries, weight, targets, seed = sharded_case(POSITIONS[size][index], num_items)
    weight.requires_grad_()
    results = [rank[f"{index}-{num_items}"] for rank in sampled_ranks[size]]
    rows = torch.cat([got["rows"] for got in results])
    log_weight = torch.cat([got["log_weight"] for got in results]).double()
    assert len(rows.unique()) == len(rows)
    leaves = [part.clone().requires_grad_() for part in queries]
    parts = []
    for query, (target_query, target_row) in zip(leaves, targets, strict=True):
        lse = (query @ weight[rows].T + log_weight).logsumexp(1)
        nll = lse.new_zeros(len(query))
        parts.append(
            nll.index_add(0, target_query, lse[target_query] - (query[target_query] * weight[target_row]).sum(1))
        )
    (torch.cat(parts) * seed).sum().backward()
    for got, nll, leaf in zip(results, parts, leaves, strict=True):
        torch.testing.assert_close(got["nll"], nll.detach())
        torch.testing.assert_close(got["queries"], leaf.grad)
    torch.testing.assert_close(torch.cat([got["weight"] for got in results]), weight.grad)


POPULARITY = np.random.default_rng(3).integers(1, 30, size=40)


@pytest.mark.parametrize("cumulative_counts", [None, np.cumsum(POPULARITY)])
def test_the_sampled_sum_of_exponentials_has_no_bias(cumulative_counts: np.ndarray | None) -> None:
    queries, weight = normal(3, WIDTH, seed=1), normal(40, WIDTH, seed=2)
    targets, exact = torch.tensor([4, 17, 17]), (queries @ weight.T).exp().sum(1)
    sums = []
    for key in range(3000):
        rows, log_weight = sample_rows(40, 10, key, targets, alone(), cumulative_counts)
        assert set(targets.tolist()) <= set(rows.tolist())
        sums.append((queries @ weight[rows].T + log_weight.double()).exp().sum(1))
    every = torch.stack(sums)
    assert (every.std(dim=0) > 0.05 * exact).all(), "samples must differ"
    error = (every.mean(dim=0) - exact) / (every.std(dim=0) / len(sums) ** 0.5)
    assert error.abs().max() < 4  # standard errors


def test_popular_rows_are_drawn_in_proportion() -> None:
    drawn = torch.zeros(40)
    draws, none = 4000, torch.empty(0, dtype=torch.int64)
    for key in range(draws):
        rows, log_weight = sample_rows(40, 1, key, none, alone(), np.cumsum(POPULARITY))
        drawn[rows] += 1
        # The logQ correction of one draw: log of 1 over its probability.
        assert log_weight.item() == pytest.approx(math.log(POPULARITY.sum() / POPULARITY[rows.item()]), rel=1e-5)
    share = torch.from_numpy(POPULARITY / POPULARITY.sum())
    error = (drawn / draws - share) / (share * (1 - share) / draws).sqrt()
    assert error.abs().max() < 4  # standard errors
    assert sample_rows(3, 100, 0, none, alone(), np.cumsum([1, 1, 1]))[0].tolist() == [0, 1, 2]


def test_a_rank_without_rows_samples_nothing() -> None:
    none = torch.empty(0, dtype=torch.int64)
    for cumulative_counts in (None, np.empty(0, np.int64)):
        rows, log_weight = sample_rows(0, 10, 1, none, alone(), cumulative_counts)
        assert (rows.shape, rows.dtype, log_weight.shape) == ((0,), torch.int64, (0,))


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operation returns, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *made])
        return result


def dense_form(
    queries: Tensor, weight: Tensor, target_query: Tensor, targets: Tensor, partition: RowPartition, world: World
) -> Tensor:
    logits = queries @ weight.T
    return F.cross_entropy(logits, targets, reduction="none")


def run_head(form: Callable[..., Tensor], positions: int, items: int, width: int = 16) -> None:
    """Forward and backward of an item loss with one target a position."""
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(positions, width, generator=random, requires_grad=True)
    weight = torch.randn(items, width, generator=random, requires_grad=True)
    targets = torch.randint(items, (positions,), generator=random)
    form(queries, weight, torch.arange(positions), targets, RowPartition(items, 1), alone()).sum().backward()
    assert queries.grad is not None
    assert weight.grad is not None


def peak() -> int:
    """Highest resident memory of this process so far, in bytes; of a forked one since its fork."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def peak_growth(world: World, form: str, positions: int, items: int) -> int:
    """Bytes by which the peak of this process grows when it runs a head."""
    run_head(FORMS[form], 8, 100)
    before = peak()
    run_head(FORMS[form], positions, items)
    return peak() - before


FORMS: dict[str, Callable[..., Tensor]] = {"sharded": whole_nll, "dense": dense_form}


def test_the_head_never_makes_a_tensor_of_positions_by_items() -> None:
    positions, items = 1024, 50_000
    with LargestTensor() as seen:
        run_head(whole_nll, positions, items)
    # A chunk of logits, or a copy of the weight: whatever is larger.
    assert items * 16 <= seen.numel <= 1 << 23
    assert seen.numel < positions * items / 5
    with LargestTensor() as seen:
        run_head(dense_form, 256, items)
    assert seen.numel >= 256 * items, "the control must be seen"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_the_peak_memory_of_the_head_stays_far_below_positions_by_items() -> None:
    positions, items = 2048, 200_000
    assert run_ranks(1, peak_growth, "sharded", positions, items)[0] < 0.2 * positions * items * 4
    assert run_ranks(1, peak_growth, "dense", 256, items)[0] > 256 * items * 4, "the control must be seen"
