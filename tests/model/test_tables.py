"""Lookups over row shards equal indexing of the whole table, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cllm4rec_dist.model.tables import ShardedTable, route_ids, touched_rows
from cllm4rec_dist.topology import RowPartition, World
from tests.harness import run_ranks

WIDTH = 4
ROWS = [11, 8, 2]
WORLDS = [1, 2, 3, 4]


def rows_of(num_rows: int) -> Tensor:
    return torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(num_rows))


def ids_of(num_rows: int, size: int) -> list[Tensor]:
    """What each rank asks for: repeated and unsorted ids; nothing on the last of several ranks."""
    random = torch.Generator().manual_seed(100 + num_rows)
    lengths = [9 + 4 * rank for rank in range(size)]
    if size > 1:
        lengths[-1] = 0
    return [torch.randint(num_rows, (length,), generator=random) for length in lengths]


def weights_of(ids: list[Tensor]) -> list[Tensor]:
    random = torch.Generator().manual_seed(7)
    return [torch.randn(len(part), WIDTH, generator=random) for part in ids]


def looked_up(world: World) -> dict[str, Any]:
    """Rows, gradients and routes for every table size, with dense and sparse gradients."""
    found: dict[str, Any] = {}
    for num_rows in ROWS:
        partition = RowPartition(num_rows, world.size)
        ids = ids_of(num_rows, world.size)
        own_ids, weights = ids[world.rank], weights_of(ids)[world.rank]
        route = route_ids(own_ids, partition, world)
        other = route_ids(own_ids.flip(0)[:3], partition, world)
        start, stop = partition.range(world.rank)
        for sparse in (False, True):
            table = ShardedTable(num_rows, WIDTH, world, sparse_gradients=sparse)
            table.local_rows.data.copy_(rows_of(num_rows)[start:stop])
            rows = table.lookup(route)
            (rows * weights).sum().backward()
            gradient = table.local_rows.grad
            assert gradient is not None
            found[f"{num_rows}-{sparse}"] = {
                "rows": rows.detach(), "grad": gradient.to_dense(), "is_sparse": gradient.is_sparse,
                "stored": gradient.coalesce().indices()[0] if gradient.is_sparse else None,
            }  # fmt: skip
        found[f"{num_rows}-route"] = {
            "send": route.send_counts, "receive": route.receive_counts, "touched": touched_rows([route, other]) + start,
        }  # fmt: skip
    return found


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, Any]]]:
    return {size: run_ranks(size, looked_up) for size in WORLDS}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("size", WORLDS)
def test_a_lookup_equals_indexing_the_whole_table(ranks: Any, size: int, num_rows: int, sparse: bool) -> None:
    ids = ids_of(num_rows, size)
    table = rows_of(num_rows).requires_grad_()
    sum((table[part] * weight).sum() for part, weight in zip(ids, weights_of(ids), strict=True)).backward()
    for rank, part in zip(ranks[size], ids, strict=True):
        found = rank[f"{num_rows}-{sparse}"]
        torch.testing.assert_close(found["rows"], table.detach()[part], rtol=0, atol=0)
        assert found["is_sparse"] == sparse
    whole = torch.cat([rank[f"{num_rows}-{sparse}"]["grad"] for rank in ranks[size]])
    torch.testing.assert_close(whole, table.grad)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("size", WORLDS)
def test_touched_rows_are_those_that_any_rank_asked_for(ranks: Any, size: int, num_rows: int) -> None:
    wanted = sorted({int(row) for part in ids_of(num_rows, size) for row in part})
    touched = [row for rank in ranks[size] for row in rank[f"{num_rows}-route"]["touched"].tolist()]
    assert touched == wanted
    stored = torch.cat([
        rank[f"{num_rows}-True"]["stored"] + RowPartition(num_rows, size).range(index)[0]
        for index, rank in enumerate(ranks[size])
    ])  # fmt: skip
    assert stored.tolist() == wanted


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("size", WORLDS)
def test_an_id_goes_over_the_wire_once_however_often_it_is_asked_for(ranks: Any, size: int, num_rows: int) -> None:
    partition = RowPartition(num_rows, size)
    sent = [rank[f"{num_rows}-route"]["send"] for rank in ranks[size]]
    for counts, part in zip(sent, ids_of(num_rows, size), strict=True):
        owners = torch.bincount(part.unique() // partition.block, minlength=size)
        assert counts == owners.tolist()
    for index, rank in enumerate(ranks[size]):
        assert rank[f"{num_rows}-route"]["receive"] == [counts[index] for counts in sent]


def own_rows(world: World) -> dict[str, Any]:
    table = ShardedTable(5, WIDTH, world, sparse_gradients=True)
    starts_at_zero = not table.local_rows.any()
    table.local_rows.data.copy_(rows_of(5))
    rows = table.own(torch.tensor([3, 1]))
    rows.sum().backward()
    assert table.local_rows.grad is not None
    return {"zero": bool(starts_at_zero), "rows": rows.detach(), "grad": table.local_rows.grad.to_dense()}


def test_own_rows_are_taken_by_local_index() -> None:
    (found,) = [own_rows(World(0, 1, 0, torch.device("cpu")))]
    assert found["zero"]
    torch.testing.assert_close(found["rows"], rows_of(5)[[3, 1]], rtol=0, atol=0)
    assert found["grad"].sum(dim=1).tolist() == [0, WIDTH, 0, WIDTH, 0]


@pytest.mark.parametrize("row", [-1, 5])
def test_a_row_outside_of_the_table_is_an_assertion(row: int) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    with pytest.raises(AssertionError, match="out of range"):
        route_ids(torch.tensor([0, row]), RowPartition(5, 1), world)
