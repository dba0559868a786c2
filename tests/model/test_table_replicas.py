"""Copies of the tables: their groups of ranks, the sums of their gradients, and that they stay equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cllm4rec_dist.config import HeadConfig
from cllm4rec_dist.distributed.topology import World, split_world
from cllm4rec_dist.errors import ConfigError, FaultError
from cllm4rec_dist.model.frozen_embeddings import FrozenEmbeddings
from cllm4rec_dist.model.recommender import Recommender
from cllm4rec_dist.model.table_replicas import (
    copy_first_replica,
    require_equal_replicas,
    share_touched_rows,
    sum_gradient,
)
from tests.harness import alone, run_ranks

ROWS, WIDTH = 5, 3


def dense_gradient(rank: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(rank))


def sparse_gradient(rank: int) -> Tensor:
    """Rows 0 to `rank`, the last one twice; none on rank 0."""
    index = torch.arange(rank).repeat(2)
    values = torch.randn(2 * rank, WIDTH, generator=torch.Generator().manual_seed(rank))
    return torch.sparse_coo_tensor(index[None], values, (ROWS, WIDTH), check_invariants=True)


def make_model(shards: World, replicas: World) -> Recommender:
    words = FrozenEmbeddings(torch.zeros(7, WIDTH), torch.zeros(0, WIDTH))
    options: dict[str, Any] = {"dropout": 0.0, "comm_dtype": torch.float32, "sparse_gradients": True, "content": True}
    return Recommender(9, 7, words, HeadConfig(), shards, replicas=replicas, **options)


def message_of(model: Recommender) -> str:
    try:
        require_equal_replicas(model)
    except FaultError as error:
        return str(error)
    return ""


def everything(world: World) -> dict[str, Any]:
    """What two copies of the tables, each on two of four ranks, do together."""
    shards, replicas = split_world(world, 2, 60.0)
    model = make_model(shards, replicas)
    results: dict[str, Any] = {
        "places": (shards.rank, shards.size, shards.replica, shards.is_main, replicas.rank, replicas.size),
        "dense": sum_gradient(dense_gradient(world.rank), replicas),
        "sparse": sum_gradient(sparse_gradient(world.rank), replicas).to_dense(),
        "touched": share_touched_rows(torch.tensor([[1, 4], [2], [0, 4, 7], []][world.rank]).long(), replicas),
    }
    with torch.no_grad():
        for _, rows, _ in model.sharded_parameters():
            rows.fill_(world.rank)
    results["before"] = message_of(model)
    copy_first_replica(model)
    results["rows"] = [float(rows.unique()) for _, rows, _ in model.sharded_parameters() if len(rows)]
    results["after"] = message_of(model)
    with torch.no_grad():
        if world.rank == 3:
            model.content.items.local_rows[0, 1] += 1e-7  # type: ignore[union-attr]
    results["one bit"] = message_of(model)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(4, everything)


def test_groups_of_consecutive_ranks_share_a_copy_of_the_tables(ranks: list[dict[str, Any]]) -> None:
    assert [rank["places"] for rank in ranks] == [
        (0, 2, 0, True, 0, 2),
        (1, 2, 0, False, 0, 2),
        (0, 2, 1, False, 1, 2),
        (1, 2, 1, False, 1, 2),
    ]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_gradients_are_summed_over_the_copies_to_the_same_bits(ranks: list[dict[str, Any]], kind: str) -> None:
    make = dense_gradient if kind == "dense" else sparse_gradient
    for rank in range(2):
        expected = sum(make(r).to_dense().double() for r in (rank, rank + 2))
        torch.testing.assert_close(ranks[rank][kind].double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(ranks[rank][kind], ranks[rank + 2][kind])


def test_each_touched_row_is_in_the_part_of_one_copy(ranks: list[dict[str, Any]]) -> None:
    touched = [rank["touched"].tolist() for rank in ranks]
    assert touched[0] + touched[2] == [0, 1, 4, 7]
    assert touched[1] + touched[3] == [2]


def test_all_copies_start_as_the_first_and_a_difference_of_one_bit_is_found(ranks: list[dict[str, Any]]) -> None:
    for index, rank in enumerate(ranks):
        assert "collaborative.users, collaborative.items" in rank["before"]
        assert rank["after"] == ""
        assert set(rank["rows"]) == {index % 2}
        assert ("'content.items' differ between the 2 replicas" in rank["one bit"]) == (index % 2 == 1)


def test_one_copy_needs_no_groups_and_other_numbers_are_refused() -> None:
    shards, replicas = split_world(alone(), None, 60.0)
    assert shards is not replicas
    assert (shards, replicas.size) == (alone(), 1)
    world = World(1, 4, 1, torch.device("cpu"))
    assert split_world(world, 4, 60.0)[0] is world
    with pytest.raises(ConfigError, match=r"embeddings\.shard_group.*3.*does not divide the 4 ranks"):
        split_world(world, 3, 60.0)
    with pytest.raises(ConfigError, match="8 ranks"):
        split_world(World(0, 8, 0, torch.device("cpu")), 16, 60.0)
