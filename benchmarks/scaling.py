"""How cost grows: with the items, with the users and with the ranks; measured curves beside the expected ones.

    python -m benchmarks.scaling                     figures, and docs/pictures/scaling.png

Items: forward and backward of the item head (64 positions, width 64), and the memory it needs beside the rows and their
gradient. Users: rows of a step read, given a gradient and stepped by the lazy Adam (4,096 of width 16, drawn anew for
each step), and the memory of table and moments. Ranks: the item head of one batch (1,024 positions, 200,000 items,
width 64), split between gloo ranks: work of a rank, and bytes that leave it. All times are those of one thread on its
processor, because ranks beyond the cores of a machine wait for each other.
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
    """One measured curve.

    Attributes:
        what: is measured, with its unit.
        grows: what it is measured over.
        x, y: its points.
        expected: y at each x, as the arithmetic says, through the last point that was measured.
        slope: of the measured points in a log-log picture.
        expected_slope: of the expected ones.
    """

    what: str
    grows: str
    x: list[int]
    y: list[float]
    expected: list[float]
    slope: float
    expected_slope: float


def curve(what: str, grows: str, x: Sequence[int], y: Sequence[float], law: Callable[[int], float]) -> Curve:
    """`law` is what y is proportional to."""
    expected = [law(at) * y[-1] / law(x[-1]) for at in x]
    slope = lambda values: round(float(np.polyfit(np.log(x), np.log(values), 1)[0]), 2) + 0.0  # noqa: E731
    return Curve(what, grows, [*x], [*y], expected, slope(y), slope(expected))


def processor_seconds(run: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Median of what `run` takes on this thread's processor."""
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
    yield curve("MB beside rows and gradient", "items", sizes, peaks, lambda size: 1)


class OneTable(nn.Module):
    """What `EmbeddingOptimizer` steps, with nothing but a lazy table in it."""

    def __init__(self, num_rows: int, world: World) -> None:
        super().__init__()
        self.table = RowShardedEmbedding(num_rows, USER_WIDTH, world, sparse_gradients=True)

    def sharded_parameters(self) -> Iterator[tuple[str, nn.Parameter, RowPartition]]:
        yield "table", self.table.local_rows, self.table.partition

    def replicated_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ()


def users_curves(sizes: list[int], repeats: int) -> Iterator[Curve]:
    """Time of a lazy step and memory of a table."""
    times, held = [], []
    for size in sizes:
        taken, num_bytes = lazy_step(size, 10 * repeats)
        times.append(1e3 * taken)
        held.append(num_bytes / 1e6)
        show(f"{size:,} users: {times[-1]:.3f} ms, {held[-1]:,.0f} MB")
    yield curve("ms of a lazy step", "users", sizes, times, lambda size: 1)
    yield curve("MB of table and moments", "users", sizes, held, float)


def lazy_step(num_rows: int, repeats: int) -> tuple[float, int]:
    """Seconds of a step, and bytes held."""
    model = OneTable(num_rows, World(0, 1, 0, torch.device("cpu")))
    rows = model.table.local_rows
    optimizer = EmbeddingOptimizer(model, (0.9, 0.999))
    # Written once, so that no page is met for the first time in a step that is measured.
    rows.data.normal_(generator=torch.Generator().manual_seed(0))
    state = {"exp_avg": torch.full_like(rows, 1e-3), "exp_avg_sq": torch.full_like(rows, 1e-3), "step": torch.tensor(9)}
    optimizer.load_state({"table": state})
    random = np.random.default_rng(0)

    def step() -> None:
        index = torch.from_numpy(random.choice(num_rows, USER_ROWS, replace=False, shuffle=False))
        model.table.own(index).square().sum().backward()
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
    own = queries.detach()[low:high].clone().requires_grad_()
    rows = items.detach()[slice(*partition.range(rank))].clone().requires_grad_()
    places, wanted = torch.arange(high - low), targets[low:high]

    def step() -> None:
        own.grad = rows.grad = None
        gathering = GatheringQueries(own, places, wanted, partition, world)
        sharded_cross_entropy(gathering, rows).sum().backward()

    with world.watch, SentBytes(world) as traffic:
        step()
    with world.watch:
        told = [processor_seconds(step, repeats), traffic.num_bytes]
    Path(folder, f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def ranks_curves(sizes: list[int], repeats: int) -> Iterator[Curve]:
    """Work and bytes of a rank, where several share one batch and one catalog."""
    work, leaving = [], []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(_rank, (size, folder, repeats), nprocs=size, start_method="spawn")
            told = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
        processor, num_bytes = (max(values) for values in zip(*told, strict=True))
        work.append(processor)
        leaving.append(num_bytes / 1e6)
        show(f"{size} ranks: {processor:.3f} s each, {leaving[-1]:.3f} MB leave a rank")
    yield curve("seconds of a rank's part of the head", "ranks", sizes, work, lambda size: 1 / size)
    several = slice(sizes.count(1), None)  # nothing leaves a rank that is alone
    yield curve("MB that leave a rank", "ranks", sizes[several], leaving[several], lambda size: (size - 1) / size)


def draw(curves: list[Curve], path: Path) -> None:
    """Small multiples, log-log; the expected curve is dashed."""
    width = math.ceil(len(curves) / 2)
    figure = Figure(figsize=(3.7 * width, 6.2), layout="constrained")
    for panel, drawn in zip(figure.subplots(2, width, squeeze=False).T.flat, curves, strict=False):
        panel.loglog(
            drawn.x, drawn.expected, "--", color="#6b6b76", label=f"expected, slope {drawn.expected_slope:.2f}"
        )
        panel.loglog(drawn.x, drawn.y, "o-", color="#5450d6", label=f"measured, slope {drawn.slope:.2f}")
        values = [*drawn.y, *drawn.expected]
        middle = math.sqrt(min(values) * max(values))
        # At least two decades, so that what is flat looks flat.
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
