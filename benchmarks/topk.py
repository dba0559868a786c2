"""Exact top-100 of a million items, compared with faiss's exact index.

    python -m benchmarks.topk                        needs `pip install -e '.[bench]'`

Both search the same fp32 vectors with equally many threads, in turns, and must find the same items. Ours leaves out 20
seen items per user, faiss none. faiss is configured to multiply matrices for any number of queries: its default may be
a loop of single products, which is several times slower here.
"""

from __future__ import annotations

import os
import statistics
import time

import faiss
import torch

from benchmarks.common import parser, show_table, write_json
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.evaluation.sharded_topk import sharded_topk


def main() -> None:
    options = parser("topk", __doc__)
    options.add_argument("--items", type=int, default=1_000_000)
    options.add_argument("--users", type=int, default=10_000)
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--best", type=int, default=100)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(%(default)s)")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    faiss.omp_set_num_threads(chosen.threads)
    faiss.cvar.distance_compute_blas_threshold = 1
    random = torch.Generator().manual_seed(0)
    items = torch.randn(chosen.items, chosen.width, generator=random)
    users = torch.randn(chosen.users, chosen.width, generator=random)
    nothing = torch.empty(0, 2, dtype=torch.int64)
    history = torch.randint(chosen.items, (20 * chosen.users,), generator=random)
    seen = torch.stack([torch.arange(chosen.users).repeat_interleave(20), history], dim=1)
    world, partition = World(0, 1, 0, torch.device("cpu")), RowPartition(chosen.items, 1)
    index = faiss.IndexFlatIP(chosen.width)
    index.add(items.numpy())

    times: dict[str, list[float]] = {"faiss": [], "ours": [], "ours, seen left out": []}
    for repeat in range(chosen.repeats + 1):
        best = {}
        for name in times:
            started = time.perf_counter()
            if name == "faiss":
                best[name] = torch.from_numpy(index.search(users.numpy(), chosen.best)[1])
            else:
                left_out = nothing if name == "ours" else seen
                best[name] = sharded_topk(users, items, chosen.best, left_out, partition, world)[1]
            if repeat:  # the first one warms up
                times[name].append(time.perf_counter() - started)
    same = (best["ours"].sort(dim=1)[0] == best["faiss"].sort(dim=1)[0]).float().mean().item()
    figures = {
        name: {
            "seconds": statistics.median(taken),
            "range": [min(taken), max(taken)],
            "of_faiss": statistics.median(a / b for a, b in zip(taken, times["faiss"], strict=True)),
        }
        for name, taken in times.items()
    }
    rows = []
    for name, f in figures.items():
        low, high = f["range"]
        speed = f"{chosen.users / f['seconds']:,.0f}"
        rows.append([name, f"{f['seconds']:.2f} ({low:.2f} to {high:.2f})", speed, f"{f['of_faiss']:.2f}"])
    show_table(["search", "seconds", "users a second", "time of faiss"], rows)
    write_json(chosen.json, {"same_items": same, **figures})


if __name__ == "__main__":
    main()
