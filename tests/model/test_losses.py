"""Losses equal the paper's formulas, written out in plain loops over Python floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.frozen_embeddings import FrozenEmbeddings
from cllm4rec_dist.model.losses import item_loss, mutual_regularization, text_loss
from cllm4rec_dist.model.sharded_cross_entropy import GatheringQueries
from tests.harness import alone, run_ranks

NUM_ITEMS, WIDTH = 7, 3
# Users with many items, with one, and none at all on a rank: documents of different lengths in one batch.
HISTORIES = [[[4, 0, 6, 2], [5]], [], [[3], [1, 2, 3], [0, 6]]]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def log_softmax(state: list[float], classes: list[list[float]], target: int) -> float:
    scores = [dot(state, row) for row in classes]
    return scores[target] - math.log(sum(math.exp(score) for score in scores))


ITEMS = normal(NUM_ITEMS, WIDTH, seed=0)


def collaborative_case(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 6: a state for each item of each user, one target each."""
    targets = [item for history in HISTORIES[rank] for item in history]
    return normal(len(targets), WIDTH, seed=10 + rank), torch.arange(len(targets)), torch.tensor(targets).long()


def multinomial_case(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 9: one state for each user, all of the user's items its targets."""
    histories = HISTORIES[rank]
    owners = torch.tensor([user for user, history in enumerate(histories) for _ in history]).long()
    targets = torch.tensor([item for history in histories for item in history]).long()
    return normal(len(histories), WIDTH, seed=20 + rank), owners, targets


CASES = {"collaborative": collaborative_case, "multinomial": multinomial_case}


def by_hand(kind: str, rank: int) -> float:
    states, classes = CASES[kind](rank)[0].tolist(), ITEMS.tolist()
    total = 0.0
    if kind == "collaborative":
        position = 0
        for history in HISTORIES[rank]:
            for item in history:
                total -= log_softmax(states[position], classes, item)
                position += 1
    else:
        # -sum over items of r_ij * log pi_ij, with pi the softmax over the catalog of the user's one state.
        for user, history in enumerate(HISTORIES[rank]):
            rated = [1 if item in history else 0 for item in range(NUM_ITEMS)]
            total -= sum(r * log_softmax(states[user], classes, item) for item, r in enumerate(rated))
    return total


@pytest.mark.parametrize("rank", range(len(HISTORIES)))
@pytest.mark.parametrize("kind", CASES)
def test_item_likelihood_is_the_papers(kind: str, rank: int) -> None:
    gathering = GatheringQueries(*CASES[kind](rank), RowPartition(NUM_ITEMS, 1), alone())
    assert item_loss(gathering, ITEMS).item() == pytest.approx(by_hand(kind, rank), rel=1e-12)


def test_a_user_with_one_item_is_language_modeling_with_one_position() -> None:
    state, partition = normal(1, WIDTH, seed=1), RowPartition(NUM_ITEMS, 1)
    one = torch.zeros(1, dtype=torch.int64)
    loss = item_loss(GatheringQueries(state, one, torch.tensor([5]), partition, alone()), ITEMS)
    assert loss.item() == pytest.approx(-log_softmax(state[0].tolist(), ITEMS.tolist(), 5), rel=1e-12)


def sharded(world: World) -> dict[str, Any]:
    partition = RowPartition(NUM_ITEMS, world.size)
    weight = ITEMS[slice(*partition.range(world.rank))]
    gathering = {kind: GatheringQueries(*case(world.rank), partition, world) for kind, case in CASES.items()}
    return {kind: item_loss(queries, weight) for kind, queries in gathering.items()}


def test_each_ranks_sum_is_that_of_its_users_over_the_whole_catalog() -> None:
    for rank, losses in enumerate(run_ranks(3, sharded)):
        for kind in CASES:
            assert losses[kind].item() == pytest.approx(by_hand(kind, rank), rel=1e-12, abs=1e-12)


def test_word_likelihood_is_the_papers() -> None:
    states, head = normal(5, WIDTH, seed=1), normal(9, WIDTH, seed=2)
    # Position 3 predicts nothing.
    target_query, targets = torch.tensor([0, 1, 2, 4]), torch.tensor([8, 0, 3, 3])
    loss = text_loss(states, FrozenEmbeddings(head, head), target_query, targets)
    expected = -sum(
        log_softmax(states[query].tolist(), head.tolist(), target)
        for query, target in zip(target_query.tolist(), targets.tolist(), strict=True)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert text_loss(states[:0], FrozenEmbeddings(head, head), target_query[:0], targets[:0]).item() == 0.0


def test_mutual_regularization_is_the_papers() -> None:
    collaborative, content = normal(4, WIDTH, seed=1).requires_grad_(), normal(4, WIDTH, seed=2).requires_grad_()
    lambda_l, lambda_c = 0.3, 0.7
    loss = mutual_regularization(collaborative, content, lambda_l, lambda_c)
    expected = sum(
        lambda_c / 2 * sum((c - o) ** 2 for c, o in zip(z_c, z_l, strict=True)) + lambda_l / 2 * dot(z_l, z_l)
        for z_l, z_c in zip(collaborative.tolist(), content.tolist(), strict=True)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    # Gradients flow into both sides.
    torch.testing.assert_close(content.grad, (lambda_c * (content - collaborative)).detach())
    torch.testing.assert_close(
        collaborative.grad, (lambda_l * collaborative - lambda_c * (content - collaborative)).detach()
    )


def test_without_content_rows_only_the_prior_is_left() -> None:
    collaborative = normal(4, WIDTH, seed=1)
    loss = mutual_regularization(collaborative, None, 0.3, 0.7)
    assert loss.item() == pytest.approx(0.15 * sum(x * x for row in collaborative.tolist() for x in row), rel=1e-12)
