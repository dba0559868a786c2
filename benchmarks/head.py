"""The item head, compared with torch's dense cross-entropy and with its matrix products alone.

    python -m benchmarks.head
    python -m benchmarks.head --similarity cosine    with directions of items and with biases, the default of a run
    python -m benchmarks.head --dtype bf16           on a GPU, with `pip install -e '.[kernels]'`

Forward and backward with one target per position. `dense` is `F.cross_entropy(queries @ items.T)`; `products` are the
three matrix products that every head needs (logits, gradient of the queries, gradient of the items). In bf16 on a GPU,
cut-cross-entropy (without its filter of small gradients, so that it is exact) and Liger's fused head are included if
installed. Forms take turns; peak memory is measured in a separate process per form.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import parser, show_table, write_json
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.sharded_cross_entropy import GatheringQueries, sharded_cross_entropy

Form = Callable[[Tensor, Tensor, Tensor], None]


def ours(queries: Tensor, items: Tensor, targets: Tensor) -> None:
    """The sharded head on one rank."""
    world = World(0, 1, 0, queries.device)
    target_query = torch.arange(len(queries), device=queries.device)
    gathering = GatheringQueries(queries, target_query, targets, RowPartition(len(items), 1), world)
    sharded_cross_entropy(gathering, items).sum().backward()


def ours_cosine(queries: Tensor, items: Tensor, targets: Tensor) -> None:
    """The sharded head on one rank with directions of items, and with biases."""
    world = World(0, 1, 0, queries.device)
    target_query = torch.arange(len(queries), device=queries.device)
    gathering = GatheringQueries(queries, target_query, targets, RowPartition(len(items), 1), world)
    sharded_cross_entropy(gathering, items, bias=_bias(items), normalize=True).sum().backward()


def _bias(items: Tensor) -> Tensor:
    return torch.zeros(len(items), 1, device=items.device, requires_grad=True)


def dense(queries: Tensor, items: Tensor, targets: Tensor) -> None:
    """Cross-entropy over all logits at once."""
    F.cross_entropy(queries @ items.T, targets, reduction="sum").backward()


def dense_cosine(queries: Tensor, items: Tensor, targets: Tensor) -> None:
    """Cross-entropy over all logits at once, with directions of items, and with biases."""
    logits = torch.addmm(_bias(items).T.to(queries.dtype), queries, F.normalize(items, dim=1).T)
    F.cross_entropy(logits, targets, reduction="sum").backward()


@torch.no_grad()
def products(queries: Tensor, items: Tensor, targets: Tensor) -> None:
    """The matrix products alone."""
    logits = queries @ items.T
    queries.grad, items.grad = logits @ items, logits.T @ queries


def cut(queries: Tensor, items: Tensor, targets: Tensor) -> None:
    """Apple's cut-cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy

    linear_cross_entropy(queries, items, targets, reduction="sum", filter_eps=None).backward()


def liger(queries: Tensor, items: Tensor, targets: Tensor) -> None:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    LigerFusedLinearCrossEntropyLoss(reduction="sum")(items, queries, targets).backward()


FORMS: dict[str, Form] = {"ours": ours, "dense": dense, "products": products}
COSINE_FORMS: dict[str, Form] = {"ours": ours_cosine, "dense": dense_cosine, "products": products}
KERNELS: dict[str, tuple[str, Form]] = {"cut": ("cut_cross_entropy", cut), "liger": ("liger_kernel", liger)}
"""Forms for half precision on a GPU, and the package of each."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def forms(dtype: torch.dtype, similarity: str = "dot") -> dict[str, Form]:
    """Forms that this machine can run."""
    if similarity == "cosine":
        return COSINE_FORMS
    if not torch.cuda.is_available() or dtype is torch.float32:
        return FORMS
    return FORMS | {name: form for name, (package, form) in KERNELS.items() if find_spec(package)}


def inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Make queries, items and targets from numbers of positions and items, and the width."""
    random = torch.Generator().manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    queries, items = (torch.randn(n, shape[2], generator=random).mul_(0.3).to(device, dtype) for n in shape[:2])
    targets = torch.randint(shape[1], shape[:1], generator=random).to(device)
    return queries.requires_grad_(), items.requires_grad_(), targets


def seconds(form: Form, made: tuple[Tensor, Tensor, Tensor]) -> float:
    """Seconds of one forward and backward."""
    made[0].grad = made[1].grad = None
    if made[0].is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    form(*made)
    if made[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _peak(index: int, name: str, shape: tuple[int, int, int], dtype: torch.dtype, similarity: str, result: str) -> None:
    torch.set_num_threads(1)
    form = forms(dtype, similarity)[name]
    seconds(form, inputs((8, 100, 16), dtype))
    made = inputs(shape, dtype)
    before = _highest()
    seconds(form, made)
    gradients = sum(tensor.nbytes for tensor in made[:2])
    Path(result).write_text(str(_highest() - before - gradients))


def _highest() -> int:
    """Peak bytes of this process so far, on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def peak_bytes(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, similarity: str = "dot"
) -> int:
    """Peak bytes of a form on top of its inputs and their gradients."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "peak"
        mp.start_processes(_peak, (name, shape, dtype, similarity, str(result)), nprocs=1, start_method="spawn")
        return int(result.read_text())


def main() -> None:
    options = parser("head", __doc__)
    shapes = ["64x1000000x64", "2048x100000x256"]
    options.add_argument("--shapes", nargs="+", default=shapes, help="positions x items x width")
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--dtype", choices=[*DTYPES], default="fp32", help="of queries and items (%(default)s)")
    options.add_argument(
        "--similarity", choices=["dot", "cosine"], default="dot", help="form of the head (%(default)s)"
    )
    chosen = options.parse_args()
    dtype = DTYPES[chosen.dtype]
    running = forms(dtype, chosen.similarity)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    figures, rows = {}, []
    for text in chosen.shapes:
        positions, items, width = map(int, text.split("x"))
        shape = (positions, items, width)
        made = inputs(shape, dtype)
        times: dict[str, list[float]] = {name: [] for name in running}
        for repeat in range(chosen.repeats + 1):
            for name, form in running.items():
                taken = seconds(form, made)
                if repeat:  # the first one warms up
                    times[name].append(taken)
        peaks = {name: peak_bytes(name, shape, dtype, chosen.similarity) for name in running if name != "products"}
        median = {name: statistics.median(repeats) for name, repeats in times.items()}
        ratios = [a / b for a, b in zip(times["ours"], times["dense"], strict=True)]
        figures[text] = {
            "seconds": median,
            "of_dense": statistics.median(ratios),
            "of_dense_range": [min(ratios), max(ratios)],
            "of_products": median["products"] / median["ours"],
            "peak_bytes": peaks,
            "memory_of_dense": peaks["ours"] / peaks["dense"],
        }
        result, low, high = figures[text], min(ratios), max(ratios)
        rows.append(
            [
                text,
                *(f"{median[name]:.3f}" for name in running),
                f"{result['of_dense']:.2f} ({low:.2f} to {high:.2f})",
                f"{result['of_products']:.0%}",
                f"{peaks['ours'] / 1e6:.0f}",
                f"{result['memory_of_dense']:.2f}",
            ]
        )
    names = [f"{name} (s)" for name in running]
    show_table(["shape", *names, "of dense", "products' speed", "peak (MB)", "of dense"], rows)
    write_json(chosen.json, {"dtype": chosen.dtype, "similarity": chosen.similarity, **figures})


if __name__ == "__main__":
    main()
