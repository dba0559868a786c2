"""What a sampled item softmax costs in bias and saves in time, by the size of its sample.

    python -m benchmarks.sampled

Queries and rows are directions, a query near its target's, over a temperature of 0.1, as in a trained cosine head.
Against the exact softmax: the loss, the gradient of the queries and of the rows, of one draw and of the mean of all
draws (what noise leaves, is bias), as shares of the exact gradient's norm. Time is that of one thread on its processor,
forward and backward.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import parser, tell_table, write_json
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.sharded_cross_entropy import GatheringQueries, sharded_cross_entropy

TEMPERATURE, NOISE = 0.1, 2.0


def inputs(positions: int, items: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, rows, targets."""
    random = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(items, width, generator=random), dim=1)
    targets = torch.randint(items, (positions,), generator=random)
    noise = F.normalize(torch.randn(positions, width, generator=random), dim=1)
    queries = F.normalize(rows[targets] + NOISE * noise, dim=1) / TEMPERATURE
    return queries.requires_grad_(), rows.requires_grad_(), targets


def run(made: tuple[Tensor, Tensor, Tensor], num_negatives: int = 0, key: int = 0) -> tuple[float, list[Tensor], float]:
    """Mean loss, gradients, seconds."""
    queries, rows, targets = made
    world, partition = World(0, 1, 0, torch.device("cpu")), RowPartition(len(rows), 1)
    started = time.thread_time()
    positions = torch.arange(len(queries))
    gathering = GatheringQueries(queries, positions, targets, partition, world)
    loss = sharded_cross_entropy(gathering, rows, num_negatives, torch.tensor(key)).mean()
    gradients = torch.autograd.grad(loss, (queries, rows))
    return loss.item(), list(gradients), time.thread_time() - started


def main() -> None:
    options = parser("sampled", __doc__)
    options.add_argument("--shape", default="256x100000x64", help="positions x items x width (%(default)s)")
    options.add_argument("--samples", type=int, nargs="+", default=[300, 1000, 3000, 10_000, 30_000])
    options.add_argument("--draws", type=int, default=16)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    made = inputs(*map(int, chosen.shape.split("x")))
    exact = [run(made) for _ in range(6)][1:]  # the first one warms up
    loss, gradients, _ = exact[0]
    seconds = statistics.median(taken for _, _, taken in exact)
    figures, rows = {}, []
    for size in chosen.samples:
        draws = [run(made, size, key) for key in range(chosen.draws)]
        error = lambda got, wanted: float((got - wanted).norm() / wanted.norm())  # noqa: E731
        one = [error(got, wanted) for got, wanted in zip(draws[0][1], gradients, strict=True)]
        means = [sum(parts) / len(draws) for parts in zip(*(d[1] for d in draws), strict=True)]
        mean = [error(got, wanted) for got, wanted in zip(means, gradients, strict=True)]
        losses = [d[0] - loss for d in draws]
        figures[str(size)] = {
            "loss_error": statistics.mean(losses),
            "loss_error_std": statistics.stdev(losses),
            "gradient_error_one_draw": one,
            "gradient_error_of_the_mean": mean,
            "time_of_exact": statistics.median(d[2] for d in draws) / seconds,
        }
        found = figures[str(size)]
        rows.append(
            [
                f"{size:,}",
                f"{found['loss_error']:+.4f} ± {found['loss_error_std']:.4f}",
                *(f"{a:.3f} / {b:.3f}" for a, b in zip(one, mean, strict=True)),
                f"{found['time_of_exact']:.2f}",
            ]
        )
    tell_table(["sample", f"loss - {loss:.4f}", "query gradient, one / mean", "row gradient", "time of exact"], rows)
    write_json(chosen.json, {"shape": chosen.shape, "exact_loss": loss, "exact_seconds": seconds, **figures})


if __name__ == "__main__":
    main()
