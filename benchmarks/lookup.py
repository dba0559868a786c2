"""Lookup of skewed ids in a row-sharded table, forward and backward, compared with two alternatives in torch.

    python -m benchmarks.lookup

`ours` has sparse gradients, `ours dense` has dense ones (`sparse_embedding_updates: false`), and `ours bf16` has sparse
gradients and communicates in bf16. `rowwise` is an `nn.Embedding` with DTensor's `RowwiseParallel`, with ids and rows
sharded by rank (all-gather of ids, reduce-scatter of rows; torch makes a gradient of the whole table on every rank).
`rowwise distinct` dedupes the ids first and pads them to the longest rank. `gathered` all-gathers the whole table,
embeds locally and reduce-scatters the gradient, as ZeRO-3 would. All return the same rows and the same gradient of the
local rows.

Ids follow Zipf's law. Forms take turns on gloo ranks with one core each. Bytes are those that a rank sends (see
`measured.py`). The minimum is every distinct row of another rank once in each direction.
A second table shows the gain of starting the lookup of the next micro-batch before this one is computed.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from benchmarks.common import parser, show, show_table, write_json
from benchmarks.measured import SentBytes
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model.sharded_embedding import Route, RowShardedEmbedding, route_ids, start_lookup

Form = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Ids and the gradient of their rows -> rows, and the gradient of the local rows."""
MICRO_BATCHES = 4
BASES = ("ours", "ours dense")
TURNS = ("one after the other", "prefetched")


def zipf_ids(num_rows: int, count: int, rank: int) -> Tensor:
    """Draw skewed ids; the popular ones are spread over the table, equally on all ranks."""
    probabilities = 1 / np.arange(1, num_rows + 1)
    probabilities /= probabilities.sum()
    popularity = np.searchsorted(probabilities.cumsum(), np.random.default_rng(rank + 1).random(count))
    return torch.from_numpy(np.random.default_rng(0).permutation(num_rows)[popularity.clip(max=num_rows - 1)])


def make_forms(rows: Tensor, world: World) -> dict[str, Form]:
    """Make all forms over `rows` [R, D]."""
    mesh = init_device_mesh("cpu", (world.size,))

    def make_table(sparse: bool) -> RowShardedEmbedding:
        table = RowShardedEmbedding(*rows.shape, world, sparse_gradients=sparse)
        table.local_rows.data.copy_(rows[slice(*table.partition.range(world.rank))])
        return table

    def make_ours(table: RowShardedEmbedding, comm_dtype: torch.dtype) -> Form:
        def run(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
            (route,) = route_ids([{"table": ids}], {"table": table.partition}, world)
            (looked_up,) = start_lookup({"table": table}, route, comm_dtype).wait().values()
            looked_up.backward(gradient)
            return looked_up, take_gradient(table.local_rows)

        return run

    embedding = nn.Embedding(*rows.shape, _weight=rows)
    rowwise = parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)))

    def run_rowwise(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        looked_up = rowwise(ids)
        looked_up.backward(gradient)
        return looked_up, local_part(take_gradient(rowwise.weight))

    def run_distinct(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        distinct, inverse = torch.unique(ids, return_inverse=True)
        longest = torch.tensor(len(distinct))
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        looked_up = rowwise(F.pad(distinct, (0, int(longest) - len(distinct))))[inverse]
        looked_up.backward(gradient)
        return looked_up, local_part(take_gradient(rowwise.weight))

    sparse_table, dense_table = make_table(True), make_table(False)

    def run_gathered(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        local = dense_table.local_rows.detach()
        whole = local.new_empty(len(local) * world.size, rows.shape[1])
        dist.all_gather_into_tensor(whole, local)
        looked_up = F.embedding(ids, whole.requires_grad_())
        looked_up.backward(gradient)
        local_gradient = torch.empty_like(local)
        dist.reduce_scatter_tensor(local_gradient, take_gradient(whole))
        return looked_up, local_gradient

    return {
        "ours": make_ours(sparse_table, torch.float32),
        "ours bf16": make_ours(sparse_table, torch.bfloat16),
        "ours dense": make_ours(dense_table, torch.float32),
        "rowwise": run_rowwise,
        "rowwise distinct": run_distinct,
        "gathered": run_gathered,
    }


def take_gradient(parameter: Tensor) -> Tensor:
    """Return the gradient and remove it from the parameter."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    return gradient


def local_part(gradient: Tensor) -> Tensor:
    """Gradient of the local rows from a DTensor's whole gradient."""
    assert isinstance(gradient, DTensor)
    return gradient.redistribute(placements=[Shard(0)]).to_local()


def seconds(form: Callable[[], object]) -> float:
    """Seconds from when all ranks start until all are done."""
    dist.barrier()
    started = time.perf_counter()
    form()
    dist.barrier()
    return time.perf_counter() - started


def compare(world: World, chosen: Namespace, width: int) -> dict[str, Any]:
    """Measure seconds of each round and bytes of each form, whose results must agree."""
    rows = torch.randn(chosen.rows, width, generator=torch.Generator().manual_seed(0))
    ids = zipf_ids(chosen.rows, chosen.ids, world.rank)
    gradient = torch.randn(chosen.ids, width, generator=torch.Generator().manual_seed(world.rank))
    forms = make_forms(rows, world)
    expected = forms["gathered"](ids, gradient)[1]
    leaving = {}
    for name, form in forms.items():
        with SentBytes(world) as traffic:
            looked_up, local_gradient = form(ids, gradient)
        leaving[name] = traffic.num_bytes
        tolerance = 2**-8 if "bf16" in name else 1e-5
        for value, exact in ((looked_up.detach(), rows[ids]), (local_gradient.to_dense(), expected)):
            torch.testing.assert_close(value, exact, rtol=0, atol=tolerance * exact.abs().max().item())
    taking: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(chosen.repeats):
        for name, form in forms.items():
            taking[name].append(seconds(lambda form=form: form(ids, gradient)))  # type: ignore[misc]
    distinct = ids.unique()
    remote = int((distinct // -(-chosen.rows // world.size) != world.rank).sum())
    return {"seconds": taking, "bytes": leaving, "distinct": len(distinct), "least": 2 * remote * width * 4}


def overlap(world: World, chosen: Namespace, width: int) -> dict[str, list[float]]:
    """Measure seconds of micro-batches of lookup and matrix products, forward only."""
    table = RowShardedEmbedding(chosen.rows, width, world, sparse_gradients=True)
    parts = zipf_ids(chosen.rows, chosen.ids * MICRO_BATCHES, world.rank).split(chosen.ids)
    routes = route_ids([{"table": part} for part in parts], {"table": table.partition}, world)
    tables = {"table": table}
    weight = torch.randn(width, 8 * width)

    def compute(rows: Tensor) -> Tensor:
        return rows @ weight @ weight.T

    def in_turn() -> None:
        for route in routes:
            compute(start_lookup(tables, route).wait()["table"])

    def prefetched() -> None:
        following: list[Route | None] = [*routes[1:], None]
        pending = start_lookup(tables, routes[0])
        for route in following:
            lookup = pending
            if route is not None:
                pending = start_lookup(tables, route)
            compute(lookup.wait()["table"])

    taking: dict[str, list[float]] = {name: [] for name in TURNS}
    with torch.no_grad():
        for repeat in range(chosen.repeats + 1):
            for name, form in zip(TURNS, (in_turn, prefetched), strict=True):
                duration = seconds(form)
                if repeat:  # the first one warms up
                    taking[name].append(duration)
    return taking


def _enter(rank: int, size: int, chosen: Namespace, width: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    world = World(rank, size, rank, torch.device("cpu"))
    figures = {"lookup": compare(world, chosen, width), "overlap": overlap(world, chosen, width)}
    Path(folder, str(rank)).write_text(json.dumps(figures))
    dist.destroy_process_group()


def measure(size: int, chosen: Namespace, width: int) -> dict[str, Any]:
    """Measure with `size` ranks: times of rank 0, bytes of all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_enter, (size, chosen, width, folder), nprocs=size, start_method="fork")
        ranks = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(size)]
    first = ranks[0]["lookup"]["seconds"]
    least = sum(rank["lookup"]["least"] for rank in ranks)
    forms = {}
    for name, taking in first.items():
        of = {}
        for base in BASES:
            ratios = [ours / theirs for ours, theirs in zip(first[base], taking, strict=True)]
            of[base] = [statistics.median(ratios), min(ratios), max(ratios)]
        sent = sum(rank["lookup"]["bytes"][name] for rank in ranks)
        forms[name] = {
            "seconds": statistics.median(taking),
            "seconds_range": [min(taking), max(taking)],
            "median_and_range_of_it": of,
            "bytes_a_rank": sent / size,
            "of_least_bytes": sent / least,
        }
    in_turn, prefetched = (ranks[0]["overlap"][name] for name in TURNS)
    ratios = [a / b for a, b in zip(prefetched, in_turn, strict=True)]
    return {
        "ranks": size,
        "width": width,
        "distinct_of_rank_0": ranks[0]["lookup"]["distinct"],
        "forms": forms,
        "overlap": {
            "seconds": [statistics.median(in_turn), statistics.median(prefetched)],
            "ahead_of_in_turn": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        },
    }


def main() -> None:
    options = parser("lookup", __doc__)
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--widths", type=int, nargs="+", default=[64])
    options.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    options.add_argument("--ids", type=int, default=8192, help="ids of a rank (%(default)s)")
    options.add_argument("--repeats", type=int, default=9)
    chosen = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    figures = [measure(size, chosen, width) for width in chosen.widths for size in chosen.ranks]
    lines, overlaps = [], []
    for result in figures:
        about = [result["ranks"], result["width"]]
        for name, form in result["forms"].items():
            ratios = ["{:.3f} ({:.3f} to {:.3f})".format(*form["median_and_range_of_it"][base]) for base in BASES]
            sent = f"{form['bytes_a_rank'] / 1e6:.2f}", f"{form['of_least_bytes']:.3f}"
            lines.append([name, *about, f"{form['seconds'] * 1e3:.1f}", *ratios, *sent])
        low, high = result["overlap"]["range"]
        in_turn, prefetched = (f"{value * 1e3:.1f}" for value in result["overlap"]["seconds"])
        ratio = f"{result['overlap']['ahead_of_in_turn']:.2f} ({low:.2f} to {high:.2f})"
        overlaps.append([f"{about[0]} ranks", about[1], in_turn, prefetched, ratio])
    show_table(
        ["form", "ranks", "width", "ms", *(f"{base}, of it" for base in BASES), "MB from a rank", "of the least"], lines
    )
    show(f"\n{MICRO_BATCHES} micro-batches of lookup and matrix products:")
    show_table(["", "width", f"{TURNS[0]} (ms)", f"{TURNS[1]} (ms)", "ratio"], overlaps)
    write_json(chosen.json, {"rows": chosen.rows, "ids_a_rank": chosen.ids, "runs": figures})


if __name__ == "__main__":
    main()
