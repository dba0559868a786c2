"""Lookups over row shards equal indexing of the whole tables, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.sharded_embedding import RowShardedEmbedding, route_ids, start_lookup, touched_rows
from tests.harness import alone, run_ranks

WIDTH = 4
TABLES = [(11, False), (8, True), (2, True), (11, True)]
"""Number of rows, and True for sparse gradients. Most ranks hold nothing of the third table."""
NUM_BATCHES = 3
WORLDS = [1, 2, 3, 4]
COMM_DTYPES = [torch.float32, torch.bfloat16]


def name_of(table: int) -> str:
    return f"table-{table}"


def rows_of(table: int) -> Tensor:
    return torch.randn(TABLES[table][0], WIDTH, generator=torch.Generator().manual_seed(table))


def ids_of(size: int, rank: int) -> list[list[Tensor]]:
    """Ids by micro-batch and table: unsorted, with duplicates, at times none, and none on the last of several ranks."""
    random = torch.Generator().manual_seed(100 + rank)
    batches = []
    for batch in range(NUM_BATCHES):
        lengths = [9 + 4 * rank - batch, 5, 3 * (batch % 2), 7 + batch]
        if 0 < rank == size - 1:
            lengths = [0] * len(TABLES)
        pairs = zip(lengths, TABLES, strict=True)
        batches.append([torch.randint(rows, (length,), generator=random) for length, (rows, _) in pairs])
    return batches


def weights_of(size: int, rank: int) -> list[list[Tensor]]:
    random = torch.Generator().manual_seed(rank)
    return [[torch.randn(len(ids), WIDTH, generator=random) for ids in batch] for batch in ids_of(size, rank)]


def looked_up(world: World) -> dict[str, Any]:
    """Rows, gradients and routes, with fp32 and bf16 communication."""
    tables = {}
    for index, (num_rows, sparse) in enumerate(TABLES):
        table = RowShardedEmbedding(num_rows, WIDTH, world, sparse_gradients=sparse)
        table.local_rows.data.copy_(rows_of(index)[slice(*table.partition.range(world.rank))])
        tables[name_of(index)] = table
    weights = weights_of(world.size, world.rank)
    ids = [{name_of(index): part for index, part in enumerate(batch)} for batch in ids_of(world.size, world.rank)]
    routes = route_ids(ids, {name: table.partition for name, table in tables.items()}, world)
    results: dict[str, Any] = {
        "send": [route.send_counts for route in routes],
        "receive": [route.receive_counts for route in routes],
        "touched": [
            touched_rows([route.local_index[name] for route in routes]) + table.partition.range(world.rank)[0]
            for name, table in tables.items()
        ],
    }
    for comm_dtype in COMM_DTYPES:
        rows = []
        for route, weight in zip(routes, weights, strict=True):
            rows.append([*start_lookup(tables, route, comm_dtype).wait().values()])
            torch.stack([(r * w).sum() for r, w in zip(rows[-1], weight, strict=True)]).sum().backward()
        gradients = [table.local_rows.grad for table in tables.values()]
        results[str(comm_dtype)] = {
            "rows": [[part.detach() for part in batch] for batch in rows],
            "gradients": [gradient.to_dense() for gradient in gradients if gradient is not None],
            "stored": [g.coalesce().indices()[0] if g is not None and g.is_sparse else None for g in gradients],
        }
        for table in tables.values():
            table.local_rows.grad = None
    return results


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, Any]]]:
    return {size: run_ranks(size, looked_up) for size in WORLDS}


def gradient_of(size: int, table: int, comm_dtype: torch.dtype) -> Tensor:
    """Gradient of the whole table; each rank rounds once per distinct row of a micro-batch, and sums are exact."""
    total = torch.zeros(TABLES[table][0], WIDTH)
    for rank in range(size):
        for ids, weights in zip(ids_of(size, rank), weights_of(size, rank), strict=True):
            local = torch.zeros_like(total).index_add_(0, ids[table], weights[table])
            total += local.to(comm_dtype).float()
    return total


@pytest.mark.parametrize("comm_dtype", COMM_DTYPES)
@pytest.mark.parametrize("table", range(len(TABLES)))
@pytest.mark.parametrize("size", WORLDS)
def test_a_lookup_equals_indexing_the_whole_table(ranks: Any, size: int, table: int, comm_dtype: torch.dtype) -> None:
    results = [rank[str(comm_dtype)] for rank in ranks[size]]
    for rank in range(size):
        for rows, ids in zip(results[rank]["rows"], ids_of(size, rank), strict=True):
            torch.testing.assert_close(rows[table], rows_of(table)[ids[table]].to(comm_dtype).float(), rtol=0, atol=0)
        assert (results[rank]["stored"][table] is not None) == TABLES[table][1]
    whole = torch.cat([part["gradients"][table] for part in results])
    torch.testing.assert_close(whole, gradient_of(size, table, comm_dtype))


def test_fp32_communication_gives_the_gradient_of_indexing(ranks: Any) -> None:
    for index in range(len(TABLES)):
        rows = rows_of(index).requires_grad_()
        for ids, weights in zip(ids_of(1, 0), weights_of(1, 0), strict=True):
            (rows[ids[index]] * weights[index]).sum().backward()
        torch.testing.assert_close(ranks[1][0][str(torch.float32)]["gradients"][index], rows.grad)


@pytest.mark.parametrize("table", range(len(TABLES)))
@pytest.mark.parametrize("size", WORLDS)
def test_touched_rows_are_those_that_any_rank_looks_up(ranks: Any, size: int, table: int) -> None:
    expected = sorted({int(row) for rank in range(size) for batch in ids_of(size, rank) for row in batch[table]})
    assert [row for rank in ranks[size] for row in rank["touched"][table].tolist()] == expected
    if TABLES[table][1]:
        partition = RowPartition(TABLES[table][0], size)
        stored = [
            rank[str(torch.float32)]["stored"][table] + partition.range(index)[0]
            for index, rank in enumerate(ranks[size])
        ]
        assert torch.cat(stored).tolist() == expected


@pytest.mark.parametrize("size", WORLDS)
def test_a_row_is_sent_once_however_often_it_is_looked_up(ranks: Any, size: int) -> None:
    for batch in range(NUM_BATCHES):
        sent = [rank["send"][batch] for rank in ranks[size]]
        for rank, counts in enumerate(sent):
            owners = torch.zeros(size, dtype=torch.int64)
            for ids, (num_rows, _) in zip(ids_of(size, rank)[batch], TABLES, strict=True):
                owners += torch.bincount(ids.unique() // RowPartition(num_rows, size).block, minlength=size)
            assert counts == owners.tolist()
        for index, rank in enumerate(ranks[size]):
            assert rank["receive"][batch] == [counts[index] for counts in sent]


def make_table() -> RowShardedEmbedding:
    table = RowShardedEmbedding(5, WIDTH, alone(), sparse_gradients=True)
    assert not table.local_rows.any(), "it starts at zero"
    with torch.no_grad():
        table.local_rows.copy_(rows_of(0)[:5])
    return table


def test_local_rows_are_looked_up_by_local_index() -> None:
    table = make_table()
    rows = table.local_lookup(torch.tensor([3, 1]))
    rows.sum().backward()
    assert table.local_rows.grad is not None
    torch.testing.assert_close(rows, rows_of(0)[[3, 1]], rtol=0, atol=0)
    assert table.local_rows.grad.to_dense().sum(dim=1).tolist() == [0, WIDTH, 0, WIDTH, 0]


@pytest.mark.parametrize("row", [-1, 5])
def test_a_row_outside_of_the_table_is_an_assertion(row: int) -> None:
    with pytest.raises(AssertionError, match="out of range"):
        route_ids([{"users": torch.tensor([0, row])}], {"users": RowPartition(5, 1)}, alone())


def test_rows_that_change_during_a_lookup_are_an_assertion() -> None:
    table = make_table()
    (route,) = route_ids([{"users": torch.tensor([4, 0])}], {"users": table.partition}, alone())
    early = start_lookup({"users": table}, route)
    table.local_rows.grad = torch.ones_like(table.local_rows)
    torch.optim.AdamW(table.parameters()).step()
    with pytest.raises(AssertionError, match="changed"):
        early.wait()
