"""The item softmax over sharded rows equals a dense fp64 reference in each form, and makes no copy of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measured import LiveMemory
from cllm4rec_dist.config import HeadConfig
from cllm4rec_dist.corpus.tokenizer import TokenSpace
from cllm4rec_dist.distributed.collectives import all_reduce_sum
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.backbone import FrozenEmbeddings
from cllm4rec_dist.model.embedding_optimizer import EmbeddingOptimizer
from cllm4rec_dist.model.item_head import ItemHead
from cllm4rec_dist.model.linear_cross_entropy import chunked_logsumexp_and_scores
from cllm4rec_dist.model.losses import item_loss
from cllm4rec_dist.model.recommender import Recommender
from cllm4rec_dist.model.sharded_cross_entropy import GatheringQueries, sample_rows
from tests.documents import Document, collate_each
from tests.harness import alone, run_ranks

WIDTH, MAX_LOGITS, TEMPERATURE = 5, 23, 0.3
FORMS = [(similarity, bias) for similarity in ("cosine", "dot") for bias in (True, False)]
# Hidden states of each rank in each of two micro-batches.
POSITIONS = {1: [[6], [3]], 2: [[4, 0], [3, 5]], 3: [[2, 0, 5], [0, 0, 0]], 4: [[3, 1, 0, 4], [0, 2, 1, 0]]}
NUM_ITEMS = [11, 3]
"""Shards of 2 or 3 ranks are uneven; of 3 items on 4 ranks one is empty."""
WORLD_SIZES = [1, 2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))]
"""`make fast` tests the first two."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batches(size: int, num_items: int) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """Hidden states, and query and item of each target, by micro-batch and rank; some states have no target."""
    random, made = torch.Generator().manual_seed(size), []
    for index, counts in enumerate(POSITIONS[size]):
        of_ranks = []
        for rank, count in enumerate(counts):
            per_state = torch.randint(0, 4, (count,), generator=random)
            rows = torch.randint(num_items, (int(per_state.sum()),), generator=random)
            states = normal(count, WIDTH, seed=10 * index + rank + 1)
            of_ranks.append((states, torch.arange(count).repeat_interleave(per_state), rows))
        made.append(of_ranks)
    return made


def parameters(num_items: int) -> tuple[Tensor, Tensor]:
    """Item rows of very different lengths, and biases."""
    return normal(num_items, WIDTH, seed=20) * normal(num_items, 1, seed=21).exp(), normal(num_items, 1, seed=22)


def sharded(world: World, accumulate: bool) -> dict[str, Any]:
    """Losses and gradients of this rank for each form and number of items, over two micro-batches."""
    results: dict[str, Any] = {}
    for (similarity, item_bias), num_items in ((form, n) for form in FORMS for n in NUM_ITEMS):
        partition = RowPartition(num_items, world.size)
        local = slice(*partition.range(world.rank))
        settings: dict[str, Any] = {"similarity": similarity, "item_bias": item_bias, "pool_residual": False}
        head = ItemHead(partition.num_local(world.rank), world, temperature=TEMPERATURE, **settings).double()
        rows, bias = (whole[local].clone() for whole in parameters(num_items))
        rows.requires_grad_()
        if head.local_bias is not None:
            head.local_bias.data = bias
        losses, states_gradients = [], []
        for of_ranks in batches(world.size, num_items):
            states, *targets = of_ranks[world.rank]
            states.requires_grad_()
            gathering = GatheringQueries(head.queries(states, torch.zeros_like(states)), *targets, partition, world)
            options: dict[str, Any] = {"normalize": head.normalizes_rows, "accumulate": accumulate}
            loss = item_loss(gathering, rows, 0, None, MAX_LOGITS, None, head.local_bias, **options)
            (loss * 0.7 + rows[:1].sum()).backward()  # another use of the rows, whose gradient comes first
            losses.append(loss.detach())
            states_gradients.append(states.grad)
        result = {"losses": torch.stack(losses), "states": torch.cat(states_gradients), "rows": rows.grad}
        if head.local_bias is not None:
            result["bias"] = head.local_bias.grad
        if head.log_temperature is not None:
            result["temperature"] = all_reduce_sum(head.log_temperature.grad, world)
        results[f"{similarity}-{item_bias}-{num_items}"] = result
    return results


def dense(size: int, similarity: str, item_bias: bool, num_items: int) -> list[dict[str, Tensor]]:
    """Compute the results of all ranks densely, from all logits at once."""
    rows, bias = (value.requires_grad_() for value in parameters(num_items))
    log_temperature = torch.tensor(TEMPERATURE).log().double().requires_grad_()
    made = batches(size, num_items)
    losses = torch.zeros(2, size, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    partition = RowPartition(num_items, size)
    for index, of_ranks in enumerate(made):
        for rank, (states, target_query, targets) in enumerate(of_ranks):
            states.requires_grad_()
            queries, weight = states, rows
            if similarity == "cosine":
                queries, weight = F.normalize(states, dim=1) / log_temperature.exp(), F.normalize(rows, dim=1)
            logits = queries @ weight.T + (bias.T if item_bias else 0.0)
            loss = -torch.log_softmax(logits, dim=1)[target_query, targets].sum()
            losses[index, rank] = loss.detach()
            total = total + loss * 0.7 + rows[slice(*partition.range(rank))][:1].sum()
    total.backward()
    results = []
    for rank in range(size):
        local = slice(*partition.range(rank))
        of_rank = [made[index][rank][0] for index in range(2)]
        result = {"losses": losses[:, rank], "rows": rows.grad[local]}
        result["states"] = torch.cat([torch.zeros_like(s) if s.grad is None else s.grad for s in of_rank])
        if item_bias:
            result["bias"] = bias.grad[local]
        if similarity == "cosine":
            result["temperature"] = log_temperature.grad
        results.append(result)
    return results


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("size", WORLD_SIZES)
def test_each_form_of_the_sharded_softmax_equals_the_dense_one(size: int, accumulate: bool) -> None:
    """Losses and gradients of states, rows, biases and temperature; gradients add up over micro-batches."""
    ranks = run_ranks(size, sharded, accumulate)
    for (similarity, item_bias), num_items in ((form, n) for form in FORMS for n in NUM_ITEMS):
        for rank, expected in enumerate(dense(size, similarity, item_bias, num_items)):
            got = ranks[rank][f"{similarity}-{item_bias}-{num_items}"]
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("max_logits", [1, 30, 1000])
def test_gradients_through_normalized_rows_and_a_bias_are_right(max_logits: int) -> None:
    leaves = [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(4, 3), (7, 3), (7,)])]
    pairs = torch.tensor([0, 2, 2, 3]), torch.tensor([6, 1, 1, 0])  # one query without a target, one target twice

    def form(queries: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return chunked_logsumexp_and_scores(queries, weight, *pairs, max_logits, torch.tanh, bias, normalize=True)

    assert torch.autograd.gradcheck(form, leaves)


def test_rows_shorter_than_torchs_limit_are_divided_by_it() -> None:
    """As in `F.normalize`: the length is a constant then, also in the gradient; a row of zeros is no exception."""
    rows = normal(4, 3, seed=1) * torch.tensor([[1.0], [1e-13], [0.0], [1e-11]])
    queries, pairs = normal(2, 3, seed=2), (torch.tensor([0, 1, 1]), torch.tensor([1, 2, 3]))
    gradients = []
    for normalize in (True, False):
        leaf = rows.clone().requires_grad_()
        weight = leaf if normalize else F.normalize(leaf, dim=1)
        lse, scores = chunked_logsumexp_and_scores(queries, weight, *pairs, normalize=normalize)
        gradients.append(torch.autograd.grad((lse - scores).sum(), leaf)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def travelling(world: World, comm_dtype: torch.dtype | None, compute_dtype: torch.dtype | None) -> dict[str, Any]:
    """Losses and gradients of this rank with queries that are rounded where they travel."""
    num_items, (of_ranks, _) = NUM_ITEMS[0], batches(world.size, NUM_ITEMS[0])
    partition = RowPartition(num_items, world.size)
    rows, bias = (whole[slice(*partition.range(world.rank))].float() for whole in parameters(num_items))
    states, *targets = of_ranks[world.rank]
    leaves = states.float().requires_grad_(), rows.clone().requires_grad_(), bias.clone().requires_grad_()
    gathering = GatheringQueries(leaves[0], *targets, partition, world, comm_dtype)
    item_loss(gathering, leaves[1], 0, None, MAX_LOGITS, compute_dtype, leaves[2], normalize=True).backward()
    return dict(zip(("queries", "rows", "bias"), (leaf.grad for leaf in leaves), strict=True))


def dense_travelling(size: int) -> dict[str, Tensor]:
    """Gradients of all ranks' queries, of rows and of biases in fp64, with queries rounded to bf16."""
    rows, bias = (value.float().double().requires_grad_() for value in parameters(NUM_ITEMS[0]))
    (of_ranks, _), queries = batches(size, NUM_ITEMS[0]), []
    for states, target_query, targets in of_ranks:
        queries.append(states.float().bfloat16().double().requires_grad_())
        logits = queries[-1] @ F.normalize(rows, dim=1).T + bias.T
        (-torch.log_softmax(logits, dim=1)[target_query, targets].sum()).backward()
    return {"queries": torch.cat([q.grad for q in queries]), "rows": rows.grad, "bias": bias.grad}


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_rounded_queries_give_the_dense_result_of_these_queries_on_any_number_of_ranks(size: int) -> None:
    """Rows and biases see the rounding of queries alone; gradients of queries are rounded once for each shard."""
    ranks = run_ranks(size, travelling, torch.bfloat16, None)
    expected = dense_travelling(size)
    for name, value in expected.items():
        got = torch.cat([rank[name] for rank in ranks])
        assert got.dtype is torch.float32
        error = float((got.double() - value).norm() / value.norm())
        assert error < (4e-3 if name == "queries" else 1e-6), name
    exact = torch.cat([rank["rows"] for rank in run_ranks(size, travelling, None, None)])
    assert float((exact.double() - expected["rows"]).norm() / expected["rows"].norm()) > 1e-4, "nothing was rounded"
    if size > 1:  # a sum of rounded parts, which is not rounded itself
        gradient = torch.cat([rank["queries"] for rank in ranks])
        assert not torch.equal(gradient, gradient.bfloat16().float())


def test_queries_that_travel_and_are_multiplied_in_bf16_are_rounded_once() -> None:
    for size in (1, 3):
        plain = run_ranks(size, travelling, None, torch.bfloat16)
        both = run_ranks(size, travelling, torch.bfloat16, torch.bfloat16)
        for one, other in zip(plain, both, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in ("rows", "bias"))
            torch.testing.assert_close(one["queries"], other["queries"], rtol=1e-6, atol=1e-6)


KEY, NUM_NEGATIVES = 5, 30
TARGET_QUERY, TARGETS = torch.tensor([0, 0, 2, 3]), torch.tensor([7, 90, 7, 41])


def sampled_case() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, rows and biases that bf16 represents exactly."""
    return tuple(normal(n, w, seed=n + w).bfloat16().double().requires_grad_() for n, w in ((4, 6), (200, 6), (200, 1)))


def sampled_loss(
    queries: Tensor, rows: Tensor, bias: Tensor | None, compute_dtype: torch.dtype | None = None, **options: bool
) -> Tensor:
    gathering = GatheringQueries(queries, TARGET_QUERY, TARGETS, RowPartition(200, 1), alone())
    return item_loss(gathering, rows, NUM_NEGATIVES, torch.tensor(KEY), None, compute_dtype, bias, **options)


def dense_sampled_loss(queries: Tensor, rows: Tensor, bias: Tensor | None, normalize: bool) -> Tensor:
    index, log_weight = sample_rows(200, NUM_NEGATIVES, KEY, TARGETS, alone())
    scores = queries @ (F.normalize(rows, dim=1) if normalize else rows).T
    scores = scores if bias is None else scores + bias.T
    lse = (scores[:, index] + log_weight.double()).logsumexp(1)
    return (lse[TARGET_QUERY] - scores[TARGET_QUERY, TARGETS]).sum()


@pytest.mark.parametrize("item_bias", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_sampled_softmax_equals_the_dense_one_over_its_sample(normalize: bool, item_bias: bool) -> None:
    exact, leaves = (sampled_case()[: 2 + item_bias] for _ in range(2))
    expected = dense_sampled_loss(*exact[:2], exact[2] if item_bias else None, normalize)
    gradients = torch.autograd.grad(expected, exact)
    touched = set(sample_rows(200, NUM_NEGATIVES, KEY, TARGETS, alone())[0].tolist())
    for sparse in (True, False):
        options = {"normalize": normalize, "accumulate": True, "sparse": sparse}
        loss = sampled_loss(*leaves[:2], leaves[2] if item_bias else None, **options)
        torch.testing.assert_close(loss, expected)
        for index, (got, value) in enumerate(zip(torch.autograd.grad(loss, leaves), gradients, strict=True)):
            assert got.is_sparse == (sparse and index > 0)
            if got.is_sparse:
                assert set(got.coalesce().indices()[0].tolist()) == touched, "a row that was not sampled has a gradient"
            torch.testing.assert_close(got.to_dense(), value)


def test_a_sampled_softmax_in_bf16_rounds_no_log_weight() -> None:
    exact = sampled_case()
    expected = dense_sampled_loss(*exact, normalize=False)
    loss = sampled_loss(*(leaf.detach().float() for leaf in exact), compute_dtype=torch.bfloat16)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


ITEMS, HIDDEN = 40_000, 32
SPACE = TokenSpace(10, 4, ITEMS)


def forward_and_backward(model: Recommender, num_batches: int) -> None:
    """Micro-batches and the mutual loss after the last one, as in a step."""
    random = np.random.default_rng(0)
    first_item, batches = SPACE.first_item, []
    for index in range(num_batches):
        items, targets = first_item + random.integers(ITEMS, size=20), random.integers(ITEMS, size=20)
        tokens = np.concatenate([[SPACE.first_user], items])
        batches.append(collate_each([Document(tokens, np.arange(20), np.arange(20), targets, index)], SPACE))
    routes = model.route(batches)
    for index, (tokens, item_rows) in enumerate(model.embed(batches, routes)):
        losses = model(batches[index], tokens, item_rows, lambda embedded, *_: embedded.tanh())
        if index == num_batches - 1:
            losses["mutual"] = model.mutual_loss(model.touched(routes), 0.3, 0.7)
        torch.stack([*losses.values()]).sum().backward()


@pytest.mark.parametrize("num_batches", [1, 3])
@pytest.mark.parametrize("sparse_gradients", [True, False])
def test_the_head_needs_little_more_than_the_item_rows_and_one_gradient(
    num_batches: int, sparse_gradients: bool
) -> None:
    words = FrozenEmbeddings(*torch.zeros(2, SPACE.num_words, HIDDEN))
    settings: dict[str, Any] = {"dropout": 0.0, "comm_dtype": torch.float32, "content": False}
    model = Recommender(4, ITEMS, words, HeadConfig(), alone(), sparse_gradients=sparse_gradients, **settings)
    model.collaborative.items.local_rows.data.normal_(generator=torch.Generator().manual_seed(0))
    rows, bias = (ITEMS * width * 4 for width in (HIDDEN, 1))
    with LiveMemory() as memory:
        forward_and_backward(model, num_batches)
    added = memory.highest - memory.before
    # The rows are there before. Biases have a gradient, and a second one while it is added.
    assert added - 2 * bias <= 1.3 * (rows + rows) - rows, "with the chunks of logits, which are small here"
    assert added >= rows, "the gradient must be seen"
    gradient = model.collaborative.items.local_rows.grad
    assert gradient is not None
    assert not gradient.is_sparse


def test_a_sampled_softmax_costs_what_was_sampled() -> None:
    """In memory, and in the optimizer, which leaves other rows and biases as they are."""
    words = FrozenEmbeddings(*torch.zeros(2, SPACE.num_words, HIDDEN))
    settings: dict[str, Any] = {"dropout": 0.0, "comm_dtype": torch.float32, "content": False, "sparse_gradients": True}
    model = Recommender(4, ITEMS, words, HeadConfig(num_negatives=300), alone(), **settings)
    for parameter in model.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    optimizer, bias = EmbeddingOptimizer(model, (0.9, 0.99)), model.head.local_bias
    assert bias is not None
    items = model.collaborative.items.local_rows
    before = items.detach().clone(), bias.detach().clone()
    with LiveMemory() as memory:
        forward_and_backward(model, 3)
        for parameter in (items, bias):
            assert parameter.grad is not None
            parameter.grad = parameter.grad.coalesce()
        optimizer.step(1e-3)
    # Each of three micro-batches has 300 sampled and 20 predicted items, and as many are read.
    assert memory.highest - memory.before < 0.5 * ITEMS * HIDDEN * 4
    for parameter, old in zip((items, bias), before, strict=True):
        assert 300 < (parameter.detach() != old).any(dim=1).sum() <= 3 * 340
    moments = optimizer.state()["collaborative.items"]["exp_avg"]
    assert 300 < (moments != 0).any(dim=1).sum() <= 3 * 340


def test_a_normalized_copy_of_the_rows_would_be_seen() -> None:
    weight = torch.randn(ITEMS, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
    queries, index = torch.randn(20, HIDDEN), torch.arange(20)
    with LiveMemory() as memory:
        lse, scores = chunked_logsumexp_and_scores(queries, F.normalize(weight, dim=1), index, index, 100_000)
        (lse - scores).sum().backward()
    assert memory.highest - memory.before > 2.5 * ITEMS * HIDDEN * 4
