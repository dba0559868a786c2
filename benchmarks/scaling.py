"""Growth of costs with the numbers of items, users and ranks: measured and expected curves.

    python -m benchmarks.scaling                     writes docs/pictures/scaling.png too

Items: forward and backward of the item head (64 positions, width 64), and its memory on top of the rows and their
gradient. Users: lookup, gradient and sparse Adam step of a step's rows (4,096 random rows of width 16), and the memory
of table and moments. Ranks: the item head of one batch (1,024 positions, 200,000 items, width 64), split over gloo
ranks: CPU time of a rank, and bytes that it sends. All times are CPU times of one thread, because with more ranks than
cores the ranks wait for each other.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.common import parser, show, show_table, write_json
from benchmarks.head import inputs, ours, peak_bytes
from benchmarks.measured import SentBytes
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.embedding_optimizer import EmbeddingOptimizer
from cllm4rec_dist.model.sharded_cross_entropy import GatheringQueries, sharded_cross_entropy
from cllm4rec_dist.model.sharded_embedding import RowShardedEmbedding

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "scaling.png"
POSITIONS, WIDTH = 64, 64
USER_ROWS, USER_WIDTH = 4096, 16
BATCH, CATALOG = 1024, 200_000


@dataclass(frozen=True)
class Curve:
    """A measured curve.

    Attributes:
        what: measured quantity, with its unit.
        grows: quantity of the x axis.
        x, y: measured points.
        expected: expected y at each x, scaled to the last measured point.
        slope: slope of the measured points in a log-log plot.
        expected_slope: slope of the expected points.
    """

    what: str
    grows: str
    x: list[int]
    y: list[float]
    expected: list[float]
    slope: float
    expected_slope: float


def curve(what: str, grows: str, x: Sequence[int], y: Sequence[float], law: Callable[[int], float]) -> Curve:
    """Make a curve from its points and the function to which y should be proportional."""
    expected = [law(at) * y[-1] / law(x[-1]) for at in x]

    def slope(values: Sequence[float]) -> float:
        return round(float(np.polyfit(np.log(x), np.log(values), 1)[0]), 2) + 0.0

    return Curve(what, grows, [*x], [*y], expected, slope(y), slope(expected))


def processor_seconds(run: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Median CPU time of `run` in this thread."""
    taken = []
    for _ in range(warm_up + repeats):
        started = time.thread_time()
        run()
        taken.append(time.thread_time() - started)
    return statistics.median(taken[warm_up:])


def items_curves(sizes: list[int], repeats: int) -> Iterator[Curve]:
    """Time and memory of the item head."""
    times, peaks = [], []
    for size in sizes:
        shape = (POSITIONS, size, WIDTH)
        queries, items, targets = inputs(shape)

        def step(queries: Tensor = queries, items: Tensor = items, targets: Tensor = targets) -> None:
            queries.grad = items.grad = None
            ours(queries, items, targets)

        times.append(processor_seconds(step, repeats))
        peaks.append(peak_bytes("ours", shape) / 1e6)
        show(f"{size:,} items: {times[-1]:.4f} s, {peaks[-1]:.1f} MB")
    yield curve("seconds of the item head", "items", sizes, times, float)
    yield curve("MB on top of rows and gradient", "items", sizes, peaks, lambda size: 1)


class OneTable(nn.Module):
    """A model for `EmbeddingOptimizer` with one table that has sparse gradients."""

    def __init__(self, num_rows: int, world: World) -> None:
        super().__init__()
        self.table = RowShardedEmbedding(num_rows, USER_WIDTH, world, sparse_gradients=True)

    def sharded_parameters(self) -> Iterator[tuple[str, nn.Parameter, RowPartition]]:
        yield "table", self.table.local_rows, self.table.partition

    def replicated_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ()


def users_curves(sizes: list[int], repeats: int) -> Iterator[Curve]:
    """Time of a sparse optimizer step, and memory of a table."""
    times, held = [], []
    for size in sizes:
        taken, num_bytes = sparse_step(size, 10 * repeats)
        times.append(1e3 * taken)
        held.append(num_bytes / 1e6)
        show(f"{size:,} users: {times[-1]:.3f} ms, {held[-1]:,.0f} MB")
    yield curve("ms of a sparse step", "users", sizes, times, lambda size: 1)
    yield curve("MB of table and moments", "users", sizes, held, float)


def sparse_step(num_rows: int, repeats: int) -> tuple[float, int]:
    """Seconds of a step, and bytes of table and moments."""
    model = OneTable(num_rows, World(0, 1, 0, torch.device("cpu")))
    rows = model.table.local_rows
    optimizer = EmbeddingOptimizer(model, (0.9, 0.999))
    # Write all rows once, so that no page fault happens in a measured step.
    rows.data.normal_(generator=torch.Generator().manual_seed(0))
    state = {"exp_avg": torch.full_like(rows, 1e-3), "exp_avg_sq": torch.full_like(rows, 1e-3), "step": torch.tensor(9)}
    optimizer.load_state({"table": state})
    random = np.random.default_rng(0)

    def step() -> None:
        index = torch.from_numpy(random.choice(num_rows, USER_ROWS, replace=False, shuffle=False))
        model.table.local_lookup(index).square().sum().backward()
        assert rows.grad is not None
        rows.grad = rows.grad.coalesce()
        optimizer.step(1e-3)

    taken = processor_seconds(step, repeats, warm_up=10)
    moments = optimizer.state()["table"]
    return taken, sum(value.nbytes for value in (rows.data, moments["exp_avg"], moments["exp_avg_sq"]))


def _rank(rank: int, size: int, folder: str, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    world, partition = World(rank, size, rank, torch.device("cpu")), RowPartition(CATALOG, size)
    queries, items, targets = inputs((BATCH, CATALOG, WIDTH))
    low, high = world.local_range(0, BATCH)
    local_queries = queries.detach()[low:high].clone().requires_grad_()
    rows = items.detach()[slice(*partition.range(rank))].clone().requires_grad_()
    target_query = torch.arange(high - low)

    def step() -> None:
        local_queries.grad = rows.grad = None
        gathering = GatheringQueries(local_queries, target_query, targets[low:high], partition, world)
        sharded_cross_entropy(gathering, rows).sum().backward()

    with world.watch, SentBytes(world) as traffic:
        step()
    with world.watch:
        results = [processor_seconds(step, repeats), traffic.num_bytes]
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def ranks_curves(sizes: list[int], repeats: int) -> Iterator[Curve]:
    """CPU time and bytes of a rank, with one batch and one catalog split over the ranks."""
    work, leaving = [], []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(_rank, (size, folder, repeats), nprocs=size, start_method="spawn")
            results = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
        processor, num_bytes = (max(values) for values in zip(*results, strict=True))
        work.append(processor)
        leaving.append(num_bytes / 1e6)
        show(f"{size} ranks: {processor:.3f} s each, {leaving[-1]:.3f} MB leave a rank")
    yield curve("seconds of a rank's part of the head", "ranks", sizes, work, lambda size: 1 / size)
    several = slice(sizes.count(1), None)  # a single rank sends nothing
    yield curve("MB that leave a rank", "ranks", sizes[several], leaving[several], lambda size: (size - 1) / size)


def draw(curves: list[Curve], path: Path) -> None:
    """Draw small multiples, log-log, with expected curves dashed."""
    width = math.ceil(len(curves) / 2)
    figure = Figure(figsize=(3.7 * width, 6.2), layout="constrained")
    for panel, drawn in zip(figure.subplots(2, width, squeeze=False).T.flat, curves, strict=False):
        panel.loglog(
            drawn.x, drawn.expected, "--", color="#6b6b76", label=f"expected, slope {drawn.expected_slope:.2f}"
        )
        panel.loglog(drawn.x, drawn.y, "o-", color="#5450d6", label=f"measured, slope {drawn.slope:.2f}")
        values = [*drawn.y, *drawn.expected]
        middle = math.sqrt(min(values) * max(values))
        # At least two decades, so that a flat curve looks flat.
        panel.set_ylim(min(min(values) / 1.5, middle / 10), max(max(values) * 1.5, middle * 10))
        if drawn.grows == "ranks":
            panel.set_xticks(drawn.x, labels=map(str, drawn.x))
            panel.minorticks_off()
        panel.set_title(drawn.what, fontsize=10)
        panel.set_xlabel(drawn.grows)
        panel.grid(color="#e7e7ec")
        panel.legend(fontsize=8, frameon=False)
    for unused in figure.axes[len(curves) :]:
        unused.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    show(f"drawn to {path}")


def main() -> None:
    options = parser("scaling", __doc__)
    options.add_argument("--items", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000, 1_000_000])
    options.add_argument("--users", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--picture", type=Path, default=PICTURE)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    curves = [
        *items_curves(chosen.items, chosen.repeats),
        *users_curves(chosen.users, chosen.repeats),
        *ranks_curves(chosen.ranks, chosen.repeats),
    ]
    rows = []
    for c in curves:
        ends = f"{c.y[0]:.4g} at {c.x[0]:,}", f"{c.y[-1]:.4g} at {c.x[-1]:,}"
        rows.append([c.what, *ends, f"{c.slope:.2f}", f"{c.expected_slope:.2f}"])
    show_table(["cost", "least", "most", "slope", "expected"], rows)
    draw(curves, chosen.picture)
    write_json(chosen.json, {"curves": [asdict(c) for c in curves]})


if __name__ == "__main__":
    main()
