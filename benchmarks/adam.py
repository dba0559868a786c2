"""A step of the tables' Adam, compared with optimizers of torch and bitsandbytes.

    python -m benchmarks.adam

`lazy`: sparse gradients of some rows of a large table, as from a lookup, compared with SparseAdam. `dense`: gradients
of all rows of a smaller table, as from the item softmax, compared with AdamW (plain and fused) and AdamW8bit. Forms
take turns.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import parser, show_table, write_json
from cllm4rec_dist.config import HeadConfig
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model.backbone import FrozenEmbeddings
from cllm4rec_dist.model.embedding_optimizer import EmbeddingOptimizer, Storage
from cllm4rec_dist.model.recommender import Recommender

BETAS = (0.9, 0.999)


def ours(num_rows: int, width: int, sparse: bool, storage: Storage) -> tuple[nn.Parameter, Callable[[], object], Any]:
    """Return the rows of a table, a function that steps them, and the object with their moments."""
    counts = (num_rows, 1) if sparse else (1, num_rows)
    head, world = HeadConfig(similarity="dot", item_bias=False), World(0, 1, 0, torch.device("cpu"))
    model = Recommender(
        *counts,
        FrozenEmbeddings(*torch.zeros(2, 1, width)),
        head,
        world,
        dropout=0.0,
        comm_dtype=torch.float32,
        sparse_gradients=True,
        content=False,
    )
    optimizer = EmbeddingOptimizer(model, BETAS, storage)
    name = "collaborative.users" if sparse else "collaborative.items"
    rows = dict(zip(optimizer.names, optimizer.parameters, strict=True))[name]
    return rows, lambda: optimizer.step(1e-3), optimizer._moments[name]


def theirs(num_rows: int, width: int, make: Callable[..., Any], **settings: Any) -> tuple[nn.Parameter, Any, Any]:
    """`ours` for an optimizer class."""
    rows = nn.Parameter(torch.zeros(num_rows, width))
    optimizer = make([rows], lr=1e-3, betas=BETAS, **settings)
    return rows, optimizer.step, optimizer.state[rows]


def bytes_of(holder: Any) -> int:
    """Bytes of all tensors in an object or a dict."""
    held = holder.values() if isinstance(holder, dict) else vars(holder).values()
    return sum(t.nbytes for v in held for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor))


def main() -> None:
    options = parser("adam", __doc__)
    options.add_argument("--lazy", type=int, nargs=2, default=(1_000_000, 8_000), help="rows, and those of a step")
    options.add_argument("--dense", type=int, default=200_000, help="rows (%(default)s)")
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--repeats", type=int, default=7)
    chosen = options.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    from bitsandbytes.optim import AdamW8bit

    (num_rows, num_touched), width = chosen.lazy, chosen.width
    index = torch.randperm(num_rows)[:num_touched].sort().values
    values = torch.randn(num_touched, width)
    sparse = torch.sparse_coo_tensor(index[None], values, (num_rows, width), is_coalesced=True, check_invariants=True)
    full = torch.randn(chosen.dense, width)
    cases: dict[str, tuple[Tensor, dict[str, Any]]] = {
        "lazy": (
            sparse,
            {
                "ours": ours(num_rows, width, True, "fp32"),
                "ours, int8": ours(num_rows, width, True, "int8"),
                "SparseAdam": theirs(num_rows, width, torch.optim.SparseAdam),
            },
        ),
        "dense": (
            full,
            {
                "ours": ours(chosen.dense, width, False, "fp32"),
                "ours, int8": ours(chosen.dense, width, False, "int8"),
                "AdamW": theirs(chosen.dense, width, torch.optim.AdamW, weight_decay=0.0),
                "AdamW, fused": theirs(chosen.dense, width, torch.optim.AdamW, weight_decay=0.0, fused=True),
                "AdamW8bit": theirs(chosen.dense, width, AdamW8bit, weight_decay=0.0),
            },
        ),
    }
    figures: dict[str, Any] = {}
    lines = []
    for case, (gradient, forms) in cases.items():
        times: dict[str, list[float]] = {name: [] for name in forms}
        for repeat in range(chosen.repeats + 1):
            for name, (rows, step, _) in forms.items():
                rows.grad = gradient
                started = time.perf_counter()
                step()
                if repeat:  # the first one warms up
                    times[name].append(time.perf_counter() - started)
        figures[case] = {}
        for name, (_, _, holder) in forms.items():
            ratios = [a / b for a, b in zip(times["ours"], times[name], strict=True)]
            result = {
                "seconds": statistics.median(times[name]),
                "ours_of_it": statistics.median(ratios),
                "ours_of_it_range": [min(ratios), max(ratios)],
                "state_bytes": bytes_of(holder),
            }
            figures[case][name] = result
            spread = f"{result['ours_of_it']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(
                [f"{case}: {name}", f"{result['seconds'] * 1e3:.1f}", spread, f"{result['state_bytes'] / 1e6:.0f}"]
            )
    show_table(["form", "ms", "time of ours", "moments (MB)"], lines)
    write_json(chosen.json, {"lazy": chosen.lazy, "dense": chosen.dense, "width": width, "forms": figures})


if __name__ == "__main__":
    main()
